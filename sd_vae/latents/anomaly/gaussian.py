"""How far a vector lies from what is normal: a Gaussian with shrunken correlations, fitted to sums over pictures.

Few pictures do not fix D(D+1)/2 covariances: their sample covariance has directions of almost no variance, in which
every new picture looks far away. Features are therefore scaled to unit variance and their correlations shrunk towards
none, by as much as is optimal for Gaussian vectors (OAS). Cells of one picture resemble each other, so a picture counts
as one observation, however many cells it adds.

Source: Chen, Wiesel, Eldar and Hero, "Shrinkage Algorithms for MMSE Covariance Estimation", arXiv 0907.4698, eq. 23.

Shapes: N vectors, D features.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from sd_vae.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from sd_vae.latents.statistics import PictureSums

__all__ = ["Gaussian"]

LEAST_STD = 1e-6
"""A feature that varies less than this in normal pictures counts as varying by this, so that distances stay finite."""


@dataclass(frozen=True)
class Gaussian:
    """A normal distribution, as what centres and whitens its vectors."""

    mean: Tensor
    """(D,)."""
    whitener: Tensor
    """(D, D); (vector - mean) @ whitener has unit covariance."""

    @classmethod
    def fit(cls, sums: PictureSums, *, num_observations: int | None = None) -> Gaussian:
        """Return the Gaussian of vectors whose number, mean and scatter are given.

        Args:
            sums: Of the vectors, as rows of `PictureSums.of`.
            num_observations: How many of them are independent; all of them by default.

        Raises:
            UserError: There are fewer than two independent vectors.
        """
        count = sums.num_pictures if num_observations is None else num_observations
        if count < 2:
            raise UserError(f"{count} normal pictures do not show how normal pictures vary; give at least 2.")
        covariance = sums.scatter / (sums.num_pictures - 1)
        std = covariance.diagonal().sqrt().clamp_min(LEAST_STD)
        correlation = covariance / torch.outer(std, std)
        shrunk = _shrink(correlation, count)
        lower = torch.linalg.cholesky(torch.linalg.inv(shrunk))
        return cls(sums.mean.float(), (lower / std[:, None]).float().contiguous())

    def distance(self, vectors: Tensor) -> Tensor:
        """Return the squared Mahalanobis distance over D, (N,), about 1 for normal vectors (N, D)."""
        return ((vectors.float() - self.mean) @ self.whitener).square().mean(dim=1)

    def to_tensors(self, name: str) -> dict[str, Tensor]:
        """Return what a file keeps, under `NAME.mean` and `NAME.whitener`."""
        return {f"{name}.mean": self.mean, f"{name}.whitener": self.whitener}

    @classmethod
    def from_tensors(cls, name: str, tensors: Mapping[str, Tensor]) -> Gaussian:
        """Return the Gaussian that `to_tensors` gave."""
        return cls(tensors[f"{name}.mean"], tensors[f"{name}.whitener"])


def _shrink(correlation: Tensor, count: int) -> Tensor:
    """Correlations (D, D) of `count` vectors, all but the diagonal drawn towards 0, in float64."""
    size = len(correlation)
    square, trace = correlation.square().sum(), correlation.trace()
    spread = float(square - trace.square() / size)
    enough = float((1 - 2 / size) * square + trace.square())
    weight = min(1.0, enough / ((count + 1 - 2 / size) * spread)) if spread > 0 else 1.0
    shrunk = (1 - weight) * correlation
    shrunk.diagonal().copy_(torch.ones(size, dtype=shrunk.dtype))
    return shrunk
