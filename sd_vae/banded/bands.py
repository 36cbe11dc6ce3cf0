"""A feature map of one picture held as bands of rows, so that each is let go of when the last reader has passed.

Layout: a band is (R, W, C), contiguous: pixels in order, channels innermost.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from torch import Tensor

from sd_vae.ops.groupnorm import Statistics

__all__ = ["Bands"]


@dataclass
class Bands:
    """Rows of a map from top to bottom, and the statistics of every band for the GroupNorm that follows.

    Attributes:
        height: Rows of the whole map.
        width: Columns.
        channels: Channels.
        give: Takes a band back that nobody reads any more.
    """

    height: int
    width: int
    channels: int
    give: Callable[[Tensor], None]
    statistics: list[Statistics] = field(default_factory=list)
    _bands: list[Tensor | None] = field(default_factory=list)
    _starts: list[int] = field(default_factory=list)
    _end: int = 0
    _num_released: int = 0

    def append(self, band: Tensor) -> None:
        """Add the rows below the last band."""
        assert band.is_contiguous(), f"a band of strides {band.stride()} is not pixels in order"
        self._starts.append(self._end)
        self._end += len(band)
        self._bands.append(band)

    def each(self) -> Iterator[tuple[Tensor, int]]:
        """Every band with its first row."""
        for band, start in zip(self._bands, self._starts, strict=True):
            assert band is not None, f"the band at row {start} was let go of"
            yield band, start

    def pieces(self, first: int, last: int) -> list[Tensor]:
        """Rows first to last - 1, clipped to the map, as views of the bands that hold them."""
        views = []
        index = max(bisect_right(self._starts, max(first, 0)) - 1, 0)
        while index < len(self._bands) and self._starts[index] < last:
            band, start = self._bands[index], self._starts[index]
            assert band is not None, f"rows from {start} were let go of before their last reader"
            views.append(band[max(first - start, 0) : last - start])
            index += 1
        return views

    def addresses(self, first: int, last: int) -> npt.NDArray[np.int64]:
        """Address of each row first to last - 1; 0 for a row outside the map."""
        table = np.zeros(last - first, np.int64)
        row = max(first, 0)
        for piece in self.pieces(first, last):
            step = piece.stride(0) * piece.element_size()
            table[row - first : row - first + len(piece)] = piece.data_ptr() + step * np.arange(len(piece))
            row += len(piece)
        return table

    def release(self, before: int | None = None) -> None:
        """Let go of the bands that end at or above a row; of all by default."""
        while self._num_released < len(self._bands):
            index = self._num_released
            band = self._bands[index]
            if band is None or (before is not None and self._starts[index] + len(band) > before):
                break
            self._bands[index] = None
            self._num_released += 1
            self.give(band)
