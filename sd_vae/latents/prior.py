"""Where new latents are drawn from: N(0, I), or a mixture of Gaussian fields fitted to a store.

The KL term pulls latents towards N(0, I), and at the weights that keep pictures sharp (1e-6) it does not bring them
there: neighbouring cells stay as alike as the photo's pixels are, and channels depend on each other. The fitted prior
has both. It is a Gaussian field that is stationary in space: all channels at all distances have the covariance that
they have in the store, and each picture has a mean of its own, drawn beside the field. A mixture of a few such fields,
one for each group of pictures that are alike in mean and texture, tells night from snow. What no such field has is an
object: phases are random, so colours and textures come out right and things do not.

The field is drawn on a torus large enough that no two cells of the picture meet around it (circulant embedding), so its
covariances are exact at every size. The spectrum is never negative, because covariances are divided by all cells
instead of by the pairs at each distance; those at a distance of half a picture come out at half strength along each
axis.

Source: Dietrich and Newsam, "Fast and exact simulation of stationary Gaussian processes through circulant embedding",
SIAM J. Sci. Comput. 18, 1997; Galerne, Gousseau and Morel, "Random phase textures", IEEE TIP 20, 2011.

Shapes: P pictures, C latent channels, h w latent cells, N a picture's side that windows are padded to.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch

from sd_vae.errors import UserError
from sd_vae.latents.dataset import LatentDataset
from sd_vae.latents.store import LatentStore

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["FieldPrior", "GaussianField", "NormalPrior", "Prior", "fit_prior"]

WINDOW = 64
"""Largest side, in cells, of what is correlated at once; larger latents are cut, which forgets larger distances."""

NUM_BANDS = 4
"""Octaves whose strength says which group a picture belongs to."""

NUM_STARTS = 10
"""Runs of k-means, of which the one that fits best is kept."""

LEAST_VARIANCE = 1e-6
"""Variance that an octave is taken to have at least, so that one without any has a logarithm."""

LEAST_PICTURES = 4
"""Pictures that a component needs: fewer say little of how pictures differ."""


class Prior(Protocol):
    """A distribution over raw latents of any size."""

    @property
    def num_channels(self) -> int:
        """C."""

    def draw(self, height: int, width: int, *, temperature: float = 1.0, generator: torch.Generator) -> Tensor:
        """Return one z (C, height, width), float32 on the CPU; `temperature` scales what departs from the mean."""


@dataclass(frozen=True)
class NormalPrior:
    """N(0, I): every number of z by itself."""

    num_channels: int
    """C."""

    def draw(self, height: int, width: int, *, temperature: float = 1.0, generator: torch.Generator) -> Tensor:
        """Return one z (C, height, width)."""
        return temperature * torch.randn(self.num_channels, height, width, generator=generator)


@dataclass(frozen=True, kw_only=True, eq=False)
class GaussianField:
    """A component: a mean for each picture, and a stationary field around it."""

    weight: float
    """Share of the pictures that it was fitted to."""
    num_pictures: int
    """How many they are."""
    mean: Tensor
    """Mean of the pictures' means (C,), float64."""
    mean_covariance: Tensor
    """Their covariance (C, C), float64."""
    covariance: Tensor
    """Of channel i in a cell with channel j at distance (dy, dx), around the picture's mean: (C, C, N, N), float64;
    distances wrap, so that [..., -1, 0] is dy = -1. 0 from the distance of a window's side on."""

    @property
    def std(self) -> Tensor:
        """Standard deviation of each channel (C,), picture means included."""
        return (self.covariance[..., 0, 0] + self.mean_covariance).diagonal().sqrt()

    def draw(self, height: int, width: int, *, temperature: float = 1.0, generator: torch.Generator) -> Tensor:
        """Return one z (C, height, width)."""
        channels = len(self.mean)
        shift = _root(self.mean_covariance) @ torch.randn(channels, generator=generator, dtype=torch.float64)
        root = self._root_on_torus(height, width)  # (rows, columns / 2 + 1, C, C)
        sides = (root.shape[0], 2 * (root.shape[1] - 1))
        noise = torch.fft.rfft2(torch.randn(channels, *sides, generator=generator, dtype=torch.float64))
        field = torch.fft.irfft2(torch.einsum("yxij,jyx->iyx", root, noise), s=sides)[:, :height, :width]
        return (self.mean[:, None, None] + temperature * (shift[:, None, None] + field)).float()

    @functools.lru_cache(maxsize=4)  # noqa: B019 - as many as sizes are drawn in turn, gone with the process
    def _root_on_torus(self, height: int, width: int) -> Tensor:
        """Root of the spectrum on a torus where cells of the picture meet one way only."""
        from scipy.fft import next_fast_len

        reach = self.covariance.shape[-1] // 2  # covariances are 0 from here on
        around = self.covariance
        for axis, side in ((-2, height), (-1, width)):
            # even, because `draw` tells the last side from half of the spectrum
            around = _rewrap(around, axis, 2 * next_fast_len(-(-max(side + reach, 2 * reach) // 2)), reach)
        # The spectrum of (i, j) is E[conj(X_i) X_j], its conjugate is the covariance E[X_i conj(X_j)].
        return _root(torch.fft.rfft2(around).conj().permute(2, 3, 0, 1))


@dataclass(frozen=True)
class FieldPrior:
    """A mixture of Gaussian fields."""

    components: tuple[GaussianField, ...]
    """The largest first; weights sum to 1."""

    @property
    def num_channels(self) -> int:
        """C."""
        return len(self.components[0].mean)

    def draw(self, height: int, width: int, *, temperature: float = 1.0, generator: torch.Generator) -> Tensor:
        """Return one z (C, height, width) of a component drawn by weight."""
        weights = torch.tensor([component.weight for component in self.components])
        chosen = int(torch.multinomial(weights, 1, generator=generator))
        return self.components[chosen].draw(height, width, temperature=temperature, generator=generator)


def fit_prior(
    folder: Path | str,
    *,
    num_components: int = 1,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> FieldPrior:
    """Return a mixture of Gaussian fields fitted to the items of a store, in two passes over it.

    Items are grouped by k-means over their mean, in standard deviations of z within an item, and the logarithms of
    their standard deviations in each octave. A group that comes out with fewer than 4 items is dissolved into the
    others.

    Args:
        folder: The store. Where it holds moments, the posterior's own variance is part of the field.
        num_components: Groups, at most.
        seed: Seed of k-means.
        progress: Called with the items read so far and their number, both passes counted.

    Raises:
        UserError: No finished store, fewer than 4 items a component, or a number of components below 1.
    """
    held = LatentStore.open(Path(folder)).description.content
    dataset = LatentDataset(folder, content=held, columns=())
    if num_components < 1:
        raise UserError(f"num_components is {num_components}, it must be at least 1.")
    if len(dataset) < LEAST_PICTURES * num_components:
        raise UserError(
            f"{folder} holds {len(dataset)} items, {num_components} components need at least "
            f"{LEAST_PICTURES * num_components}; encode more pictures or ask for fewer components."
        )
    num_channels = dataset.description.vae.latent_channels
    report = progress or (lambda done, total: None)
    passes = 1 + (num_components > 1)

    labels = [0] * len(dataset)
    if num_components > 1:
        traits = []
        for index in range(len(dataset)):
            traits.append(_traits(dataset.sample(index)[:num_channels].double()))
            report(index + 1, passes * len(dataset))
        labels = _group(torch.stack(traits), num_components, seed)

    sums = [_Sums(num_channels) for _ in range(max(labels) + 1)]
    for index, label in enumerate(labels):
        values = dataset.sample(index).double()
        var = values[num_channels:].exp() if held == "moments" else None
        sums[label].add_(values[:num_channels], var)
        report((passes - 1) * len(dataset) + index + 1, passes * len(dataset))
    fields = [one.field(len(dataset)) for one in sums]
    return FieldPrior(tuple(sorted(fields, key=lambda field: -field.weight)))


class _Sums:
    """What one component's items add up to."""

    def __init__(self, num_channels: int) -> None:
        self._means: list[Tensor] = []
        self._spectrum = torch.zeros(  # sum over windows of X X^H, (C, C, N, N / 2 + 1)
            num_channels, num_channels, 2 * WINDOW, WINDOW + 1, dtype=torch.complex128
        )
        self._own_variance = torch.zeros(num_channels, dtype=torch.float64)
        self._num_cells = 0

    def add_(self, mean: Tensor, var: Tensor | None) -> None:
        """Take in a posterior's mean (C, h, w), and its variance where it is known."""
        centre = mean.mean(dim=(1, 2))
        self._means.append(centre)
        self._num_cells += mean[0].numel()
        if var is not None:
            self._own_variance += var.sum(dim=(1, 2))
        for window in _windows(mean - centre[:, None, None]):
            waves = torch.fft.rfft2(window, s=(2 * WINDOW, 2 * WINDOW))
            self._spectrum += waves[:, None].conj() * waves[None, :]

    def field(self, num_items: int) -> GaussianField:
        """The component that they make, of a store of so many items."""
        means = torch.stack(self._means)
        covariance = torch.fft.irfft2(self._spectrum / self._num_cells, s=(2 * WINDOW, 2 * WINDOW))
        covariance[..., 0, 0] += (self._own_variance / self._num_cells).diag()
        return GaussianField(
            weight=len(means) / num_items,
            num_pictures=len(means),
            mean=means.mean(dim=0),
            mean_covariance=means.T.cov().reshape(2 * means.shape[1:]),
            covariance=covariance,
        )


def _windows(values: Tensor) -> list[Tensor]:
    """(C, h, w) cut into windows of about equal size."""
    height, width = values.shape[-2:]
    rows = values.tensor_split(-(-height // WINDOW), dim=1)
    return [window for row in rows for window in row.tensor_split(-(-width // WINDOW), dim=2)]


def _traits(z: Tensor) -> Tensor:
    """Mean of each channel, then the logarithm of its standard deviation in each octave: (1 + bands, C)."""
    from torch.nn.functional import avg_pool2d

    found, level = [z.mean(dim=(1, 2))], z
    for band in range(NUM_BANDS):
        spread = level.var(dim=(1, 2), correction=0)
        if band < NUM_BANDS - 1:  # the last octave is all that is coarser
            level = avg_pool2d(level, 2, ceil_mode=True)
            spread = spread - level.var(dim=(1, 2), correction=0)
        found.append(0.5 * spread.clamp(min=LEAST_VARIANCE).log())
    return torch.stack(found)


def _group(traits: Tensor, num_groups: int, seed: int) -> list[int]:
    """Number of each picture's group, from 0 without a gap; traits are (P, 1 + bands, C)."""
    from scipy.cluster.vq import kmeans2

    within = (2.0 * traits[:, 1:]).exp().sum(dim=1).mean().sqrt()  # one for all channels: a dead one has no scale
    points = torch.cat([traits[:, :1] / within, traits[:, 1:]], dim=1).flatten(1)
    num_groups = min(num_groups, len(points.unique(dim=0)))
    best, best_error = points[:0], float("inf")
    for start in range(NUM_STARTS):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # an empty group, which is dissolved below
            found, labels = kmeans2(points.numpy(), num_groups, minit="++", seed=seed * NUM_STARTS + start)
        centres = torch.from_numpy(found)
        error = float((points - centres[labels]).square().sum())
        if error < best_error:
            sizes = torch.bincount(torch.from_numpy(labels), minlength=num_groups)
            best, best_error = centres[sizes >= LEAST_PICTURES], error
    nearest = torch.cdist(points, best).argmin(dim=1)
    labels_left: list[int] = nearest.unique(return_inverse=True)[1].tolist()
    return labels_left


def _rewrap(values: Tensor, axis: int, side: int, reach: int) -> Tensor:
    """Values of distances -reach ... reach along an axis, laid around a torus of another side."""
    near = values.narrow(axis, 0, reach)
    far = values.narrow(axis, values.shape[axis] - reach, reach)
    shape = list(values.shape)
    shape[axis] = side - 2 * reach
    return torch.cat([near, values.new_zeros(shape), far], dim=axis)


def _root(matrices: Tensor) -> Tensor:
    """Root of Hermitian matrices without negative eigenvalues, up to rounding, (..., C, C)."""
    values, vectors = torch.linalg.eigh(matrices)
    return (vectors * values.clamp(min=0.0).sqrt()[..., None, :]) @ vectors.mH
