"""Which picture is sample p of a run: a stateless function of (seed, p), over one source or a mixture of several.

A source with shards is shuffled by shard and window: its shards in a random order are read one after the other, and
within windows of so many consecutive pictures the order is random. So the pictures that are needed at a time lie
close together, and no shuffle buffer has to be saved: a position is (epoch, place) and nothing else. A source without
shards is shuffled as a whole.

A mixture deals out its positions in blocks. How many of the first x samples come from each source is floor arithmetic
on the weights, so proportions are exact in the long run; within a block the sources are shuffled.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sd_vae.data.randomness import epoch_permutation, stream_rng
from sd_vae.errors import UserError

__all__ = ["MixtureOrder", "Place", "ShardOrder"]

MIXTURE_BLOCK = 1024
"""Samples within which the sources of a mixture are shuffled; another number is another order."""


class Place(NamedTuple):
    """Where a sample comes from."""

    source: int
    """Number of the source."""
    position: int
    """How many samples of that source come before it."""


class ShardOrder:
    """The order of one source, epoch after epoch.

    Args:
        seed: Seed of the run.
        number: Number of the source in its mixture, 0 where it is alone.
        sizes: Pictures of each shard; one shard, or a window as large as the source, is shuffled as a whole.
        window: Consecutive pictures, across shards, within which the order is random; 0 is all of them.
    """

    def __init__(self, seed: int, number: int, sizes: Sequence[int], window: int) -> None:
        self.num_pictures = sum(sizes)
        self._seed = seed
        self._number = number
        self._sizes = np.asarray(sizes, dtype=np.int64)
        self._window = window if window and len(sizes) > 1 else 0
        self._shards: tuple[int, NDArray[np.int64], NDArray[np.int64]] | None = None
        self._part: tuple[tuple[int, int], NDArray[np.int64]] | None = None

    def at(self, position: int) -> tuple[int, int]:
        """Return epoch and picture of the source's sample number `position`."""
        epoch, place = divmod(position, self.num_pictures)
        number, offset = divmod(place, self._window or self.num_pictures)
        if self._part is None or self._part[0] != (epoch, number):
            self._part = (epoch, number), self._order(epoch, number)
        return epoch, int(self._part[1][offset])

    def _order(self, epoch: int, window: int) -> NDArray[np.int64]:
        """The pictures of one window of an epoch, in their order."""
        if not self._window:
            return epoch_permutation(self._seed, epoch, self.num_pictures, self._number)
        starts, pictures = self._shards_of(epoch)
        first = window * self._window
        places = np.arange(first, min(first + self._window, self.num_pictures))
        shards = np.searchsorted(starts, places, side="right") - 1
        rng = stream_rng(self._seed, "window", epoch, window, self._number)
        return rng.permutation(pictures[shards] + places - starts[shards])

    def _shards_of(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Of the shards in the order of an epoch: the place where each begins, and its first picture."""
        if self._shards is None or self._shards[0] != epoch:
            shards = epoch_permutation(self._seed, epoch, len(self._sizes), self._number)
            first_pictures = np.cumsum(self._sizes) - self._sizes
            starts = np.cumsum(self._sizes[shards]) - self._sizes[shards]
            filled = self._sizes[shards] > 0  # an empty one begins where the next does
            self._shards = epoch, starts[filled], first_pictures[shards][filled]
        return self._shards[1:]


class MixtureOrder:
    """From which source each sample of a run comes.

    Args:
        seed: Seed of the run.
        weights: Share of each source, relative to the others, above 0.

    Raises:
        UserError: A weight is not above 0.
    """

    def __init__(self, seed: int, weights: Sequence[float]) -> None:
        if not all(0 < weight < float("inf") for weight in weights):
            raise UserError(f"data.weights is {list(weights)}, each must be a finite number above 0.")
        self._seed = seed
        self._weights = [Fraction(weight) for weight in weights]
        self._block: tuple[int, list[Place]] | None = None

    def at(self, position: int) -> Place:
        """Return where sample number `position` of the run comes from."""
        if len(self._weights) == 1:
            return Place(0, position)
        block, offset = divmod(position, MIXTURE_BLOCK)
        if self._block is None or self._block[0] != block:
            self._block = block, self._deal(block)
        return self._block[1][offset]

    def _deal(self, block: int) -> list[Place]:
        """The places of a block's samples, in their order."""
        seen, then = (self._counts(number * MIXTURE_BLOCK) for number in (block, block + 1))
        labels = np.repeat(np.arange(len(seen)), [after - before for before, after in zip(seen, then, strict=True)])
        places = []
        for label in stream_rng(self._seed, "mixture", block).permutation(labels).tolist():
            places.append(Place(label, seen[label]))
            seen[label] += 1
        return places

    def _counts(self, num_samples: int) -> list[int]:
        """How many of the first samples come from each source; never falls as `num_samples` grows."""
        counts, left, weight_left = [], num_samples, sum(self._weights, Fraction())
        for weight in self._weights:
            counts.append(left * weight // weight_left)
            left -= counts[-1]
            weight_left -= weight
        return counts
