"""Networks whose features describe a set of pictures: Inception for rFID, LPIPS' backbones for other distances.

Inception is torch-fidelity's port of the TensorFlow network of 2015, with its resize to 299x299; its weights come from
a file whose whole sha256 is checked, and are read without executing anything in it. A network with other weights, or
random ones, is another metric and is refused.

Shapes: B batch, D features, H W pixels.

Source: Heusel et al., "GANs Trained by a Two Time-Scale Update Rule", arXiv 1706.08500, by way of torch-fidelity.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sd_vae.errors import UserError
from sd_vae.images import to_unit_range

__all__ = [
    "INCEPTION_FILE",
    "INCEPTION_SHA256",
    "BackboneFeatures",
    "Features",
    "InceptionFeatures",
    "build_features",
    "has_weights",
    "leave_out",
    "sha256_of",
]

INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
"""What torch-fidelity calls the file; pytorch-fid's pt_inception-2015-12-05-6726825d.pth has the same bytes."""
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
"""Of that file."""


class Features(nn.Module):
    """A frozen network from pictures to features; stays in eval mode."""

    name: str
    """What it is called."""
    num_features: int
    """D."""
    sha256: str
    """Of the file with its weights."""

    @torch.inference_mode()
    def forward(self, pixels: Tensor) -> Tensor:
        """Return features (B, D), float32, of pictures (B, 3, H, W) of bytes, on the device of the network."""
        raise NotImplementedError

    def train(self, mode: bool = True) -> Features:
        """Stay in eval mode: batch statistics would make it another metric."""
        del mode
        return super().train(False)


class InceptionFeatures(Features):
    """The 2048 pooled features that rFID compares.

    Args:
        file: torch-fidelity's weights.
        sha256: What the file's sha256 must be.

    Raises:
        UserError: Not that file, or not those weights.
    """

    def __init__(self, file: Path, sha256: str = INCEPTION_SHA256) -> None:
        super().__init__()
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        from sd_vae.checkpoints.formats import open_weights

        self.name, self.num_features, self.sha256 = "inception", 2048, sha256_of(file)
        if self.sha256 != sha256:
            raise UserError(
                f"{file} has sha256 {self.sha256}, torch-fidelity's {INCEPTION_FILE} has {sha256}; fetch it again."
            )
        stored = open_weights(file)
        copy = io.BytesIO()  # torch-fidelity would execute whatever pickle it is given
        torch.save({name: stored.read(name) for name in stored.shapes}, copy)
        copy.seek(0)
        self.model = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=copy)

    @torch.inference_mode()
    def forward(self, pixels: Tensor) -> Tensor:
        """Return features (B, 2048) of pictures (B, 3, H, W) of bytes."""
        return self.model(pixels.to(next(self.model.parameters()).device))[0].float()


class BackboneFeatures(Features):
    """The last feature map of one of LPIPS' backbones, mean over positions.

    Args:
        net: vgg (512 features), alex (256) or squeeze (512).
        file: File with its torchvision weights; None for the torch hub cache.

    Raises:
        UserError: The weights are missing or not what they should be.
    """

    def __init__(self, net: str, file: str | None = None) -> None:
        super().__init__()
        from sd_vae.losses.backbones import find_backbone
        from sd_vae.losses.perceptual import LPIPS

        found = find_backbone(net, file)
        self.name, self.sha256 = net, sha256_of(found)
        self.model: Any = LPIPS(net, str(found)).model
        self.num_features = int(self.model.chns[-1])

    @torch.inference_mode()
    def forward(self, pixels: Tensor) -> Tensor:
        """Return features (B, D) of pictures (B, 3, H, W) of bytes."""
        x = to_unit_range(pixels.to(next(self.model.parameters()).device))
        return self.model.net(self.model.scaling_layer(x))[-1].mean(dim=(2, 3))


def build_features(net: str, file: str | None = None) -> Features:
    """Return a network by name.

    Args:
        net: inception, vgg, alex or squeeze.
        file: File with its weights; None for the torch hub cache.

    Raises:
        UserError: The weights are missing or not what they should be.
    """
    with leave_out("rfid" if net == "inception" else f"frechet_{net}", net):
        return InceptionFeatures(_find_inception(file)) if net == "inception" else BackboneFeatures(net, file)


@contextmanager
def leave_out(metric: str, net: str) -> Iterator[None]:
    """Add to the error of missing weights how the command line provides them, and how it leaves the metric out."""
    try:
        yield
    except UserError as error:
        raise UserError(
            f"{metric}: {error} On the command line: --weights {net}=FILE, or --metrics without {metric}."
        ) from error


def sha256_of(file: Path) -> str:
    """Return the sha256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with Path(file).open("rb") as opened:
        while block := opened.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def has_weights(net: str) -> bool:
    """Return whether a network's weights are in the torch hub cache: nothing is downloaded to find out."""
    from sd_vae.losses.backbones import place_in_cache

    return (_inception_in_cache() if net == "inception" else place_in_cache(net)).is_file()


def _inception_in_cache() -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE


def _find_inception(file: str | None) -> Path:
    """The file that is given, or the one in the torch hub cache."""
    found = _inception_in_cache() if file is None else Path(file)
    if found.is_file():
        return found
    raise UserError(
        f"there is no {found}: rFID needs torch-fidelity's {INCEPTION_FILE} (sha256 {INCEPTION_SHA256}), from "
        "https://github.com/toshas/torch-fidelity/releases/tag/v0.2.0; copy it there, or name a copy of it."
    )
