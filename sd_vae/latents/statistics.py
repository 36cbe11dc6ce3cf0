"""What the latents of a store are like, and how sure that is: the scale that a diffusion model needs, what is dead.

Everything is of z ~ q(z|x) over the store's pictures, every latent cell counted once, without sampling: E[z z^T] is
mean mean^T plus the posterior's variance. Cells of one picture resemble each other, so a picture is what counts as one
observation: with all its cells, crops and mirror images it adds one vector of sums, and each figure is a smooth
function of the mean of these vectors. Its interval follows from their covariance by the delta method (a ratio estimator
over clusters). Cells treated as independent would give intervals many times too narrow.

One pass in float64; sums merge by Chan's formula, so the parts may come in any order and from any number of processes.

Source: Chan, Golub and LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing Sample Variances", 1979, eq.
2.1; Cochran, "Sampling Techniques", 1977, section 6.5 for ratios over clusters; Burda, Grosse and Salakhutdinov,
arXiv 1509.00519, section 4.2 for active units.

Shapes: P pictures, K sums a picture, C latent channels, h w latent cells.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from sd_vae.errors import UserError
from sd_vae.latents.format import REJECTS, Content
from sd_vae.latents.reader import ShardReader
from sd_vae.latents.records import ShardRecord
from sd_vae.latents.store import LatentStore

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "ACTIVE_VARIANCE",
    "ChannelStatistics",
    "Estimate",
    "LatentStatistics",
    "PictureSums",
    "measure",
    "summarize",
]

ACTIVE_VARIANCE = 0.01
"""A channel is active where its posterior mean varies by more than this (variance, raw z): Burda et al."""


class Estimate(NamedTuple):
    """A figure and the interval that holds the true one with the stated confidence."""

    value: float
    """The estimate."""
    low: float
    """Lower end; minus infinity, or 0 for what cannot be negative, where the pictures are too few to tell."""
    high: float
    """Upper end; infinity where the pictures are too few to tell."""
    n: int
    """Pictures that it rests on."""


@dataclass(frozen=True, kw_only=True)
class ChannelStatistics:
    """One latent channel, raw z."""

    mean: Estimate
    """Mean of z."""
    std: Estimate
    """Standard deviation of z around it, the posterior's own variance included where the store holds it."""
    mean_variance: Estimate | None
    """Variance of the posterior's mean over cells and pictures; None for a store of samples."""
    is_active: bool | None
    """Whether that is above `ACTIVE_VARIANCE`."""
    kl: Estimate | None
    """KL to N(0, I) in nats a latent element; None unless the store holds moments."""


@dataclass(frozen=True, kw_only=True)
class LatentStatistics:
    """A store's latents in figures."""

    content: Content
    """What the store holds: the statistics of `mode` are those of the means, without the posterior's own variance."""
    confidence: float
    """Probability with which an interval holds the true figure."""
    num_pictures: int
    """Source records, the independent observations."""
    num_items: int
    """Latents, with further crops and mirror images."""
    num_cells: int
    """Latent cells of all of them."""
    channels: tuple[ChannelStatistics, ...]
    """Each channel's own."""
    covariance: tuple[tuple[Estimate, ...], ...]
    """Covariance of z between channels, C x C."""
    kl: Estimate | None
    """KL in nats a latent element, mean over channels."""
    num_active: int | None
    """Active channels."""
    scaling_factor: Estimate
    """1 / standard deviation over all channels around `shift_factor`: gives the latents unit variance."""
    shift_factor: Estimate
    """Mean over all channels."""

    @property
    def latents_mean(self) -> tuple[float, ...]:
        """Mean of each channel, as a VAE's config takes it."""
        return tuple(channel.mean.value for channel in self.channels)

    @property
    def latents_std(self) -> tuple[float, ...]:
        """Standard deviation of each channel, as a VAE's config takes it; goes with a scaling factor of 1."""
        return tuple(channel.std.value for channel in self.channels)


