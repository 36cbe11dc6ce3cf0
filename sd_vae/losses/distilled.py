"""A perceptual distance of our own: a small network that was taught what LPIPS says, and needs no ImageNet weights.

LPIPS costs more than a small VAE, and its backbones cannot be fetched on an offline machine. This network has the form
of LPIPS (features of both images, scaled to unit length, squared differences weighted by channel) and 0.45 M parameters
of its own. It agrees with LPIPS where it was taught to, and is never reported as LPIPS. `docs/mini.md` says how it is
made.

Shapes: B batch, D feature channels, h w cells of a feature map.

Source: the form is that of Zhang et al., arXiv 1801.03924; widths and teaching are ours.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sd_vae.checkpoints.formats import open_weights
from sd_vae.errors import UserError
from sd_vae.losses.perceptual import Perceptual
from sd_vae.weights import shipped_folder

__all__ = ["FILE_NAME", "Distilled", "FeatureNet", "load_feature_net"]

STAGES = ((32, 1), (64, 2), (96, 2), (128, 2))
"""Width and 3x3 convolutions of each stage; the first of them halves the map."""
MIN_SIZE = 2 ** len(STAGES)
FILE_NAME = "distilled.safetensors"
"""What the weights are called in the package."""
SOFTNESS = 1e-3
"""Added to squared lengths: features of flat areas are not blown up, and gradients stay bounded."""


class FeatureNet(nn.Module):
    """Feature maps of an image at four scales, and how much each of their channels counts."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList()
        in_channels = 3
        for width, num_convs in STAGES:
            strides = [2] + [1] * (num_convs - 1)
            widths = [in_channels] + [width] * num_convs
            convs = [nn.Conv2d(widths[i], widths[i + 1], 3, stride, padding=1) for i, stride in enumerate(strides)]
            self.stages.append(nn.ModuleList(convs))
            in_channels = width
        self.heads = nn.ParameterList(nn.Parameter(torch.full((width,), -2.0)) for width, _ in STAGES)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return the maps (B, D, h, w) of images (B, 3, H, W) in [-1, 1], each cell of length below 1 over D."""
        maps = []
        h = x.contiguous(memory_format=torch.channels_last)
        for stage in self.stages:
            for conv in stage:  # type: ignore[attr-defined]
                h = F.silu(conv(h))
            maps.append(h * torch.rsqrt(h.square().sum(dim=1, keepdim=True) + SOFTNESS))
        return maps

    def compare(self, ours: list[Tensor], theirs: list[Tensor]) -> list[Tensor]:
        """Return the distance in each cell, (B, h, w), one map a scale.

        sum over D of softplus(head_D) (ours_D - theirs_D)^2: never negative, 0 for equal images, and symmetric.
        """
        return [
            torch.einsum("bdhw,d->bhw", (a - b).square(), F.softplus(head))
            for a, b, head in zip(ours, theirs, self.heads, strict=True)
        ]


class Distilled(Perceptual):
    """The distance of the network as a training term: means over cells, summed over scales.

    Args:
        weights: File with its weights; None for those that ship.

    Raises:
        UserError: No such file, not these weights, or none ship with this installation.
    """

    def __init__(self, weights: str | None = None) -> None:
        super().__init__()
        self.name = "distilled"
        self.min_size = MIN_SIZE
        self.model = load_feature_net(shipped_folder("distilled") / FILE_NAME if weights is None else Path(weights))
        self.model.requires_grad_(False)
        self.eval()

    def distance(self, recon: Tensor, x: Tensor) -> Tensor:
        """Return the distances (B,); the target's features keep no graph."""
        with torch.no_grad():
            features_x = self.model(x)
        maps = self.model.compare(self.model(recon), features_x)
        return torch.stack([each.mean(dim=(1, 2)) for each in maps]).sum(dim=0)


def load_feature_net(file: Path) -> FeatureNet:
    """Return the network with the weights in a file, in fp32.

    Raises:
        UserError: No such file, no checkpoint, other tensors than the network's, or values that are not finite.
    """
    if not file.is_file():
        raise UserError(f"there is no file {file} with weights of the distilled network; check perceptual.backbone.")
    stored = open_weights(file)
    with torch.random.fork_rng(devices=[]):
        net = FeatureNet()
    expected = {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()}
    found = {name: tuple(shape) for name, shape in stored.shapes.items()}
    differing = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if differing:
        name = differing[0]
        raise UserError(
            f"{file} does not hold the distilled network: {name} is {found.get(name, 'missing')} there and "
            f"{expected.get(name, 'none of its tensors')} here ({len(differing)} differ); give what "
            "benchmarks.mini_distill wrote."
        )
    tensors = {name: stored.read(name).float() for name in expected}
    damaged = [name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())]
    if damaged:
        raise UserError(f"{file} holds NaN or infinity in {damaged[0]}; distil it again, or take another copy.")
    net.load_state_dict(tensors)
    return net
