"""Between pictures: the latents on a path from one to the next, decoded, and how far apart the steps look.

`lerp` is the straight line. `slerp` keeps the length of what departs from the VAE's shift, which a straight line
between independent latents shortens. `geodesic` is the straight line walked at an even pace: its steps are moved along
it until each looks as far from the last as every other. It is no shortest curve; what is evened out is speed, not
direction.

Source: White, "Sampling Generative Networks", arXiv 1609.04468, for slerp.

Shapes: T steps, C latent channels, h w latent cells, H W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Literal, Protocol, get_args

import torch

from sd_vae.checkpoints.families import latent_scale
from sd_vae.config import VAEConfig
from sd_vae.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from sd_vae.autoencoder import AutoencoderKL

__all__ = ["Distance", "Interpolation", "PathName", "blend", "grid_distances", "interpolate", "interpolate_grid"]

PathName = Literal["lerp", "slerp", "geodesic"]

EVEN = 0.05
"""A geodesic is done when its largest and smallest step differ by at most this share of their mean."""

MAX_ROUNDS = 8
"""Times that its steps are moved, at most."""


class Distance(Protocol):
    """How far apart pictures look, as `sd_vae.losses.Perceptual` measures it."""

    def __call__(self, recon: Tensor, x: Tensor) -> Tensor:
        """Return the distances (B,) of two batches of pictures (B, 3, H, W) in [-1, 1]."""


@dataclass(frozen=True, eq=False)
class Interpolation:
    """Pictures on the way from one end to the next."""

    positions: tuple[float, ...]
    """Where each picture is: 0 at the first end, 1 at the second, 1.5 half way to the third."""
    z: Tensor
    """Raw latents (T, C, h, w), float32 on the CPU."""
    x: Tensor
    """Pictures (T, 3, H, W), clamped to [-1, 1], float32 on the CPU."""
    distances: tuple[float, ...] | None
    """Perceptual distance of each picture but the first to the one before; None where nothing measures it."""

    @property
    def unevenness(self) -> float | None:
        """Largest minus smallest distance over their mean; 0 where all pictures are equal."""
        return None if self.distances is None else _unevenness(torch.tensor(self.distances))


def interpolate(
    vae: AutoencoderKL,
    ends: Sequence[Tensor],
    *,
    steps: int = 12,
    path: PathName = "lerp",
    distance: Distance | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Interpolation:
    """Return the pictures on a path through latents.

    Args:
        vae: The decoder, on its device and in the dtype to compute in.
        ends: Two or more raw latents (C, h, w) of one size.
        steps: Pictures from one end to the next, both counted; an end between two legs is there once.
        path: How to get from one to the next. A geodesic is even within each leg.
        distance: What measures how far apart pictures look; a geodesic needs one.
        progress: Called with the pictures decoded so far and a bound of their number.

    Raises:
        UserError: Fewer than 2 ends or steps, ends that do not fit each other or the VAE, ends that point opposite ways
            for slerp, or a geodesic without a distance.
    """
    _require_ends(vae, ends, least=2)
    if steps < 2:
        raise UserError(f"steps is {steps}, it must be at least 2: the ends themselves.")
    _require_path(path, distance)
    legs = len(ends) - 1
    rounds = MAX_ROUNDS if path == "geodesic" else 1
    walker = _Walker(
        vae, distance, progress or (lambda done, total: None), legs * (2 + rounds * (steps - 2)) - legs + 1
    )

    positions, zs, xs, distances = [0.0], [ends[0].float().cpu()[None]], [], []
    last: Tensor | None = None
    for leg, (start, end) in enumerate(pairwise(ends)):
        found = walker.walk(start, end, steps, path, first=last)
        positions += [leg + float(place) for place in found.places[1:]]
        zs.append(found.z[1:])
        xs.append(found.x if last is None else found.x[1:])
        distances += found.distances.tolist()
        last = found.x[-1:]
    walker.finish()
    return Interpolation(tuple(positions), torch.cat(zs), torch.cat(xs), tuple(distances) if distance else None)


def interpolate_grid(
    vae: AutoencoderKL,
    corners: Sequence[Tensor],
    *,
    steps: int = 12,
    path: PathName = "lerp",
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Return pictures between four: (steps, steps, 3, H, W), clamped to [-1, 1], float32 on the CPU.

    Args:
        vae: The decoder, on its device and in the dtype to compute in.
        corners: Raw latents (C, h, w) of one size: top left, top right, bottom left, bottom right.
        steps: Pictures a side, at least 2.
        path: lerp or slerp, first along rows, then from row to row.
        progress: Called with the pictures decoded so far and their number.

    Raises:
        UserError: Not four corners, or as `interpolate`; a geodesic is a line and has no grid.
    """
    _require_ends(vae, corners, least=4)
    if len(corners) != 4:
        raise UserError(f"a grid has 4 corners, there are {len(corners)} pictures; give 4.")
    if path == "geodesic":
        raise UserError("path is geodesic, which spaces the steps of a line, and a grid is none; choose lerp or slerp.")
    if steps < 2:
        raise UserError(f"steps is {steps}, it must be at least 2: the corners themselves.")
    walker = _Walker(vae, None, progress or (lambda done, total: None), steps**2)
    places = torch.linspace(0.0, 1.0, steps)
    top, bottom = (blend(vae, corners[row], corners[row + 1], places, path) for row in (0, 2))
    columns = [blend(vae, above, below, places, path) for above, below in zip(top, bottom, strict=True)]
    x = walker.decode(torch.stack(columns, dim=1).flatten(0, 1))
    return x.unflatten(0, (steps, steps))


