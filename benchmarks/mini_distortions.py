"""What is done to photos to teach and to judge a perceptual distance: kinds of damage, each with a strength.

Every function takes x (B, 3, H, W) in [-1, 1], a strength in [0, 1] and a generator, and returns as many images in the
same range. Strength 0 is hardly visible and 1 is plain to see; a distortion draws the rest itself.
"""

import io
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from sd_vae.images import to_pil, to_tensor

__all__ = ["DISTORTIONS", "distort"]

Distortion = Callable[[Tensor, float, torch.Generator], Tensor]


def blur(x: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """A Gaussian of standard deviation 0.4 to 4 pixels."""
    del generator
    sigma = 0.4 * 10**strength
    reach = int(3 * sigma) + 1
    taps = torch.exp(-torch.arange(-reach, reach + 1).square() / (2 * sigma**2)).to(x)
    kernel = (taps / taps.sum()).expand(3, 1, 1, -1)
    x = F.conv2d(F.pad(x, (reach, reach, 0, 0), "replicate"), kernel, groups=3)
    return F.conv2d(F.pad(x, (0, 0, reach, reach), "replicate"), kernel.transpose(2, 3), groups=3)


def noise(x: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Normal noise of 1 to 30% of the half range, equal in all colours or not, by pixel or by 2x2 pixels."""
    grain = 1 + _draw(2, generator)
    height, width = (-(-side // grain) for side in x.shape[-2:])
    eps = torch.randn(len(x), (1, 3)[_draw(2, generator)], height, width, generator=generator).to(x)
    eps = eps.repeat_interleave(grain, 2).repeat_interleave(grain, 3)[..., : x.shape[-2], : x.shape[-1]]
    return x + 0.01 * 30**strength * eps


def jpeg(x: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """JPEG of quality 90 down to 5."""
    del generator
    quality = round(90 - 85 * strength)
    coded = []
    for picture in x.split(1):
        file = io.BytesIO()
        to_pil(picture).save(file, format="jpeg", quality=quality)
        coded.append(to_tensor(Image.open(file)))
    return torch.cat(coded).to(x)


def colour(x: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """A gain and an offset for each colour."""
    gain, offset = torch.randn(2, len(x), 3, 1, 1, generator=generator).to(x) * 0.02 * 15**strength
    return x * (1 + gain) + offset


def contrast(x: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """A power of the brightness, up or down."""
    exponent = torch.exp(torch.randn(len(x), 1, 1, 1, generator=generator).to(x) * 0.03 * 15**strength)
    return 2 * ((x + 1) / 2).clamp(1e-4, 1).pow(exponent) - 1


def warp(x: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Smooth displacements of a fraction of a pixel up to several."""
    cells = 3 + _draw(8, generator)
    shift = torch.randn(len(x), 2, cells, cells, generator=generator).to(x) * 0.25 * 20**strength
    shift = F.interpolate(shift, size=x.shape[-2:], mode="bicubic", align_corners=True)
    identity = torch.eye(2, 3).expand(len(x), -1, -1).to(x)
    grid = F.affine_grid(identity, list(x.shape), align_corners=False)
    pixels = 2 / torch.tensor([x.shape[-1], x.shape[-2]]).to(x)
    return F.grid_sample(x, grid + shift.permute(0, 2, 3, 1) * pixels, padding_mode="reflection", align_corners=False)


def shrink(x: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Fewer pixels and back, by 1.2 to 6."""
    size = [max(4, round(side / (1.2 * 5**strength))) for side in x.shape[-2:]]
    mode = ("nearest", "bilinear", "bicubic")[_draw(3, generator)]
    return F.interpolate(F.interpolate(x, size=size, mode="area"), size=x.shape[-2:], mode=mode)


def posterize(x: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Fewer levels of each colour: 64 down to 3."""
    del generator
    levels = round(64 * (3 / 64) ** strength)
    return ((x + 1) / 2 * (levels - 1)).round() / (levels - 1) * 2 - 1


def ghost(x: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Another picture of the batch shining through."""
    del generator
    return torch.lerp(x, x.roll(1, dims=0), 0.02 * 20**strength)


DISTORTIONS: dict[str, Distortion] = {
    function.__name__: function for function in (blur, noise, jpeg, colour, contrast, warp, shrink, posterize, ghost)
}


def distort(x: Tensor, generator: torch.Generator) -> tuple[Tensor, str]:
    """Return images under one to three distortions, in all of the picture or in part of it, and what was done.

    Args:
        x: Images (B, 3, H, W) in [-1, 1].
        generator: What is drawn is a function of its state, on the CPU.
    """
    names = list(DISTORTIONS)
    chosen = [names[_draw(len(names), generator)] for _ in range((1, 1, 2, 3)[_draw(4, generator)])]
    y = x
    for name in chosen:
        strength = float(torch.rand((), generator=generator)) / len(chosen) ** 0.5
        y = DISTORTIONS[name](y, strength, generator).clamp(-1, 1)
    if _draw(4, generator) == 0:
        chosen.append("in part")
        place = F.interpolate(torch.randn(len(x), 1, 4, 4, generator=generator), size=x.shape[-2:], mode="bicubic")
        y = torch.lerp(x, y, (4 * place).sigmoid().to(x))
    return y, " + ".join(chosen)


def _draw(count: int, generator: torch.Generator) -> int:
    return int(np.floor(count * float(torch.rand((), generator=generator, dtype=torch.float64))))
