"""A feature map of one picture held as bands of rows, so that each is let go of when the last reader has passed.

Layout: a band is (R, W, C), contiguous: pixels in order, channels innermost.
"""

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
    _rows: list[int] = field(default_factory=list)

    def append(self, band: Tensor) -> None:
        """Add the rows below the last band."""
        self._starts.append(self._starts[-1] + self._rows[-1] if self._bands else 0)
        self._rows.append(len(band))
        self._bands.append(band)

    def each(self) -> Iterator[tuple[Tensor, int]]:
        """Every band with its first row."""
        for band, start in zip(self._bands, self._starts, strict=True):
            assert band is not None, f"the band at row {start} was let go of"
            yield band, start

    def pieces(self, first: int, last: int) -> list[Tensor]:
        """Rows first to last - 1, clipped to the map, as views of the bands that hold them."""
        views = []
        for band, start, num_rows in zip(self._bands, self._starts, self._rows, strict=True):
            low, high = max(first, start), min(last, start + num_rows)
            if low < high:
                assert band is not None, f"rows {low} to {high} were let go of before their last reader"
                views.append(band[low - start : high - start])
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
        for index, band in enumerate(self._bands):
            if band is not None and (before is None or self._starts[index] + self._rows[index] <= before):
                self._bands[index] = None
                self.give(band)
