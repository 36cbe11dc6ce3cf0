"""Learning what is normal from normal pictures alone.

The pictures are parted: what is normal is fitted to most of them, and alarms are calibrated on the others, to which
nothing was fitted; on its own pictures a detector would look better than it is. Into the first part defects are
painted, for the network that looks for what does not belong.

Shapes: C latent channels, H W pixels, h w latent cells.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor

from sd_vae.errors import UserError
from sd_vae.images import to_unit_range
from sd_vae.latents.anomaly.detector import (
    Detector,
    ScoreName,
    cell_vectors,
    local_map,
    picture_vectors,
    pooled_vectors,
)
from sd_vae.latents.anomaly.evidence import Evidence, look, weigh, windows
from sd_vae.latents.anomaly.gaussian import Gaussian
from sd_vae.latents.anomaly.network import teach
from sd_vae.latents.statistics import PictureSums

if TYPE_CHECKING:
    from sd_vae.autoencoder import AutoencoderKL
    from sd_vae.latents.anomaly.network import DefectNet
    from sd_vae.losses.perceptual import LPIPS

__all__ = ["FitConfig", "Progress", "fit"]

PICTURE_SIDE = 256
"""Pixels of the squares of normal pictures that are kept for painting, at most."""
MAX_PICTURES = 1000
"""So many are kept, drawn from all of them; together they take 200 MB."""
LEAST_NOISE = 1e-6
"""Mean squared error, in [-1, 1], below which a reconstruction counts as perfect: far less than 8 bits resolve."""
MAX_CELLS = 1_000_000
"""Cells of normal pictures that the range of a heat map is taken from."""


class Progress(Protocol):
    """What is told how far a fit has come."""

    def __call__(self, stage: str, done: int, total: int | None) -> None:
        """Take the name of a stage, and how much of it is done; None where the total is not known."""


@dataclass(frozen=True, kw_only=True)
class FitConfig:
    """How a detector is fitted."""

    calibration: float = 0.25
    """Share of the normal pictures that alarms are calibrated on; spread evenly over them."""
    num_steps: int = 3000
    """Batches of 8 normal squares and the same 8 with painted defects that the network learns from, on the CPU: minutes
    a thousand. 0 leaves it out."""
    seed: int = 0
    """Of the painted defects and of the network."""

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            UserError: Lists every value that is out of range.
        """
        problems = []
        if not 0 < self.calibration < 1:
            problems.append(f"calibration is {self.calibration}, it must be above 0 and below 1")
        if self.num_steps < 0:
            problems.append(f"num_steps is {self.num_steps}, it must be 0 or more")
        if self.seed < 0:
            problems.append(f"seed is {self.seed}, it must be 0 or more")
        if problems:
            raise UserError("cannot fit a detector like this: " + "; ".join(problems) + ".")


def fit(
    vae: AutoencoderKL,
    pictures: Iterable[Tensor],
    config: FitConfig | None = None,
    *,
    perceptual: LPIPS | None = None,
    progress: Progress | None = None,
) -> Detector:
    """Return what is normal, as far as normal pictures tell.

    Args:
        vae: The VAE that looks at pictures, in eval mode.
        pictures: Normal ones, (3, H, W) in uint8, H and W divisible by `vae.factor`; iterated twice, in one order.
        config: How it is fitted.
        perceptual: LPIPS with real weights, on the CPU; without it there is no score of that name.
        progress: Told how far it has come.

    Raises:
        UserError: Fewer than two pictures on either side of the split, or what `look` and `weigh` refuse.
    """
    config, tell = config or FitConfig(), progress or (lambda stage, done, total: None)
    evidence: list[Evidence] = []
    kept: list[np.ndarray] = []
    rng = np.random.default_rng(config.seed)
    for x in _part(pictures, config.calibration, is_calibration=False):
        evidence.append(weigh(look(vae, to_unit_range(x)[None]), perceptual))
        if config.num_steps:
            square = _square(x.permute(1, 2, 0).cpu().numpy(), rng)
            if len(kept) < MAX_PICTURES:
                kept.append(square)
            elif (place := int(rng.integers(len(evidence)))) < MAX_PICTURES:
                kept[place] = square
        tell("looking at normal pictures", len(evidence), None)
    if len(evidence) < 2:
        raise UserError(f"{len(evidence)} normal pictures are left to fit to; give more, or calibrate on fewer.")
    net = None
    if kept:
        tell_steps = partial(tell, "teaching the network")
        net = teach(kept, num_steps=config.num_steps, seed=config.seed, progress=tell_steps)
    detector = _summarize(evidence, net, None if perceptual is None else perceptual.name.removeprefix("lpips_"))
    return _calibrate(detector, vae, _part(pictures, config.calibration, is_calibration=True), perceptual, tell)


