"""Run by torchrun and imported by the test beside it: one evaluation with every metric, by as many as there are."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import skimage.data
import torch
from PIL import Image

from eval import features
from eval.deeper import Deeper
from eval.evaluator import evaluate
from eval.protocols import IMAGE_METRICS, SET_METRICS, get_protocol
from eval.validation import Validator
from sd_vae.autoencoder import AutoencoderKL
from sd_vae.files import finite
from sd_vae.latents.processes import Processes, joined_processes
from sd_vae.losses.backbones import place_in_cache

TINY: dict[str, Any] = {
    "block_out_channels": (8, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 4,
    "sample_size": 32,
}


class Colours(features.Features):
    """Stands in for Inception, whose 2048 features take half a minute of linear algebra."""

    name, num_features, sha256 = "inception", 3, "0" * 64

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return the mean colour (B, 3) of bytes (B, 3, H, W)."""
        return pixels.float().mean(dim=(2, 3))


class Photos:
    """Three crops of the astronaut, by number."""

    spec = "photos"

    def __len__(self) -> int:
        """Return the number of photos."""
        return 3

    def load(self, index: int) -> Image.Image:
        """Return a photo."""
        return Image.fromarray(np.ascontiguousarray(skimage.data.astronaut()[100 * index : 100 * index + 176, 90:266]))

    def name(self, index: int) -> str:
        """Return its name."""
        return f"photo-{index}.png"


@contextmanager
def without_drawing() -> Iterator[None]:
    """Build networks without random weights, which are replaced anyway: VGG16 has 138 million of them."""
    names = ("kaiming_normal_", "kaiming_uniform_", "normal_", "uniform_", "trunc_normal_")
    before = {name: getattr(torch.nn.init, name) for name in names}
    try:
        for name in names:
            setattr(torch.nn.init, name, lambda tensor, *_, **__: tensor)
        yield
    finally:
        for name, function in before.items():
            setattr(torch.nn.init, name, function)


def write_backbones(cache: Path) -> None:
    """Write random weights of LPIPS' three networks where torch's hub cache has them, under `cache`."""
    from torchvision import models

    torch.hub.set_dir(str(cache))
    builders = {"vgg": models.vgg16, "alex": models.alexnet, "squeeze": models.squeezenet1_1}
    generator = torch.Generator().manual_seed(0)
    for net, build in builders.items():
        with without_drawing():
            shapes = {name: tensor.shape for name, tensor in build(weights=None).features.state_dict().items()}
        state = {
            name: torch.randn(shape, generator=generator) * (2 / shape[1:].numel()) ** 0.5
            for name, shape in shapes.items()
        }
        file = place_in_cache(net)
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(state, file.with_name(f"{net}.pth"))


def run(processes: Processes, cache: Path) -> dict[str, Any]:
    """Return everything that an evaluation and a validation of a tiny VAE find."""
    torch.set_num_threads(1)
    build = features.build_features
    features.build_features = lambda net, file=None: Colours() if net == "inception" else build(net, file)
    torch.manual_seed(0)
    vae = AutoencoderKL(**TINY).eval()
    weights = {net: str(cache / "checkpoints" / f"{net}.pth") for net in ("vgg", "alex", "squeeze")}
    photos = Photos()
    try:
        with without_drawing():
            return _found(vae, photos, weights, processes)
    finally:
        features.build_features = build


def _found(vae: AutoencoderKL, photos: Photos, weights: dict[str, str], processes: Processes) -> dict[str, Any]:
    named = {photos.name(index): photos.load(index) for index in range(len(photos))}
    found = evaluate(
        {"ours": vae},
        named,
        protocol=get_protocol("native", metrics=[*IMAGE_METRICS, *SET_METRICS]),
        weights=weights,
        box_blocks=(8,),
        deeper=Deeper(tiling=True),
        worst=2,
        processes=processes,
    )
    validated = Validator("native", size=64, weights=weights)(vae, photos, processes=processes)
    return {
        "evaluation": finite(found.to_dict()),
        "pictures": list(found.pictures),
        "validation": finite(dict(validated.values)),
        "card": validated.card,
    }


if __name__ == "__main__":
    with joined_processes() as joined:
        assert joined.count == 2, f"{joined.count} processes, not 2"
        result = run(joined, Path(sys.argv[1]))
        Path(sys.argv[1], f"rank{joined.rank}.json").write_text(json.dumps(result))
