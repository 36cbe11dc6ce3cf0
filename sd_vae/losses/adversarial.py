"""The adversarial term: a discriminator of patches, the losses of both sides, and what keeps them in balance.

Nothing in the discriminator depends on the other pictures of a batch: several processes, or several small batches,
give what one large batch gives.

Shapes: B batch, D feature channels, H W pixels, p q cells of the map of logits.

Sources: Isola et al., "Image-to-Image Translation with Conditional Adversarial Networks", arXiv 1611.07004 (patches);
Esser, Rombach and Ommer, "Taming Transformers", arXiv 2012.09841, eq. 7 (adaptive weight);
CompVis/taming-transformers@d846404:taming/modules/discriminator/model.py and taming/modules/losses/vqperceptual.py
(layers and initialization, losses); Tseng et al., arXiv 2104.03310, eq. 4 (LeCam).
"""

import math
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from sd_vae.checkpoints.formats import open_weights
from sd_vae.errors import UserError
from sd_vae.losses.config import AdversarialConfig

__all__ = [
    "LeCam",
    "PatchDiscriminator",
    "adaptive_weight",
    "adversarial_weight_at",
    "build_discriminator",
    "discriminator_loss",
    "generator_loss",
]

ADAPTIVE_EPS = 1e-4
"""Added to the divisor of the adaptive weight, as published."""

MAX_GROUPS = 32
"""Groups of a GroupNorm at most; fewer where the width has no such divisor."""


