"""The diagonal Gaussian q(z|x) that an encoder returns.

Source: Kingma and Welling, "Auto-Encoding Variational Bayes", arXiv 1312.6114, appendix B and C. The class extends
diffusers' `DiagonalGaussianDistribution`, because pipelines ask for that type, and mends what its `kl` and `nll` break:
results keep the batch's shape and the parameters' device also when the posterior is deterministic.

Shapes: B batch, C latent channels, h w latent cells.
"""

import math
from collections.abc import Sequence
from typing import cast

import torch

from sd_vae._diffusers import DiagonalGaussianDistribution
from sd_vae.errors import UserError

__all__ = ["LOGVAR_MAX", "LOGVAR_MIN", "DiagonalGaussian"]

LOGVAR_MIN, LOGVAR_MAX = -30.0, 20.0
"""Bounds of the log-variance: exp stays finite in fp32, and Stable Diffusion was trained with them."""


class DiagonalGaussian(DiagonalGaussianDistribution):
    """q(z|x) = N(mean, diag(std^2)) over raw latents z, built from an encoder's moments.

    Args:
        parameters: Moments (B, 2C, h, w) = cat(mean, logvar); logvar is clamped to [-30, 20].
        deterministic: Collapse to the mean: std and var are 0, `sample` returns the mean, `kl` and `nll` are 0.
    """

    mean: torch.Tensor  # (B, C, h, w)
    logvar: torch.Tensor
    std: torch.Tensor
    var: torch.Tensor

    def __init__(self, parameters: torch.Tensor, deterministic: bool = False) -> None:
        self.parameters = parameters
        self.deterministic = deterministic
        mean, logvar = parameters.chunk(2, dim=1)
        self.mean, self.logvar = mean, logvar.clamp(LOGVAR_MIN, LOGVAR_MAX)
        if deterministic:
            self.std = self.var = torch.zeros_like(self.mean)
        else:
            self.std = torch.exp(0.5 * self.logvar)
            self.var = torch.exp(self.logvar)

    def sample(
        self,
        generator: torch.Generator | list[torch.Generator] | None = None,
        *,
        noise: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return z = mean + std * eps with eps ~ N(0, I), differentiable in mean and std.

        Args:
            generator: Source of eps, one for the batch or one per item.
            noise: eps itself, (B, C, h, w); then `generator` is not used.

        Returns:
            Raw latents z (B, C, h, w), dtype and device of the moments.

        Raises:
            UserError: `noise` has another shape than z.
        """
        if noise is None:
            return cast("torch.Tensor", super().sample(generator))
        if noise.shape != self.mean.shape:
            raise UserError(
                f"noise has shape {tuple(noise.shape)}, z has {tuple(self.mean.shape)}; draw one per latent."
            )
        return self.mean + self.std * noise.to(self.mean)

    def mode(self) -> torch.Tensor:
        """Return the most likely z, which is the mean, (B, C, h, w)."""
        return self.mean

    def kl_map(self, other: "DiagonalGaussianDistribution | None" = None) -> torch.Tensor:
        """Return KL(self || other) per latent element in nats, (B, C, h, w); `other` defaults to N(0, I).

        KL to N(0, I) is 1/2 (mean^2 + var - 1 - logvar). Computed in fp32 at least: in fp16 var and any sum overflow.
        """
        mean, logvar = _wide(self.mean), _wide(self.logvar)
        if self.deterministic:
            return torch.zeros_like(mean)
        if other is None:
            return 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar)
        distance = (mean - _wide(other.mean)).square() + logvar.exp()
        return 0.5 * (distance / _wide(other.var) - 1.0 - logvar + _wide(other.logvar))

    def kl(self, other: "DiagonalGaussianDistribution | None" = None) -> torch.Tensor:
        """Return KL(self || other) in nats, summed over C, h, w, one value per item (B,)."""
        return self.kl_map(other).sum(dim=(1, 2, 3))

    def nll(self, sample: torch.Tensor, dims: Sequence[int] = (1, 2, 3)) -> torch.Tensor:
        """Return -log q(sample) in nats, 1/2 (log 2 pi + logvar + (sample - mean)^2 / var) summed over `dims`.

        Args:
            sample: z (B, C, h, w).
            dims: Dimensions to sum over; the default leaves one value per item (B,).
        """
        mean, logvar = _wide(self.mean), _wide(self.logvar)
        if self.deterministic:
            return torch.zeros_like(mean).sum(dim=tuple(dims))
        square = (_wide(sample) - mean).square()
        return 0.5 * (math.log(2.0 * math.pi) + logvar + square / logvar.exp()).sum(dim=tuple(dims))


def _wide(values: torch.Tensor) -> torch.Tensor:
    """`values` in fp32, or in fp64 where they are."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
