"""What is normal, as learned from normal pictures, and how far other pictures are from it: scores and heat maps.

Shapes: B pictures, C latent channels, K kinds of defects, h w latent cells, N vectors, M maps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import adaptive_max_pool2d, interpolate

from sd_vae.errors import UserError
from sd_vae.latents.anomaly.evidence import Evidence, Seen, look, weigh, windows
from sd_vae.latents.anomaly.gaussian import Gaussian
from sd_vae.latents.anomaly.painting import KINDS

if TYPE_CHECKING:
    from sd_vae.autoencoder import AutoencoderKL
    from sd_vae.latents.anomaly.network import DefectNet
    from sd_vae.losses.perceptual import LPIPS

__all__ = ["SCORES", "Detector", "Findings", "ScoreName", "score"]

ScoreName = Literal[
    "pixel", "structure", "lpips", "local", "pooled", "elbo", "joint", "patch", "noise", "blur", "lines", "learned"
]

SCORES: dict[ScoreName, str] = {
    "pixel": "reconstruction error of pixels, mean of the worst cells",
    "structure": "1 - SSIM of the reconstruction, mean of the worst cells",
    "lpips": "LPIPS of the reconstruction, mean of the worst cells",
    "local": "Mahalanobis distance of a latent cell with its neighbours, mean of the worst cells",
    "pooled": "Mahalanobis distance of the latents' channel means and deviations",
    "elbo": "negative evidence lower bound, in nats a pixel value",
    "joint": "Mahalanobis distance of all of a picture's figures together; the map is that of a cell's figures",
    "patch": "log-odds of a part from elsewhere, by the network taught on painted defects, mean of the worst cells",
    "noise": "log-odds of noise, by the network taught on painted defects, mean of the worst cells",
    "blur": "log-odds of blur, by the network taught on painted defects, mean of the worst cells",
    "lines": "log-odds of lines and scratches, by the network taught on painted defects, mean of the worst cells",
    "learned": "the largest of the log-odds of lines, blur, noise and patch",
}
"""Name to what it is, the one to rely on last; higher is less normal. All but pooled have a heat map."""

TAUGHT: tuple[ScoreName, ...] = ("learned", *KINDS)
"""Scores that there are with a network only."""

PEAK_SHARE = 0.01
"""The worst cells are this share of a picture's, and at least one."""

LEAST = 1e-5
"""What is added to a figure before its logarithm is taken."""


class Findings(NamedTuple):
    """How far pictures are from normal."""

    scores: dict[ScoreName, Tensor]
    """(B,) each; higher is less normal."""
    maps: dict[ScoreName, Tensor]
    """(B, h, w) each, in the unit of the score."""


@dataclass(frozen=True, kw_only=True)
class Detector:
    """What is normal to a VAE; made by `fit`, kept by `save_detector`."""

    noise: float
    """Mean squared error of reconstructions of normal pictures: the variance of the ELBO's Gaussian p(x|z)."""
    local: Gaussian
    """Latent cells with their neighbours, 9 C features."""
    pooled: Gaussian
    """Means and log deviations of channels, 2 C features."""
    cells: Gaussian
    """Logarithms of a cell's figures."""
    joint: Gaussian
    """Logarithms of means and peaks of a picture's maps, and its pooled latents."""
    net: DefectNet | None
    """Gives the log-odds of each kind of defect, taught on painted ones; None where that was left out."""
    lpips_net: str | None
    """Network of the LPIPS that belongs to it; None for none."""
    ranges: Mapping[ScoreName, tuple[float, float]] = field(default_factory=dict)
    """Map to what half and 99.9% of the cells of normal pictures lie below: black and white of heat maps."""
    calibration: Mapping[ScoreName, Sequence[float]] = field(default_factory=dict)
    """Score to its values of normal pictures to which nothing was fitted."""

    @property
    def scores(self) -> tuple[ScoreName, ...]:
        """Scores that it gives, the one to rely on first."""
        return tuple(reversed(score_names(has_lpips=self.lpips_net is not None, has_network=self.net is not None)))

    @torch.inference_mode()
    def examine(self, seen: Seen, perceptual: LPIPS | None = None) -> Findings:
        """Return how far pictures that a VAE has seen are from normal.

        Args:
            seen: As `look` returns it, of the VAE that the detector was fitted with.
            perceptual: The LPIPS that the detector was fitted with.

        Raises:
            UserError: LPIPS is missing or another one, or as `weigh`.
        """
        given = None if perceptual is None else perceptual.name.removeprefix("lpips_")
        if given != self.lpips_net:
            raise UserError(
                f"the detector was fitted with LPIPS network {self.lpips_net or 'none'} and is used with "
                f"{given or 'none'}; give the same."
            )
        evidence = weigh(seen, perceptual)
        local = local_map(self.local, evidence)
        cells = self.cells.distance(cell_vectors(evidence, local)).view_as(local)
        vectors = picture_vectors(evidence, local, cells)
        maps: dict[ScoreName, Tensor] = {
            "pixel": evidence.pixel,
            "structure": evidence.structure,
            "local": local,
            "elbo": self._elbo_map(evidence, seen),
            "joint": cells,
        }
        if evidence.lpips is not None:
            maps["lpips"] = evidence.lpips
        scores: dict[ScoreName, Tensor] = {name: peak(values) for name, values in maps.items()}
        scores["elbo"] = maps["elbo"].mean(dim=(1, 2))
        scores["pooled"] = self.pooled.distance(pooled_vectors(evidence))
        scores["joint"] = self.joint.distance(vectors)
        if self.net is not None:
            logits = self.net(seen.x)
            sized = _resized(logits, local.shape[-2:])
            for index, kind in enumerate(KINDS):
                scores[kind], maps[kind] = peak(logits[:, index]), sized[:, index]
            scores["learned"] = torch.stack([scores[kind] for kind in KINDS]).amax(dim=0)
            maps["learned"] = sized.amax(dim=1)
        return Findings({name: scores[name] for name in self.scores}, maps)

    def _elbo_map(self, evidence: Evidence, seen: Seen) -> Tensor:
        """-log N(x; recon, noise) + KL of a cell, over its pixel values, in nats, (B, h, w).

        With the posterior's mean in place of a draw from it; the sum over cells bounds -log p(x) but for that.
        """
        values = seen.x[0].numel() / evidence.pixel[0].numel()
        distortion = 0.5 * (math.log(2 * math.pi * self.noise) + evidence.pixel / self.noise)
        return distortion + evidence.rate / values