class PictureSums:
    """Number, mean and scatter of the vectors of sums that pictures add, in float64.

    Args:
        num_sums: K.
    """

    def __init__(self, num_sums: int) -> None:
        self.num_pictures = 0
        self.mean = torch.zeros(num_sums, dtype=torch.float64)  # (K,)
        self.scatter = torch.zeros(num_sums, num_sums, dtype=torch.float64)  # sum of outer products around the mean

    @classmethod
    def of(cls, sums: Tensor) -> PictureSums:
        """Return those of some pictures, (P, K)."""
        found = cls(sums.shape[1])
        if len(sums):
            found.num_pictures = len(sums)
            found.mean = sums.mean(dim=0)
            centred = sums - found.mean
            found.scatter = centred.T @ centred
        return found

    def merge_(self, other: PictureSums) -> None:
        """Take in the pictures of another."""
        total = self.num_pictures + other.num_pictures
        if not total:
            return
        step = other.mean - self.mean
        self.scatter += other.scatter + torch.outer(step, step) * (self.num_pictures * other.num_pictures / total)
        self.mean += step * (other.num_pictures / total)
        self.num_pictures = total


def measure(
    folder: Path | str, *, confidence: float = 0.95, progress: Callable[[ShardRecord], None] | None = None
) -> LatentStatistics:
    """Return the statistics of a finished store, in one pass over it.

    Args:
        folder: The store.
        confidence: Probability with which each interval holds the true figure.
        progress: Called with each shard's record when it was read.

    Raises:
        UserError: No finished store, an empty one, a damaged shard, or a confidence outside (0, 1).
    """
    if not 0 < confidence < 1:
        raise UserError(f"confidence is {confidence}, it must be above 0 and below 1.")
    store = LatentStore.open(Path(folder))
    manifest = store.manifest()
    if not manifest.num_items:
        raise UserError(f"{folder} holds no latents to measure; see {REJECTS} for why.")
    content, channels = store.description.content, store.description.vae.latent_channels
    sums = PictureSums(_num_sums(channels))
    for record in manifest.shards:
        sums.merge_(PictureSums.of(_sums_of_shard(store.reader(record), content, channels)))
        if progress is not None:
            progress(record)
    return summarize(sums, content, num_channels=channels, num_items=manifest.num_items, confidence=confidence)


def summarize(
    sums: PictureSums, content: Content, *, num_channels: int, num_items: int, confidence: float = 0.95
) -> LatentStatistics:
    """Return the statistics that follow from the sums of pictures.

    Args:
        sums: Of all pictures, at least one.
        content: What their latents were taken from.
        num_channels: C.
        num_items: Latents that are in the sums.
        confidence: Probability with which each interval holds the true figure.
    """
    estimator = _Estimator(sums, num_channels, confidence)
    means, variances = estimator.symmetric("mean"), estimator.power("variance", 1.0)
    stds = estimator.power("variance", 0.5)
    spreads = None if content == "sample" else estimator.power("mean_variance", 1.0)
    kls = estimator.symmetric("kl") if content == "moments" else None
    covariances = estimator.symmetric("covariance")
    rows = [covariances[start : start + num_channels] for start in range(0, num_channels**2, num_channels)]
    covariance = tuple(
        tuple(variances[row] if row == column else cell for column, cell in enumerate(cells))
        for row, cells in enumerate(rows)
    )
    channels = tuple(
        ChannelStatistics(
            mean=means[index],
            std=stds[index],
            mean_variance=spreads[index] if spreads else None,
            is_active=spreads[index].value > ACTIVE_VARIANCE if spreads else None,
            kl=kls[index] if kls else None,
        )
        for index in range(num_channels)
    )
    return LatentStatistics(
        content=content,
        confidence=confidence,
        num_pictures=sums.num_pictures,
        num_items=num_items,
        num_cells=round(float(sums.mean[0]) * sums.num_pictures),
        channels=channels,
        covariance=covariance,
        kl=estimator.symmetric("pooled_kl")[0] if kls else None,
        num_active=sum(bool(channel.is_active) for channel in channels) if spreads else None,
        scaling_factor=estimator.power("pooled_variance", -0.5)[0],
        shift_factor=estimator.symmetric("pooled_mean")[0],
    )


