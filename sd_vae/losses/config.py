"""The training objective as data: which terms, their weights, and by which reduction a weight is meant.

total = reconstruction + perceptual.weight * perceptual + kl.weight * kl + adversarial.weight * adversarial, every term
a mean over the batch; with a learned log-variance s the first two become exp(-s) * (...) + s. A term for tiles may come
to these.
"""

import math
from dataclasses import dataclass, field
from typing import Literal

from sd_vae.errors import UserError
from sd_vae.validation import STRICT

__all__ = ["AdversarialConfig", "EquivarianceConfig", "KLConfig", "LossConfig", "PerceptualConfig", "TilingConfig"]


@dataclass(frozen=True, kw_only=True)
class PerceptualConfig:
    """The perceptual term, a mean over images."""

    __pydantic_config__ = STRICT

    net: Literal["vgg", "alex", "squeeze", "distilled", "auto", "ms_dssim"] = "auto"
    """LPIPS v0.1 on that network (published SD recipes use vgg); distilled, a small network of this project that was
    taught by LPIPS; or ms_dssim, structural dissimilarity over three scales, which needs no weights. auto is vgg, or
    distilled with a warning where vgg's weights cannot be had; the run folder says which it was."""
    weight: float = 1.0
    """Factor beside the mean pixel term: 1 is Stable Diffusion's, 0.1 that of ft-MSE; 0 builds no network."""
    backbone: str | None = None
    """File with the torchvision weights of that network, .pth or .safetensors, whole or features only; by default the
    one in the torch hub cache, downloaded if it is not there. For distilled, the file of `benchmarks.mini_distill`; by
    default the one that ships."""

    def __post_init__(self) -> None:
        """Check the rules.

        Raises:
            UserError: Lists every rule that is broken, with its values.
        """
        problems = _weight_problems("perceptual.weight", self.weight)
        if str(self.net) == "ms_ssim":
            problems.append("perceptual.net is ms_ssim, which is the name of a metric; this loss is called ms_dssim")
        if self.net == "ms_dssim" and self.backbone is not None:
            problems.append(
                f"perceptual.backbone is {self.backbone!r} but perceptual.net is ms_dssim, which has no network; "
                "leave the backbone out, or choose vgg, alex, squeeze or distilled"
            )
        if self.backbone and self.net == "auto":
            problems.append(
                f"perceptual.backbone is {self.backbone!r} but perceptual.net is auto; say whose weights they are"
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
    latent diffusion's, and beside a learned log-variance the weight is the beta of a beta-VAE."""
    warmup_steps: int = 0
    """Optimizer steps over which the weight rises linearly from 0, so that the latent is in use before it costs."""
    cycle_steps: int = 0
    """Period of a cyclical weight: from 0 to full in the first half, full in the second, and anew; 0 has no cycles.
    Source: Fu et al., arXiv 1903.10145."""
    free_bits: float = 0.0
    """Nats per latent element that each channel of each image may cost for nothing. Source: Kingma et al., arXiv
    1606.04934, eq. 15."""

    def __post_init__(self) -> None:
        """Check the rules.

        Raises:
            UserError: Lists every rule that is broken, with its values.
        """
        problems = _weight_problems("kl.weight", self.weight) + _weight_problems("kl.free_bits", self.free_bits)
        problems += _count_problems(self, "kl", "warmup_steps", "cycle_steps", least=0)
        if self.warmup_steps and self.cycle_steps:
            problems.append(
                f"kl.warmup_steps is {self.warmup_steps} and kl.cycle_steps {self.cycle_steps}, a cycle has its own "
                "warm-up; set one of them to 0"
            )
        _raise_for(problems)


@dataclass(frozen=True, kw_only=True)
class AdversarialConfig:
    """The adversarial term and its discriminator, which trains beside the autoencoder.

    Source of the defaults: CompVis/latent-diffusion@main:models/first_stage_models/kl-f8/config.yaml.
    """

    __pydantic_config__ = STRICT

    weight: float = 0.0
    """Factor of the term, times the adaptive one; 0.5 is latent diffusion's, 0 builds no discriminator."""
    loss: Literal["hinge", "vanilla"] = "hinge"
    """The discriminator's loss; the generator's is minus the mean logit for both."""
    adaptive: bool = True
    """Scale the term so that it pulls at the decoder's last layer as hard as pixel and perceptual term do together."""
    max_adaptive: float = 1e4
    """Upper bound of the adaptive factor for losses that are sums over an image, as it is published."""
    start_step: int = 0
    """Optimizer step from which on both sides of the game are played; 50001 in latent diffusion."""
    warmup_steps: int = 0
    """Optimizer steps from there over which the weight rises; the discriminator learns at full rate meanwhile."""
    norm: Literal["group", "spectral", "batch"] = "group"
    """The discriminator's normalisation; `batch`, with fixed statistics, only for `pretrained` weights that have it."""
    width: int = 64
    """Channels of the discriminator's first layer."""
    num_layers: int = 3
    """Convolutions of the discriminator that halve; 3 judge patches of 70x70 pixels."""
    lecam_weight: float = 0.0
    """Factor of LeCam regularisation in the discriminator's loss, for few pictures; published values are 0.01 to 1."""
    lecam_decay: float = 0.99
    """Decay of its running means over optimizer steps."""
    pretrained: str | None = None
    """Latent-diffusion checkpoint whose `loss.discriminator` to start from."""

    def __post_init__(self) -> None:
        """Check the rules.

        Raises:
            UserError: Lists every rule that is broken, with its values.
        """
        problems = []
        for name in ("weight", "max_adaptive", "lecam_weight"):
            problems += _weight_problems(f"adversarial.{name}", getattr(self, name))
        problems += _count_problems(self, "adversarial", "start_step", "warmup_steps", least=0)
        problems += _count_problems(self, "adversarial", "width", "num_layers", least=1)
        if not 0 <= self.lecam_decay < 1:
            problems.append(f"adversarial.lecam_decay is {self.lecam_decay}, it must be in [0, 1)")
        if self.norm == "batch" and self.pretrained is None:
            problems.append(
                "adversarial.norm is batch, whose statistics come from pretrained weights alone; "
                "set adversarial.pretrained, or choose group or spectral"
            )
        _raise_for(problems)


@dataclass(frozen=True, kw_only=True)
class EquivarianceConfig:
    """Turned and scaled latents that must decode to turned and scaled pictures, which makes diffusion on them easier.

    Source: Kouzelis et al., "EQ-VAE", arXiv 2502.09509; zelaki/eqvae@386becd:ldm/models/autoencoder.py.
    """

    __pydantic_config__ = STRICT

    probability: float = 0.0
    """Share of steps whose latents are turned by 90, 180 or 270 degrees and scaled; 0.5 is EQ-VAE's, 0 is off."""
    small_probability: float = 0.25
    """Share of the other steps that see the pictures scaled before encoding, so that small pictures stay good."""
    min_scale: float = 0.25
    """Smallest scale; it is uniform from here to below 1, in whole latent cells."""

    def __post_init__(self) -> None:
        """Check the rules.

        Raises:
            UserError: Lists every rule that is broken, with its values.
        """
        problems = [
            f"equivariance.{name} is {getattr(self, name)}, it must be in [0, 1]"
            for name in ("probability", "small_probability")
            if not 0 <= getattr(self, name) <= 1
        ]
        if not 0 < self.min_scale <= 1:
            problems.append(f"equivariance.min_scale is {self.min_scale}, it must be in (0, 1]")
        _raise_for(problems)


@dataclass(frozen=True, kw_only=True)
class TilingConfig:
    """A decoder that gives a tile of the latent what it gives the whole, for tools that decode in blended tiles."""

    __pydantic_config__ = STRICT

    weight: float = 0.0
    """Factor of the mean squared difference between a tile decoded by itself and the same part of the whole; every step
    then decodes a tile too. 0 is off."""
    min_scale: float = 0.5
    """Smallest side of a tile as a share of the crop's; it is uniform from here to below 1, in whole latent cells."""
    margin: int = 2
    """Latent cells at each edge of a tile that are not compared: what is beyond the edge decides them too."""

    def __post_init__(self) -> None:
        """Check the rules.

        Raises:
            UserError: Lists every rule that is broken, with its values.
        """
        problems = _weight_problems("tiling.weight", self.weight) + _count_problems(self, "tiling", "margin", least=0)
        if not 0 < self.min_scale < 1:
            problems.append(f"tiling.min_scale is {self.min_scale}, it must be in (0, 1)")
        _raise_for(problems)


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """The training objective."""

    __pydantic_config__ = STRICT

    reconstruction: Literal["l2", "l1"] = "l2"
    """Pixel term, a mean over all elements with weight 1: squared or absolute difference in the range [-1, 1]."""
    learn_logvar: bool = False
    """Learn the log-variance of the output, which sets the scale of pixel and perceptual term against KL."""
    perceptual: PerceptualConfig = field(default_factory=PerceptualConfig)
    """The perceptual term."""
    kl: KLConfig = field(default_factory=KLConfig)
    """The KL term."""
    adversarial: AdversarialConfig = field(default_factory=AdversarialConfig)
    """The adversarial term."""
    equivariance: EquivarianceConfig = field(default_factory=EquivarianceConfig)
    """Turned and scaled latents."""
    tiling: TilingConfig = field(default_factory=TilingConfig)
    """Tiles that come out as the whole does."""


def _weight_problems(name: str, weight: float) -> list[str]:
    return [] if math.isfinite(weight) and weight >= 0 else [f"{name} is {weight}, it must be a finite number >= 0"]


def _count_problems(config: object, section: str, *names: str, least: int) -> list[str]:
    values = {name: getattr(config, name) for name in names}
    return [
        f"{section}.{name} is {value}, it must be at least {least}" for name, value in values.items() if value < least
    ]


def _raise_for(problems: list[str]) -> None:
    if problems:
        raise UserError("not a usable loss: " + "; ".join(problems) + ".")