def score_names(*, has_lpips: bool, has_network: bool) -> list[ScoreName]:
    """Return the scores of a detector, the one to rely on last."""
    left_out = (() if has_lpips else ("lpips",)) + (() if has_network else TAUGHT)
    return [name for name in SCORES if name not in left_out]


def score(detector: Detector, vae: AutoencoderKL, x: Tensor, perceptual: LPIPS | None = None) -> Findings:
    """Return how far pictures are from normal: scores (B,) and maps (B, h, w) by name, see `SCORES`.

    Args:
        detector: What is normal.
        vae: The VAE that it was fitted with.
        x: Images (B, 3, H, W) in [-1, 1]; H and W divisible by `vae.factor`.
        perceptual: The LPIPS that it was fitted with.

    Raises:
        UserError: As `vae.encode` and `Detector.examine`.
    """
    return detector.examine(look(vae, x), perceptual)


def peak(values: Tensor) -> Tensor:
    """Return the mean of the largest `PEAK_SHARE` of each map (B, h, w), (B,)."""
    flat = values.flatten(1)
    return flat.topk(max(1, round(PEAK_SHARE * flat.shape[1])), dim=1).values.mean(dim=1)


def _resized(maps: Tensor, cells: torch.Size) -> Tensor:
    """Maps (B, K, h', w') with h and w of `cells`; where these are fewer, each has the largest value in it."""
    if maps.shape[-1] > cells[1] or maps.shape[-2] > cells[0]:
        return adaptive_max_pool2d(maps, (cells[0], cells[1]))
    return interpolate(maps, size=cells, mode="bilinear", align_corners=False)


def local_map(gaussian: Gaussian, evidence: Evidence) -> Tensor:
    """Return the distance of each cell with its neighbours, (B, h, w)."""
    return gaussian.distance(windows(evidence.mean).flatten(0, 1)).view_as(evidence.pixel)


def pooled_vectors(evidence: Evidence) -> Tensor:
    """Return mean and log deviation of each channel, (B, 2 C)."""
    cells = evidence.mean.flatten(2)
    return torch.cat([cells.mean(dim=2), _log(cells.std(dim=2, correction=0))], dim=1)


def cell_vectors(evidence: Evidence, local: Tensor) -> Tensor:
    """Return the logarithms of each cell's figures, (B h w, M)."""
    return _log(torch.stack([*_figures(evidence), local], dim=-1)).flatten(0, 2)


def picture_vectors(evidence: Evidence, local: Tensor, cells: Tensor) -> Tensor:
    """Return logarithms of each map's mean and peak, and the pooled latents, (B, 2 (M + 1) + 2 C)."""
    maps = [*_figures(evidence), local, cells]
    means = torch.stack([values.mean(dim=(1, 2)) for values in maps], dim=1)
    peaks = torch.stack([peak(values) for values in maps], dim=1)
    return torch.cat([_log(means), _log(peaks), pooled_vectors(evidence)], dim=1)


def _figures(evidence: Evidence) -> list[Tensor]:
    """The maps that need no fit."""
    found = [evidence.pixel, evidence.colour, evidence.structure, evidence.rate, evidence.contrast]
    return found if evidence.lpips is None else [*found, evidence.lpips]


def _log(values: Tensor) -> Tensor:
    return values.clamp_min(0.0).add(LEAST).log()
