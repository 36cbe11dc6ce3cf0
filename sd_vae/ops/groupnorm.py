"""GroupNorm in two halves: statistics that are gathered piece by piece, and the scale and shift they come to.

A feature map that is held in bands has each band's statistics taken while it is still in the cache; merged, they are
the whole map's (Chan, Golub and LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing Sample Variances",
1979), to double precision, in whatever order and size the bands come.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Statistics", "scale_and_shift", "tensor_statistics"]


@dataclass(frozen=True)
class Statistics:
    """Count, mean and sum of squared differences from it of one or several pieces, by group: (pieces, groups), fp64."""

    count: Tensor
    mean: Tensor
    second: Tensor

    @classmethod
    def merged(cls, parts: "list[Statistics]") -> "Statistics":
        """All pieces as one."""
        count, mean, second = (
            torch.cat([getattr(part, name) for part in parts]) for name in ("count", "mean", "second")
        )
        total = count.sum(0, keepdim=True)
        centre = (count * mean).sum(0, keepdim=True) / total
        return cls(total, centre, (second + count * (mean - centre).square()).sum(0, keepdim=True))

    @classmethod
    def of_channels(cls, mean: Tensor, second: Tensor, num_pixels: int, num_groups: int) -> "Statistics":
        """From pieces of `num_pixels` with one mean and sum a channel, (pieces, C)."""
        shape = (len(mean), num_groups, -1)
        count = torch.full((len(mean), num_groups, mean.shape[1] // num_groups), float(num_pixels), dtype=torch.float64)
        centre = mean.view(shape).mean(-1)
        spread = (mean.view(shape) - centre[..., None]).square()
        return cls(count.sum(-1), centre, (second.view(shape) + num_pixels * spread).sum(-1))


def tensor_statistics(band: Tensor, num_groups: int) -> Statistics:
    """Return the statistics of a band (R, W, C) on any device; half precision is summed in fp32."""
    grouped = band.flatten(0, 1).unflatten(1, (num_groups, -1))  # (pixels, G, C/G)
    wide = grouped.to(torch.promote_types(band.dtype, torch.float32))
    variance, mean = torch.var_mean(wide, dim=(0, 2), correction=0)
    count = torch.full_like(mean, grouped.shape[0] * grouped.shape[2], dtype=torch.float64)
    return Statistics(count[None], mean.double()[None], variance.double()[None] * count)


def scale_and_shift(parts: list[Statistics], weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return what a GroupNorm over all parts multiplies and adds by channel, both (C,), fp32.

    scale = weight / sqrt(variance + eps), shift = bias - mean * scale; the variance is the biased one, as in PyTorch.
    """
    whole = Statistics.merged(parts)
    num_channels = weight.shape[0]
    spread = (whole.second / whole.count + eps).rsqrt()[0]
    scale = weight.double() * spread.repeat_interleave(num_channels // len(spread))
    shift = bias.double() - whole.mean[0].repeat_interleave(num_channels // len(spread)) * scale
    return scale.float(), shift.float()
