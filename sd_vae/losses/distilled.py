"""A perceptual distance of our own: a small network that was taught what LPIPS says, in a file that ships.

LPIPS' backbones cannot be fetched on an offline machine, and the usual one is expensive. This network has the form
of LPIPS (features of both images, scaled to unit length, squared differences weighted by channel). Its first two layers
are AlexNet's, which say most of what LPIPS says; the third stands for the other three and was taught. It agrees with
LPIPS where it was taught to, and is never reported as LPIPS. `docs/mini.md` says how it is made.

Shapes: B batch, D feature channels, h w cells of a feature map.

Source: the form is that of Zhang et al., arXiv 1801.03924, the first layers those of torchvision's AlexNet
(BSD-3-Clause); the third layer and the teaching are ours.
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

WIDTHS = (64, 192, 96)
"""Channels of each feature map."""
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
MIN_SIZE = 31
"""Pixels below which the last map is empty."""
FILE_NAME = "distilled.safetensors"
"""What the weights are called in the package."""
SOFTNESS = 1e-3
"""Added to squared lengths: features of flat areas are not blown up, and gradients stay bounded."""


class FeatureNet(nn.Module):
    """Feature maps of an image at three scales, and how much each of their channels counts."""

    def __init__(self) -> None:
        super().__init__()
        first, second, third = WIDTHS
        self.first = nn.Conv2d(3, first, 11, stride=4, padding=2)
        self.second = nn.Conv2d(first, second, 5, padding=2)
        self.third = nn.ModuleList((nn.Conv2d(second, third, 3, padding=1), nn.Conv2d(third, third, 3, padding=1)))
        self.heads = nn.ParameterList(nn.Parameter(torch.full((width,), -2.0)) for width in WIDTHS)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return the maps (B, D, h, w) of images (B, 3, H, W) in [-1, 1], each cell of length below 1 over D."""
        mean, std = (x.new_tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
        h = ((x + 1) / 2 - mean) / std
        h = self.first(h.contiguous(memory_format=torch.channels_last)).relu()
        maps = [h]
        h = self.second(F.max_pool2d(h, 3, 2)).relu()
        maps.append(h)
        h = F.max_pool2d(h, 3, 2)
        for conv in self.third:
            h = conv(h).relu()
        return [each * torch.rsqrt(each.square().sum(dim=1, keepdim=True) + SOFTNESS) for each in [*maps, h]]

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
