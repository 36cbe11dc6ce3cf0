"""What one process has found on its stretch of the photos, and how the stretches become one."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from .metrics import Metric
from .results import PhotoResult, PhotoSize, ReconPictures, Reject
from .routes import Passed

__all__ = ["Gallery", "Share"]


@dataclass
class Gallery:
    """The pictures that are kept: the first photos', and the worst ones'. All others are forgotten."""

    num_first: int
    """How many of the first."""
    num_worst: int
    """How many of the worst in the first metric of the first row that has a direction."""
    first: list[tuple[int, str, Mapping[str, ReconPictures]]] = field(default_factory=list)
    """Position, name and pictures."""
    worst: list[tuple[float, int, str, Mapping[str, ReconPictures]]] = field(default_factory=list)
    """A heap by goodness: the best of the worst is the first to go."""

    def wants(self, values: Mapping[str, float], table: Mapping[str, Metric]) -> bool:
        """Return whether a photo of these values would be kept."""
        badness = self._badness(values, table)
        return len(self.first) < self.num_first or (
            self.num_worst > 0 and (len(self.worst) < self.num_worst or badness > self.worst[0][0])
        )

    def offer(
        self,
        position: int,
        name: str,
        pictures: Mapping[str, ReconPictures],
        values: Mapping[str, float],
        table: Mapping[str, Metric],
    ) -> None:
        """Keep a photo's pictures if they are among the first or the worst."""
        if len(self.first) < self.num_first:
            self.first.append((position, name, pictures))
        if self.num_worst:
            # Of equal ones the earlier photo stays; positions differ, so pictures are never compared.
            heapq.heappush(self.worst, (self._badness(values, table), -position, name, pictures))
            if len(self.worst) > self.num_worst:
                heapq.heappop(self.worst)

    def pictures(self) -> dict[str, Mapping[str, ReconPictures]]:
        """Return what is kept, by name, in the order of the photos."""
        kept = {position: (name, pictures) for position, name, pictures in self.first}
        kept |= {-position: (name, pictures) for _, position, name, pictures in self.worst}
        return {name: pictures for _, (name, pictures) in sorted(kept.items(), key=lambda item: item[0])}

    @staticmethod
    def _badness(values: Mapping[str, float], table: Mapping[str, Metric]) -> float:
        judged = [(name, metric) for name, metric in table.items() if metric.higher_is_better is not None]
        return next((-values[name] if metric.higher_is_better else values[name] for name, metric in judged), 0.0)


@dataclass
class Share:
    """Everything that one process has found, in the order of its photos."""

    results: dict[str, list[PhotoResult]]
    """By row."""
    bits: dict[str, list[float]]
    """What each photo took, by row; empty where that has no meaning."""
    seconds: dict[str, float]
    """Wall time of encoding and decoding, by row."""
    gallery: Gallery
    """Pictures to look at."""
    sizes: list[PhotoSize] = field(default_factory=list)
    """The photos."""
    digests: dict[str, str] = field(default_factory=dict)
    """Photo to the sha256 of its pixels before any resize."""
    rejects: list[Reject] = field(default_factory=list)
    """Photos that could not be evaluated."""
    probed: list[list[Mapping[str, float]]] = field(default_factory=list)
    """What each probe found on each photo."""

    @classmethod
    def of(cls, rows: Sequence[str], *, num_pictures: int, num_worst: int) -> Share:
        """Return an empty share."""
        return cls(
            results={row: [] for row in rows},
            bits={row: [] for row in rows},
            seconds=dict.fromkeys(rows, 0.0),
            gallery=Gallery(num_pictures, num_worst),
        )

    def add(self, row: str, photo: str, metrics: Mapping[str, float], passed: Passed) -> None:
        """Add one photo by one route."""
        shape = None if passed.z is None else tuple(passed.z.shape[1:])
        self.results[row].append(PhotoResult(name=photo, metrics=metrics, latent_shape=shape, latents=passed.latents))
        self.seconds[row] += passed.seconds
        if passed.num_bits is not None:
            self.bits[row].append(passed.num_bits)

    @classmethod
    def merged(cls, shares: Sequence[Share]) -> Share:
        """Return what one process would have found on all photos; shares come in the order of the photos."""
        rows = list(shares[0].results)
        gallery = Gallery(shares[0].gallery.num_first, shares[0].gallery.num_worst)
        gallery.first = [one for share in shares for one in share.gallery.first][: gallery.num_first]
        gallery.worst = heapq.nlargest(
            gallery.num_worst, (one for share in shares for one in share.gallery.worst), key=lambda one: one[:2]
        )
        return cls(
            results={row: [one for share in shares for one in share.results[row]] for row in rows},
            bits={row: [bits for share in shares for bits in share.bits[row]] for row in rows},
            seconds={row: sum(share.seconds[row] for share in shares) for row in rows},
            gallery=gallery,
            sizes=[size for share in shares for size in share.sizes],
            digests={name: digest for share in shares for name, digest in share.digests.items()},
            rejects=[reject for share in shares for reject in share.rejects],
            probed=[one for share in shares for one in share.probed],
        )