def grid_distances(x: Tensor, distance: Distance, device: torch.device | str) -> tuple[list[float], list[float]]:
    """Return how far neighbours in a grid look apart, mean over each row: to the right, and to the row below.

    Args:
        x: Pictures (rows, columns, 3, H, W) in [-1, 1].
        distance: What measures.
        device: Where it is.
    """
    right = [float(_distances(row[1:], row[:-1], distance, device).mean()) for row in x]
    below = [float(_distances(low, high, distance, device).mean()) for low, high in zip(x[1:], x[:-1], strict=True)]
    return right, below


def blend(vae: AutoencoderKL, start: Tensor, end: Tensor, places: Tensor, path: PathName) -> Tensor:
    """Return the latents at `places` of a path: (T, C, h, w), raw, float32.

    Args:
        vae: Tells the shift that slerp turns around.
        start: Raw z (C, h, w), at place 0.
        end: Raw z (C, h, w), at place 1.
        places: (T,) in [0, 1].
        path: As in `interpolate`.

    Raises:
        UserError: For slerp, the two point opposite ways.
    """
    start, end = start.float().cpu(), end.float().cpu()
    t = places.view(-1, 1, 1, 1)
    if path != "slerp":
        return start.lerp(end, t)
    scales, shifts = (
        torch.tensor(values).view(-1, 1, 1)
        for values in latent_scale(VAEConfig.from_dict(dict(vae.config), source="the VAE's config"))
    )
    a, b = (start - shifts) * scales, (end - shifts) * scales
    return _slerp(a, b, t) / scales + shifts


def _slerp(a: Tensor, b: Tensor, t: Tensor) -> Tensor:
    """sin((1 - t) w) / sin(w) a + sin(t w) / sin(w) b, with w the angle between a and b.

    Raises:
        UserError: w is 180 degrees, and every way round is as good.
    """
    cosine = (a * b).sum(dtype=torch.float64) / (a.norm(dtype=torch.float64) * b.norm(dtype=torch.float64))
    angle = cosine.nan_to_num(1.0).clamp(-1.0, 1.0).arccos()  # a latent of 0 has no direction
    if angle < 1e-3:
        return a.lerp(b, t)
    if angle > torch.pi - 1e-3:
        raise UserError("two latents point opposite ways, so that slerp has no shortest way between them; choose lerp.")
    return (((1.0 - t) * angle).sin() / angle.sin()).float() * a + ((t * angle).sin() / angle.sin()).float() * b


@dataclass(frozen=True, eq=False)
class _Leg:
    """One walk from end to end."""

    places: Tensor  # (T,) in [0, 1]
    z: Tensor
    x: Tensor
    distances: Tensor  # (T - 1,), or none


