import hashlib

import lpips
import pytest
import skimage.data
import torch
from PIL import Image

from eval.measures import build_measures
from eval.protocols import get_protocol
from sd_vae.errors import UserError
from sd_vae.images import to_tensor
from sd_vae.losses.backbones import load_backbone_

FILES = {"alex": "alexnet_features_torchvision.pth", "squeeze": "squeezenet1_1_features_torchvision.pth"}


@pytest.mark.shared
@pytest.mark.parametrize("net", list(FILES))
@pytest.mark.filterwarnings("ignore:The parameter 'pretrained':UserWarning")
@pytest.mark.filterwarnings("ignore:Arguments other than a weight enum:UserWarning")
def test_lpips_equals_the_package_and_is_stamped(net, shared, noisy):
    file = shared / "weights" / FILES[net]
    x = Image.fromarray(skimage.data.astronaut()).resize((64, 64))
    recon = noisy(x)

    measures = build_measures(get_protocol("pixels", metrics=[f"lpips_{net}"]), weights={net: str(file)})

    theirs = lpips.LPIPS(net=net, pnet_rand=True, verbose=False).eval()
    load_backbone_(theirs.net, file)
    with torch.no_grad():
        expected = float(theirs(to_tensor(recon), to_tensor(x)))
    assert measures.of(recon, x)[f"lpips_{net}"] == pytest.approx(
        expected, abs=1e-5
    )  # worst seen 4e-9, noise of seeds 0 to 4
    assert measures.stamp == {f"lpips_{net} weights": hashlib.sha256(file.read_bytes()).hexdigest()}


def test_measures_take_ssims_window_from_the_protocol(photos, noisy):
    x = photos["cat"]
    values = [
        build_measures(get_protocol(name, metrics=["ssim"])).of(noisy(x), x)["ssim"]
        for name in ("native", "imagenet50k-256")
    ]

    assert values[0] != values[1]


def test_measures_refuse_two_metrics_of_one_name(perceptual):
    perceptual.name = "ssim"

    with pytest.raises(UserError, match="two metrics are called ssim"):
        build_measures(get_protocol("pixels"), perceptual=perceptual)


def test_measures_refuse_a_distance_called_like_a_similarity(perceptual):
    perceptual.name = "ms_ssim"

    with pytest.raises(UserError, match="a distance is called ms_ssim, which is a metric of another kind"):
        build_measures(get_protocol("pixels"), perceptual=perceptual)


def test_measures_refuse_photos_that_are_too_small():
    measures = build_measures(get_protocol("pixels", metrics=["ms_ssim"]))

    with pytest.raises(UserError, match=r"MS-SSIM needs .* 176x176 pixels, this one has 200x100; leave out the photo"):
        measures.require_size(Image.new("RGB", (200, 100)))


def test_measures_refuse_weights_of_unknown_networks():
    with pytest.raises(UserError, match="weights are given for 'dino'; choose from: vgg, alex, squeeze, inception"):
        build_measures(get_protocol("pixels"), weights={"dino": "file"})


def test_measures_name_missing_weights_and_how_to_leave_the_metric_out(tmp_path):
    with pytest.raises(UserError, match=r"lpips_vgg: there is no LPIPS backbone .*--metrics without lpips_vgg"):
        build_measures(get_protocol("pixels", metrics=["lpips_vgg"]), weights={"vgg": str(tmp_path / "none.pth")})