class PatchDiscriminator(nn.Module):
    """Images (B, 3, H, W) to a map of logits (B, 1, p, q), one a patch: above 0 means "a photo".

    4x4 convolutions that halve, twice as wide each, then two that do not. Layers and their numbers are those of
    taming-transformers, so its weights fit (`norm="batch"`). It is always in eval mode, whatever `train()` is told:
    BatchNorm normalises by its stored statistics, and spectral norms are refreshed by `advance_` alone.

    Args:
        norm: `group`; `spectral` for spectrally normalised convolutions without another norm; `batch`, only for weights
            from elsewhere.
        width: D of the first layer.
        num_layers: Convolutions that halve.
    """

    def __init__(self, norm: Literal["group", "spectral", "batch"], width: int = 64, num_layers: int = 3) -> None:
        super().__init__()
        widths = [width * min(2**level, 8) for level in range(num_layers + 1)]
        layers: list[nn.Module] = [nn.Conv2d(3, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for level, (d_in, d_out) in enumerate(pairwise(widths), start=1):
            stride = 2 if level < num_layers else 1
            layers.append(nn.Conv2d(d_in, d_out, 4, stride=stride, padding=1, bias=norm != "batch"))
            if norm == "group":
                layers.append(nn.GroupNorm(math.gcd(MAX_GROUPS, d_out), d_out))
            elif norm == "batch":
                layers.append(nn.BatchNorm2d(d_out))
            layers.append(nn.LeakyReLU(0.2))
        layers.append(nn.Conv2d(widths[-1], 1, 4, stride=1, padding=1))
        for layer in layers:
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, 0.0, 0.02)
            if isinstance(layer, nn.Conv2d) and norm == "spectral":
                parametrizations.spectral_norm(layer)
        self.main = nn.Sequential(*layers)
        self.min_size = _min_size(num_layers)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (B, 1, p, q) of images (B, 3, H, W) around [-1, 1].

        Raises:
            UserError: H or W is so small that no patch is left.
        """
        self.require_size(*x.shape[-2:])
        return self.main(x)

    def require_size(self, height: int, width: int) -> None:
        """Check that images of this many pixels have a patch.

        Raises:
            UserError: One side is too small.
        """
        if min(height, width) < self.min_size:
            raise UserError(
                f"the discriminator needs images of at least {self.min_size}x{self.min_size} pixels, these are "
                f"{height}x{width}; train on larger crops or lower loss.adversarial.num_layers."
            )

    def train(self, mode: bool = True) -> "PatchDiscriminator":
        """Stay in eval mode: no statistics of a batch, and as many power iterations as steps."""
        del mode
        return super().train(False)

    @torch.no_grad()
    def advance_(self) -> None:
        """Refresh the spectral norms by one power iteration; once an optimizer step, however many batches it had."""
        for layer in self.main:
            if parametrize.is_parametrized(layer, "weight"):
                parametrized: Any = layer.parametrizations
                norm = parametrized.weight[0].train()
                norm(parametrized.weight.original)
                norm.eval()


def build_discriminator(config: AdversarialConfig) -> PatchDiscriminator:
    """Return the discriminator of a config, random or with its `pretrained` weights.

    Raises:
        UserError: The weights cannot be read, or are not those of this network; lists the tensors at fault.
    """
    discriminator = PatchDiscriminator(config.norm, config.width, config.num_layers)
    if config.pretrained is None:
        return discriminator
    stored = open_weights(Path(config.pretrained))
    found = {f"main.{name.rpartition('main.')[2]}": name for name in stored.shapes if "discriminator.main." in name}
    expected = {name: tuple(tensor.shape) for name, tensor in discriminator.state_dict().items()}
    problems = [f"{name} is missing" for name in expected if name not in found]
    problems += [f"{name} is unexpected" for name in found if name not in expected]
    problems += [
        f"{name} is {stored.shapes[theirs]} instead of {expected[name]}"
        for name, theirs in found.items()
        if name in expected and tuple(stored.shapes[theirs]) != expected[name]
    ]
    if problems:
        raise UserError(
            f"{config.pretrained} does not hold this discriminator ({len(problems)} problems, the first: "
            f"{problems[0]}); name a latent-diffusion checkpoint with its loss, or leave adversarial.pretrained out."
        )
    discriminator.load_state_dict({name: stored.read(theirs) for name, theirs in found.items()})
    return discriminator


def discriminator_loss(real: Tensor, fake: Tensor, kind: Literal["hinge", "vanilla"]) -> Tensor:
    """Return the discriminator's loss, half the mean over the logits of each side.

    hinge: max(0, 1 - real), max(0, 1 + fake). vanilla: log(1 + exp(-real)), log(1 + exp(fake)).

    Args:
        real: Logits of photos.
        fake: Logits of reconstructions.
        kind: hinge or vanilla.
    """
    if kind == "hinge":
        return 0.5 * (F.relu(1.0 - real).mean() + F.relu(1.0 + fake).mean())
    return 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())


def generator_loss(fake: Tensor) -> Tensor:
    """Return the generator's term, minus the mean logit of its reconstructions; the same for both kinds of loss."""
    return -fake.mean()


def adaptive_weight(fidelity: Tensor, adversarial: Tensor, num_image_elements: int, largest: float) -> Tensor:
    """Return the factor that makes both terms pull equally hard at the last layer, min(|a| / (|b| + 1e-4), bound).

    Beside a pixel *mean*, `fidelity` is 1/3HW of what it is in latent diffusion, whose losses are sums over an image;
    so is the weight, and so is its bound: it is published as 1e4 for sums.

    Args:
        fidelity: Gradient of pixel and perceptual term with respect to the last layer's weight, over the whole batch of
            all processes.
        adversarial: That of the adversarial term.
        num_image_elements: 3HW.
        largest: Upper bound in units of latent diffusion.

    Returns:
        A scalar without gradient.
    """
    ratio = fidelity.norm() / (adversarial.norm() + ADAPTIVE_EPS)
    return ratio.clamp(max=largest / num_image_elements).detach()


def adversarial_weight_at(config: AdversarialConfig, step: int) -> float:
    """Return the generator's weight after `step` optimizer steps: 0 up to the start, then rising linearly to full."""
    done = step - config.start_step
    if config.weight == 0 or done < 0:
        return 0.0
    return config.weight * min(1.0, (done + 1) / (config.warmup_steps + 1))


class LeCam(nn.Module):
    """LeCam regularisation: logits are pulled towards the running mean of the other side's, against overfitting.

    mean (real - mean_fake)^2 + mean (fake - mean_real)^2, which for a small gap bounds the LeCam divergence.

    Args:
        decay: Of the running means, in [0, 1).
    """

    mean_real: Tensor
    mean_fake: Tensor

    def __init__(self, decay: float) -> None:
        super().__init__()
        self.decay = decay
        self.register_buffer("mean_real", torch.zeros(()))
        self.register_buffer("mean_fake", torch.zeros(()))

    def forward(self, real: Tensor, fake: Tensor) -> Tensor:
        """Return the penalty of a batch's logits, a scalar."""
        return (real - self.mean_fake).square().mean() + (fake - self.mean_real).square().mean()

    @torch.no_grad()
    def advance_(self, real: Tensor, fake: Tensor) -> None:
        """Move the running means towards a step's mean logits, those of all processes; once an optimizer step."""
        self.mean_real.lerp_(real.to(self.mean_real), 1.0 - self.decay)
        self.mean_fake.lerp_(fake.to(self.mean_fake), 1.0 - self.decay)


def _min_size(num_layers: int) -> int:
    """Pixels of a side that leave one logit: two 4x4 convolutions with padding 1 take one cell each."""
    return 3 * 2**num_layers
