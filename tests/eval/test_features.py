"""Inception's own weights are not here: the same random ones go into torch-fidelity's extractor and into ours."""

import hashlib

import numpy as np
import pytest
import skimage.data
import torch
import torch_fidelity
from PIL import Image
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from eval.features import INCEPTION_FILE, INCEPTION_SHA256, BackboneFeatures, InceptionFeatures, build_features
from eval.fid import PHOTOS, FeatureFile, frechet_distances
from sd_vae.errors import UserError


@pytest.fixture(scope="module")
def random_inception(tmp_path_factory):
    """A file with random weights under Inception's names."""
    file = tmp_path_factory.mktemp("weights") / "random.pth"
    with torch.device("meta"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        patch.setattr(FeatureExtractorInceptionV3, "to", lambda self, dtype: self)
        patch.setattr("torch_fidelity.feature_extractor_inceptionv3.torch.load", lambda *args, **options: {})
        shapes = FeatureExtractorInceptionV3("shapes", ["2048"], feature_extractor_weights_path="nowhere").state_dict()
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, tensor in shapes.items():
        fan = max(tensor.numel() // max(len(tensor), 1), 1) if tensor.dim() else 1
        values = torch.randn(tensor.shape, generator=generator) * (2 / fan) ** 0.5
        state[name] = values.abs() + 0.5 if name.endswith(("bn.weight", "running_var")) else values
        if not tensor.is_floating_point():
            state[name] = torch.zeros(tensor.shape, dtype=tensor.dtype)
    torch.save(state, file)
    return file


@pytest.fixture
def folders(tmp_path):
    """Two folders of crops, the second blurred."""
    photo = Image.fromarray(skimage.data.astronaut())
    for name in ("photos", "recons"):
        (tmp_path / name).mkdir()
        for index in range(3):
            crop = photo.crop((96 * index, 60, 96 * index + 128, 188))
            crop = crop if name == "photos" else crop.resize((40, 40)).resize((128, 128))
            crop.save(tmp_path / name / f"{index}.png")
    return tmp_path / "photos", tmp_path / "recons"


def test_rfid_equals_torch_fidelity_with_the_same_weights(random_inception, folders):
    network = InceptionFeatures(random_inception, hashlib.sha256(random_inception.read_bytes()).hexdigest())
    files = []
    for row, folder in zip((PHOTOS, "row"), folders, strict=True):
        files.append(FeatureFile("rfid", row, network.num_features))
        for path in sorted(folder.iterdir()):
            pixels = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)[None]
            files[-1].append(network(pixels).numpy())

    ours = frechet_distances(files)["row"]["rfid"]

    theirs = torch_fidelity.calculate_metrics(
        input1=str(folders[0]),
        input2=str(folders[1]),
        fid=True,
        cuda=False,
        cache=False,
        verbose=False,
        batch_size=1,
        save_cpu_ram=True,
        feature_extractor_weights_path=str(random_inception),
    )["frechet_inception_distance"]
    # 3 pictures in 2048 dimensions: their eigenvalues of a singular product are what differs
    assert ours == pytest.approx(theirs, rel=1e-4)  # seen 3.2e-5: three pictures, 2048 features, singular covariances


def test_inception_refuses_a_file_of_another_sha256(random_inception):
    with pytest.raises(
        UserError, match=f"random.pth has sha256 .*, torch-fidelity's {INCEPTION_FILE} has {INCEPTION_SHA256}"
    ):
        build_features("inception", str(random_inception))


def test_missing_inception_is_named_with_its_sha256_and_the_ways_to_provide_it(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path))

    with pytest.raises(
        UserError, match=f"{INCEPTION_FILE} .*{INCEPTION_SHA256}.*--weights inception=FILE, or --metrics"
    ):
        build_features("inception")


@pytest.mark.shared
@pytest.mark.parametrize(
    ("net", "file", "num"),
    [
        ("alex", "alexnet_features_torchvision.pth", 256),
        ("squeeze", "squeezenet1_1_features_torchvision.pth", 512),
    ],
)
def test_backbone_features_are_means_of_the_last_map(shared, net, file, num):
    network = BackboneFeatures(net, str(shared / "weights" / file)).train()

    pixels = torch.from_numpy(np.array(Image.fromarray(skimage.data.astronaut()).resize((64, 64))))
    features = network(pixels.permute(2, 0, 1)[None])

    assert not network.training
    assert features.shape == (1, num) == (1, network.num_features)
    assert network.sha256 == hashlib.sha256((shared / "weights" / file).read_bytes()).hexdigest()