def _num_sums(channels: int) -> int:
    return 1 + channels + channels**2 + channels + channels


def _sums_of_shard(reader: ShardReader, content: Content, channels: int) -> Tensor:
    """What each source record of a shard adds, (P, K): the sums of all its latents."""
    empty = torch.zeros(_num_sums(channels), dtype=torch.float64)
    totals: dict[int, Tensor] = {}
    for row, position in enumerate(reader.table["position"].to_pylist()):
        totals[position] = totals.get(position, empty) + _sums_of_latent(reader.latents(row), content)
    return torch.stack([*totals.values()]) if totals else empty.expand(0, -1)


def _sums_of_latent(stored: tuple[Tensor, ...], content: Content) -> Tensor:
    """Cells, sums of z, z z^T, the posterior mean's square and the KL, the last three by channel, (K,)."""
    mean = stored[0].double().flatten(1)  # (C, cells)
    square = mean @ mean.T
    sums = [mean.new_tensor([mean.shape[1]]), mean.sum(dim=1), square.flatten(), square.diagonal()]
    if content != "moments":
        return torch.cat([*sums, torch.zeros(len(mean), dtype=mean.dtype)])
    logvar = stored[1].double().flatten(1)
    var = logvar.exp()
    sums[2] = (square + var.sum(dim=1).diag()).flatten()
    return torch.cat([*sums, 0.5 * (mean.square() + var - 1.0 - logvar).sum(dim=1)])


def _figures(mean_sums: Tensor, channels: int) -> dict[str, Tensor]:
    """All figures as smooth functions of the mean vector of sums."""
    cells, *rest = mean_sums.split([1, channels, channels**2, channels, channels])
    mean, second, mean_square, kl = (part / cells for part in rest)
    second = second.view(channels, channels)
    covariance = second - torch.outer(mean, mean)
    pooled_mean = mean.mean()
    return {
        "mean": mean,
        "covariance": covariance.flatten(),
        "variance": covariance.diagonal(),
        "mean_variance": mean_square - mean.square(),
        "kl": kl,
        "pooled_mean": pooled_mean[None],
        "pooled_variance": (second.diagonal().mean() - pooled_mean.square())[None],
        "pooled_kl": kl.mean()[None],
    }


class _Estimator:
    """Figures with intervals, from the sums of pictures."""

    def __init__(self, sums: PictureSums, channels: int, confidence: float) -> None:
        from scipy import stats

        self.n = sums.num_pictures
        self._values = _figures(sums.mean, channels)
        gradients = torch.func.jacrev(lambda mean: _figures(mean, channels))(sums.mean)
        degrees = max(self.n - 1, 1)
        of_mean = sums.scatter / (degrees * self.n)  # covariance of the mean vector
        errors = {name: ((rows @ of_mean) * rows).sum(dim=1).clamp(min=0).sqrt() for name, rows in gradients.items()}
        reach = float(stats.t.ppf(0.5 + confidence / 2, degrees))
        self._reaches = {
            name: (error * reach).tolist() if self.n > 1 else [math.inf] * len(error)  # one tells nothing of others
            for name, error in errors.items()
        }

    def symmetric(self, name: str) -> list[Estimate]:
        """A figure with an interval around it."""
        return [
            Estimate(value, value - reach, value + reach, self.n)
            for value, reach in zip(self._values[name].tolist(), self._reaches[name], strict=True)
        ]

    def power(self, name: str, exponent: float) -> list[Estimate]:
        """A power of a variance, with an interval that is symmetric in its logarithm and so never negative."""
        return [
            self._raise_to(value, reach, exponent)
            for value, reach in zip(self._values[name].tolist(), self._reaches[name], strict=True)
        ]

    def _raise_to(self, variance: float, reach: float, exponent: float) -> Estimate:
        if variance <= 0:  # a constant channel, up to rounding
            return Estimate(0.0 if exponent > 0 else math.inf, 0.0, math.inf, self.n)
        value, width = variance**exponent, abs(exponent) * reach / variance
        ratio = math.exp(width) if width < 700 else math.inf  # e^710 is beyond float64
        return Estimate(value, value / ratio, value * ratio, self.n)
