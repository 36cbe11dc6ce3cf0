"""The training objective as data: which terms, their weights, and by which reduction a weight is meant.

total = reconstruction + perceptual.weight * perceptual + kl.weight * kl, every term a mean over the batch.
"""

import math
from dataclasses import dataclass, field
from typing import Literal

from sd_vae.errors import UserError
from sd_vae.validation import STRICT

__all__ = ["KLConfig", "LossConfig", "PerceptualConfig"]


@dataclass(frozen=True, kw_only=True)
class PerceptualConfig:
    """The perceptual term, a mean over images."""

    __pydantic_config__ = STRICT

    net: Literal["vgg", "alex", "squeeze", "ms_ssim"] = "vgg"
    """LPIPS v0.1 on that network (published SD recipes use vgg), or ms_ssim, which needs no downloaded weights."""
    weight: float = 1.0
    """Factor beside the mean pixel term: 1 is Stable Diffusion's, 0.1 that of ft-MSE; 0 builds no network."""
    backbone: str | None = None
    """File with the torchvision weights of that network, .pth or .safetensors, whole or features only; by default the
    one in the torch hub cache, downloaded if it is not there."""

    def __post_init__(self) -> None:
        """Check the rules.

        Raises:
            UserError: Lists every rule that is broken, with its values.
        """
        problems = _weight_problems("perceptual.weight", self.weight)
        if self.net == "ms_ssim" and self.backbone is not None:
            problems.append(
                f"perceptual.backbone is {self.backbone!r} but perceptual.net is ms_ssim, which has no network; "
                "leave the backbone out, or choose vgg, alex or squeeze"
            )
        if self.backbone == "":
            problems.append("perceptual.backbone is empty, name a file or leave it out")
        _raise_for(problems)


@dataclass(frozen=True, kw_only=True)
class KLConfig:
    """The KL term from the posterior to N(0, I), in nats.

    Latent diffusion's published loss is, for one image,
    `sum over 3HW of pixel term + 1e-6 * sum over the latent of KL`. Dividing it by 3HW gives the same minimum with a
    pixel *mean*; the KL term becomes `1e-6 * sum / 3HW`, which is convention `ldm` with weight 1e-6. At factor 8 and 4
    channels the latent has 3HW / 48 elements, so the same loss on the per-element *mean* has weight 1e-6 / 48 = 2.08e-8
    at every image size: the default. Beside a pixel mean, 1e-6 on the per-element mean is 48 times too strong, and 1e-6
    on the sum 786,432 times at 512x512.

    Source: CompVis/latent-diffusion@main:ldm/modules/losses/contperceptual.py.
    """

    __pydantic_config__ = STRICT

    weight: float = 2.08e-8
    """Factor beside the mean pixel term, in the units of `convention`; 0 only logs the term."""
    convention: Literal["mean", "ldm"] = "mean"
    """mean: per latent element. ldm: summed over the latent, divided by the image's 3HW elements; weight 1e-6 is then
    latent diffusion's."""

    def __post_init__(self) -> None:
        """Check the rules.

        Raises:
            UserError: The weight is negative or not finite.
        """
        _raise_for(_weight_problems("kl.weight", self.weight))


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """The training objective."""

    __pydantic_config__ = STRICT

    reconstruction: Literal["l2", "l1"] = "l2"
    """Pixel term, a mean over all elements with weight 1: squared or absolute difference in the range [-1, 1]."""
    perceptual: PerceptualConfig = field(default_factory=PerceptualConfig)
    """The perceptual term."""
    kl: KLConfig = field(default_factory=KLConfig)
    """The KL term."""


def _weight_problems(name: str, weight: float) -> list[str]:
    return [] if math.isfinite(weight) and weight >= 0 else [f"{name} is {weight}, it must be a finite number >= 0"]


def _raise_for(problems: list[str]) -> None:
    if problems:
        raise UserError("not a usable loss: " + "; ".join(problems) + ".")
