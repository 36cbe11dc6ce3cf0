"""Fréchet distance of features in float64: streamed to disk, summed in one order, equal for any number of processes.

Features of every picture go to an unnamed temporary file, 8 kB each for Inception, so memory does not grow with the
photos. At the end the first process has them all in the order of the photos and computes mean and covariance in blocks
of fixed size: the number of processes cannot change a bit.

Shapes: N pictures, D features.

Source: Heusel et al., "GANs Trained by a Two Time-Scale Update Rule", arXiv 1706.08500.
"""

from __future__ import annotations

import tempfile
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import IO

import numpy as np

from sd_vae.errors import UserError
from sd_vae.latents.processes import Processes

__all__ = ["PHOTOS", "FeatureFile", "Gaussian", "frechet_distance", "frechet_distances"]

PHOTOS = ""
"""In place of a row's name: the photos themselves."""

BLOCK = 512
"""Pictures whose features are summed at once."""


@dataclass(frozen=True)
class Gaussian:
    """Mean and covariance of a set's features, all that the distance sees."""

    mean: np.ndarray
    """(D,), float64."""
    covariance: np.ndarray
    """(D, D), float64, divided by N - 1."""


class FeatureFile:
    """Features of pictures in a temporary file that vanishes with this object.

    Args:
        metric: What the distance is called.
        row: Whose pictures: a row of the report, or `PHOTOS`.
        num_features: D.
    """

    def __init__(self, metric: str, row: str, num_features: int) -> None:
        self.metric = metric
        self.row = row
        self.num_features = num_features
        self._file: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115
        weakref.finalize(self, self._file.close)

    def __len__(self) -> int:
        """Return the number of pictures."""
        self._file.seek(0, 2)
        return self._file.tell() // (4 * self.num_features)

    def append(self, features: np.ndarray) -> None:
        """Add the features (N, D) of more pictures, kept as float32."""
        self._file.seek(0, 2)
        self._file.write(np.ascontiguousarray(features, np.float32).tobytes())

    def blocks(self) -> Iterator[np.ndarray]:
        """Yield the features in order, (at most 512, D) at a time, float64."""
        for start in range(0, len(self), BLOCK):
            self._file.seek(4 * self.num_features * start)
            content = self._file.read(4 * self.num_features * BLOCK)
            yield np.frombuffer(content, np.float32).reshape(-1, self.num_features).astype(np.float64)

    def gathered(self, processes: Processes) -> FeatureFile:
        """Return the features of all processes, by rank, in the first process; elsewhere an empty file.

        One process's block is on its way at a time.
        """
        if processes.count == 1:
            return self
        lengths = processes.gather(len(self))
        together = FeatureFile(self.metric, self.row, self.num_features)
        for rank, length in enumerate(lengths):
            own = self.blocks() if rank == processes.rank else iter(())
            for _ in range(0, length, BLOCK):
                block = next(own, np.empty((0, self.num_features)))
                arrived = processes.gather(block)[rank]
                if processes.is_first:
                    together.append(arrived)
        return together

    def gaussian(self) -> Gaussian:
        """Return mean and covariance, in two passes.

        Raises:
            UserError: Fewer than two pictures.
        """
        num = len(self)
        if num < 2:
            raise UserError(f"a Fréchet distance needs at least 2 photos, there is {num}; leave it out by --metrics.")
        mean = sum((block.sum(axis=0) for block in self.blocks()), np.zeros(self.num_features)) / num
        scatter = np.zeros((self.num_features, self.num_features))
        for block in self.blocks():
            centred = block - mean
            scatter += centred.T @ centred
        return Gaussian(mean, scatter / (num - 1))


def frechet_distance(one: Gaussian, other: Gaussian) -> float:
    """Return |m1 - m2|^2 + tr(C1) + tr(C2) - 2 tr((C1 C2)^(1/2)), never below 0.

    The trace of the root is the sum of the singular values of C1^(1/2) C2^(1/2), by two symmetric eigenvalue problems:
    it is real by construction, also where there are fewer pictures than features.
    """
    difference = one.mean - other.mean
    cross = np.linalg.svd(_root(one.covariance) @ _root(other.covariance), compute_uv=False).sum()
    distance = difference @ difference + np.trace(one.covariance) + np.trace(other.covariance) - 2.0 * cross
    return max(float(distance), 0.0)


def frechet_distances(files: Sequence[FeatureFile]) -> dict[str, dict[str, float]]:
    """Return the distance of every row to the photos, by row and metric; nothing for empty files.

    Raises:
        UserError: Fewer than two pictures.
    """
    gaussians = {(file.row, file.metric): file.gaussian() for file in files if len(file)}
    found: dict[str, dict[str, float]] = {}
    for (row, metric), gaussian in gaussians.items():
        if row != PHOTOS:
            found.setdefault(row, {})[metric] = frechet_distance(gaussian, gaussians[PHOTOS, metric])
    return found


def _root(covariance: np.ndarray) -> np.ndarray:
    """Symmetric square root of a positive semidefinite matrix; what rounding made negative is 0."""
    values, vectors = np.linalg.eigh(covariance)
    return (vectors * np.sqrt(np.clip(values, 0.0, None))) @ vectors.T