def _part(pictures: Iterable[Tensor], share: float, *, is_calibration: bool) -> Iterable[Tensor]:
    """The pictures to fit to, or those to calibrate on: every 1/share-th."""
    for index, x in enumerate(pictures):
        if (int((index + 1) * share) > int(index * share)) == is_calibration:
            yield x


def _square(plain: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A random square of a picture, of at most `PICTURE_SIDE`."""
    side = min(PICTURE_SIDE, *plain.shape[:2])
    top, left = (int(rng.integers(0, size - side + 1)) for size in plain.shape[:2])
    return plain[top : top + side, left : left + side].copy()


def _summarize(evidence: Sequence[Evidence], net: DefectNet | None, lpips_net: str | None) -> Detector:
    """The detector without its ranges and its calibration: each Gaussian rests on the maps of those before it."""
    num, num_pixels = len(evidence), sum(one.pixel.numel() for one in evidence)
    noise = sum(float(one.pixel.double().sum()) for one in evidence) / num_pixels
    local = _gaussian((windows(one.mean)[0] for one in evidence), num)
    locals_ = [local_map(local, one) for one in evidence]
    cells = _gaussian((cell_vectors(one, of) for one, of in zip(evidence, locals_, strict=True)), num)
    pooled = _gaussian((pooled_vectors(one) for one in evidence), num)
    joint = _gaussian(
        (
            picture_vectors(one, of, cells.distance(cell_vectors(one, of)).view_as(of))
            for one, of in zip(evidence, locals_, strict=True)
        ),
        num,
    )
    return Detector(
        noise=max(noise, LEAST_NOISE),
        local=local,
        pooled=pooled,
        cells=cells,
        joint=joint,
        net=net,
        lpips_net=lpips_net,
    )


def _gaussian(vectors: Iterable[Tensor], num_pictures: int) -> Gaussian:
    """The Gaussian of the vectors of pictures, (N, D) each, in float64."""
    sums: PictureSums | None = None
    for rows in vectors:
        added = PictureSums.of(rows.double())
        if sums is None:
            sums = added
        else:
            sums.merge_(added)
    assert sums is not None, "there are at least two pictures"
    return Gaussian.fit(sums, num_observations=num_pictures)


def _calibrate(
    detector: Detector,
    vae: AutoencoderKL,
    pictures: Iterable[Tensor],
    perceptual: LPIPS | None,
    tell: Progress,
) -> Detector:
    """The detector with the scores and the ranges of maps of normal pictures that it does not know."""
    scores: dict[ScoreName, list[float]] = {}
    cells: dict[ScoreName, list[Tensor]] = {}
    num_done = 0
    for x in pictures:
        found = detector.examine(look(vae, to_unit_range(x)[None]), perceptual)
        for name, values in found.scores.items():
            scores.setdefault(name, []).append(float(values))
        for name, values in found.maps.items():
            cells.setdefault(name, []).append(values.flatten())
        num_done += 1
        tell("calibrating", num_done, None)
    if num_done < 2:
        raise UserError(f"{num_done} normal pictures are left to calibrate alarms on; give more, or a larger share.")
    return replace(
        detector,
        calibration={name: tuple(values) for name, values in scores.items()},
        ranges={name: _range(torch.cat(values)) for name, values in cells.items()},
    )


def _range(values: Tensor) -> tuple[float, float]:
    """What half and 99.9% of the cells lie below."""
    thinned = values[:: max(1, len(values) // MAX_CELLS)]
    low, high = torch.quantile(thinned.double(), torch.tensor((0.5, 0.999), dtype=torch.float64)).tolist()
    return low, high