class _Walker:
    """Decodes and measures, and says how far it is."""

    def __init__(
        self, vae: AutoencoderKL, distance: Distance | None, progress: Callable[[int, int], None], total: int
    ) -> None:
        self._vae, self._distance, self._progress = vae, distance, progress
        self._num_done, self._total = 0, total

    def walk(self, start: Tensor, end: Tensor, steps: int, path: PathName, first: Tensor | None) -> _Leg:
        """One leg; `first` is the picture of its start where that is decoded already."""
        places = torch.linspace(0.0, 1.0, steps)
        z = blend(self._vae, start, end, places, path)
        x = self.decode(z) if first is None else torch.cat([first, self.decode(z[1:])])
        best = _Leg(places, z, x, self._measure(x))
        if path != "geodesic" or steps < 3:
            return best
        current = best
        for _ in range(MAX_ROUNDS - 1):
            if _unevenness(current.distances) <= EVEN:
                break
            places = _respaced(current.places, current.distances)
            z = blend(self._vae, start, end, places, path)
            x = torch.cat([x[:1], self.decode(z[1:-1]), x[-1:]])
            current = _Leg(places, z, x, self._measure(x))
            best = min(best, current, key=lambda leg: _unevenness(leg.distances))
        return best

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """(T, C, h, w) to (T, 3, H, W), one at a time."""
        pictures = []
        for one in z:
            pictures.append(self._vae.decode(one[None].to(self._vae.device, self._vae.dtype)).sample.float().cpu())
            self._num_done += 1
            self._progress(self._num_done, self._total)
        return torch.cat(pictures).clamp(-1.0, 1.0)

    def finish(self) -> None:
        """Say that it is done, though fewer rounds were needed than there might have been."""
        self._progress(self._num_done, self._num_done)

    def _measure(self, x: Tensor) -> Tensor:
        if self._distance is None:
            return torch.zeros(0)
        return _distances(x[1:], x[:-1], self._distance, self._vae.device)


@torch.no_grad()
def _distances(ours: Tensor, theirs: Tensor, distance: Distance, device: torch.device | str) -> Tensor:
    """Distance of each picture to its counterpart (T,), one pair at a time."""
    pairs = zip(ours.split(1), theirs.split(1), strict=True)
    return torch.cat([distance(a.to(device), b.to(device)).cpu() for a, b in pairs])


def _respaced(places: Tensor, distances: Tensor) -> Tensor:
    """Places at which a curve that is walked at the speed measured between `places` gives equal distances.

    LPIPS grows with the square of a small step, so the root of each distance is taken for the way.
    """
    way = torch.cat([torch.zeros(1), distances.clamp(min=0.0).sqrt().cumsum(0)])
    wanted = torch.linspace(0.0, 1.0, len(places)) * way[-1]
    leg = torch.searchsorted(way, wanted).clamp(1, len(places) - 1)
    share = ((wanted - way[leg - 1]) / (way[leg] - way[leg - 1]).clamp(min=1e-12)).clamp(0.0, 1.0)
    found = places[leg - 1] + share * (places[leg] - places[leg - 1])
    found[0], found[-1] = 0.0, 1.0
    return found


def _unevenness(distances: Tensor) -> float:
    mean = float(distances.mean())
    return float(distances.max() - distances.min()) / mean if mean > 0 else 0.0


def _require_path(path: str, distance: Distance | None) -> None:
    if path not in get_args(PathName):
        raise UserError(f"path is {path!r}, choose one of: {', '.join(get_args(PathName))}.")
    if path == "geodesic" and distance is None:
        raise UserError("path is geodesic and nothing measures how far apart pictures look; give a distance.")


def _require_ends(vae: AutoencoderKL, ends: Sequence[Tensor], *, least: int) -> None:
    if len(ends) < least:
        raise UserError(f"there are {len(ends)} pictures to go between, at least {least} are needed; give more.")
    shapes = [tuple(end.shape) for end in ends]
    channels = int(vae.config.latent_channels)
    for number, shape in enumerate(shapes, start=1):
        if len(shape) != 3 or shape[0] != channels:
            raise UserError(f"latent {number} has shape {shape}, this VAE takes ({channels}, h, w); check the VAE.")
        if shape != shapes[0]:
            raise UserError(f"latent {number} has shape {shape}, the first has {shapes[0]}; bring them to one size.")
