"""Stand-in backbones: the right shapes with random values, for what does not depend on the published weights."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import save_file

from sd_vae.losses.perceptual import LPIPS

ARCHITECTURES = {
    "alex": torchvision.models.alexnet,
    "squeeze": torchvision.models.squeezenet1_1,
    "vgg": torchvision.models.vgg16,
}


def random_features(net: str) -> dict[str, torch.Tensor]:
    """Features of torchvision's network, randomly initialised, under the names of a whole checkpoint."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        # Only the features are initialised: the classifier of VGG takes seconds.
        with torch.device("meta"):
            model = ARCHITECTURES[net](weights=None)
        model.features.to_empty(device="cpu")
        for module in model.features.modules():
            if isinstance(module, torch.nn.Conv2d):
                torch.nn.init.kaiming_normal_(module.weight)
                torch.nn.init.normal_(module.bias, std=0.1)
    return {f"features.{name}": tensor for name, tensor in model.features.state_dict().items()}


@pytest.fixture(scope="session")
def features() -> Callable[[str], dict[str, torch.Tensor]]:
    """Random features by LPIPS' name of the network, fresh at every call."""
    return random_features


@pytest.fixture(scope="session")
def standin(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Path of a stand-in backbone by LPIPS' name of the network."""
    folder = tmp_path_factory.mktemp("backbones")

    def make(net: str) -> Path:
        path = folder / f"{net}.safetensors"
        if not path.is_file():
            save_file(random_features(net), path)
        return path

    return make


@pytest.fixture
def alex(standin: Callable[[str], Path]) -> LPIPS:
    """LPIPS over a stand-in AlexNet."""
    return LPIPS("alex", str(standin("alex")))


@pytest.fixture
def photo_pair(shared: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Two crops of Kodak photos (2, 3, 96, 96), and the same saved as coarse JPEG."""
    import io

    from sd_vae.images import open_image, to_tensor

    photos, coarse = [], []
    for name in ("04", "23"):
        photo = open_image(shared / "data" / "kodak24" / f"{name}.png").crop((200, 200, 296, 296))
        file = io.BytesIO()
        photo.save(file, "JPEG", quality=15)
        photos.append(to_tensor(photo))
        coarse.append(to_tensor(open_image(file, name)))
    return torch.cat(photos), torch.cat(coarse)
