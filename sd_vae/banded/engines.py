"""The steps that banded execution is made of, on any device in PyTorch and on the CPU in compiled kernels.

Every step makes rows `start` to `stop` of its result from the source rows that they need: one more above and below for
a convolution. What GroupNorm and SiLU do to the source is applied as it is read, so no normalised map is ever stored.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sd_vae.banded.bands import Bands
from sd_vae.ops.groupnorm import Statistics, scale_and_shift, tensor_statistics
from sd_vae.ops.modules import is_plain, onloaded
from sd_vae.ops.workspace import Workspace, trim_heap

__all__ = ["CompiledEngine", "Prepared", "TorchEngine"]

Norm = tuple[Tensor, Tensor]  # scale and shift, each (C,), fp32


@dataclass(frozen=True)
class Prepared:
    """A convolution that is ready for the compiled kernels."""

    weights: Any
    bias: Tensor


class TorchEngine:
    """Any device and dtype; bands may be stored elsewhere than they are computed on.

    Args:
        workspace: Where bands on the CPU come from.
        device: Where the arithmetic is done.
        storage: Where bands are kept between steps.
        dtype: Of bands and arithmetic; statistics and scale-shift-SiLU are fp32.
        band_bytes: Aimed size of a band.
        num_groups: Of every GroupNorm.
    """

    def __init__(
        self,
        workspace: Workspace,
        *,
        device: torch.device,
        storage: torch.device,
        dtype: torch.dtype,
        band_bytes: int,
        num_groups: int,
    ) -> None:
        self.workspace, self.device, self.storage, self.dtype = workspace, device, storage, dtype
        self.band_bytes, self.num_groups = band_bytes, num_groups

    def rows_per_band(self, width: int, channels: int) -> int:
        """Rows of a band: a multiple of four, the finest that halving, doubling and 4x4 tiles agree on."""
        return max(4, self.band_bytes // (width * channels * self.dtype.itemsize) // 4 * 4)

    def take(self, num_rows: int, width: int, channels: int) -> Tensor:
        """Return room for a band."""
        shape = (num_rows, width, channels)
        if self.storage.type == self.workspace.device.type:
            return self.workspace.take(shape, self.dtype)
        return torch.empty(shape, dtype=self.dtype, device=self.storage)

    def give(self, band: Tensor) -> None:
        """Take a band back."""
        if self.storage.type == self.workspace.device.type:
            self.workspace.give(band)

    def bring(self, rows: Tensor) -> Tensor:
        """Return rows of a band where the arithmetic is done."""
        return rows.to(self.device)

    def statistics(self, band: Tensor) -> Statistics:
        """Return what the GroupNorm that reads this band needs to know of it."""
        return tensor_statistics(self.bring(band), self.num_groups)

    def norm(self, source: Bands, norm: nn.GroupNorm) -> Norm:
        """Return the scale and shift that a GroupNorm over the whole map comes to."""
        with onloaded(norm):
            return scale_and_shift(source.statistics, norm.weight, norm.bias, norm.eps)

    def prepare(self, conv: nn.Module) -> Any:
        """Return what the steps below take for a convolution; good until the next of its kernel size is prepared."""
        return conv

    def convolve(
        self, source: Bands, start: int, stop: int, conv: Any, norm: Norm | None, out: Tensor, *, add: bool
    ) -> None:
        """Write, or add, rows of a 3x3 convolution of silu(norm(source)) into `out`."""
        window = self._window(source, start - 1, stop + 1, norm)
        _store(self._apply(conv, window, 1, 1), out, add=add)

    def double(self, source: Bands, start: int, stop: int, conv: Any, out: Tensor) -> None:
        """Write rows of a 3x3 convolution of the source with every pixel repeated 2x2; `start` is even."""
        window = self._window(source, start // 2 - 1, (stop + 1) // 2 + 1, None)
        wide = F.interpolate(window, scale_factor=2.0, mode="nearest")[:, :, 1 : 3 + stop - start]
        _store(self._apply(conv, wide, 1, 1), out, add=False)

    def halve(self, source: Bands, start: int, stop: int, conv: Any, out: Tensor) -> None:
        """Write rows of a 3x3 convolution with stride 2 of the source, zeros to its right and below it."""
        window = self._window(source, 2 * start, 2 * stop + 1, None, extra_columns=1)
        _store(conv(window), out, add=False)

    def pointwise(self, source: Bands, start: int, stop: int, conv: Any, out: Tensor) -> None:
        """Write rows of a 1x1 convolution."""
        row = 0
        for piece in source.pieces(start, stop):
            x = self.bring(piece).permute(2, 0, 1)[None]
            _store(conv(x), out[row : row + len(piece)], add=False)
            row += len(piece)

    def whole(self, source: Bands) -> Tensor:
        """Return the map as one tensor (1, C, H, W), in channels_last."""
        return self._window(source, 0, source.height, None)

    def _apply(self, conv: nn.Module, window: Tensor, top: int, bottom: int) -> Tensor:
        """A padded 3x3 convolution whose window already has its rows above and below."""
        if is_plain(conv, nn.Conv2d):
            module: Any = conv
            return F.conv2d(window, module.weight, module.bias, padding=(0, 1))
        # A module with a hook, or one that stands in for a convolution, is called as it is; it pads rows once more.
        return conv(window)[:, :, top : window.shape[2] - bottom]

    def _window(self, source: Bands, first: int, last: int, norm: Norm | None, extra_columns: int = 0) -> Tensor:
        """Rows of the source, normalised, with zeros outside the map: (1, C, rows, W + extra), channels_last."""
        shape = (last - first, source.width + extra_columns, source.channels)
        window = self._room(shape)
        row = max(first, 0) - first
        window[:row] = 0
        if extra_columns:
            window[:, source.width :] = 0
        for piece in source.pieces(first, last):
            target = window[row : row + len(piece), : source.width]
            x = self.bring(piece)
            target.copy_(x if norm is None else F.silu(x * norm[0] + norm[1]))
            row += len(piece)
        window[row:] = 0
        return window.permute(2, 0, 1)[None]

    def _room(self, shape: tuple[int, ...]) -> Tensor:
        if self.device.type == "cpu":
            trim_heap()  # what half precision frees is small enough for the allocator to keep: twice the peak, measured
        return torch.empty(shape, dtype=self.dtype, device=self.device)


class CompiledEngine(TorchEngine):
    """The CPU in fp32: Winograd convolutions and statistics in compiled kernels; the rest as in PyTorch."""

    def __init__(
        self, workspace: Workspace, *, device: torch.device, band_bytes: int, num_groups: int, keep_weights: bool
    ) -> None:
        dtype = torch.float32
        super().__init__(
            workspace, device=device, storage=device, dtype=dtype, band_bytes=band_bytes, num_groups=num_groups
        )
        self.keep_weights = keep_weights

    def statistics(self, band: Tensor) -> Statistics:  # noqa: D102
        from sd_vae.ops.compiled import band_statistics

        return band_statistics(band, self.num_groups)

    def convolve(  # noqa: D102
        self, source: Bands, start: int, stop: int, conv: Any, norm: Norm | None, out: Tensor, *, add: bool
    ) -> None:
        if not isinstance(conv, Prepared):
            super().convolve(source, start, stop, conv, norm, out, add=add)
            return
        self.run_winograd(source.addresses(start - 1, stop + 1), source, conv, norm, out, add=add, double=False)

    def double(self, source: Bands, start: int, stop: int, conv: Any, out: Tensor) -> None:  # noqa: D102
        if not isinstance(conv, Prepared):
            super().double(source, start, stop, conv, out)
            return
        rows = source.addresses(start // 2 - 1, (stop + 1) // 2 + 1)
        self.run_winograd(rows, source, conv, None, out, add=False, double=True)

    def halve(self, source: Bands, start: int, stop: int, conv: Any, out: Tensor) -> None:  # noqa: D102
        if not isinstance(conv, Prepared):
            super().halve(source, start, stop, conv, out)
            return
        rows = source.addresses(2 * start, 2 * stop + 1)
        self.run_directly(rows, source, conv, out, taps=3, stride=2)

    def pointwise(self, source: Bands, start: int, stop: int, conv: Any, out: Tensor) -> None:  # noqa: D102
        if not isinstance(conv, Prepared):
            super().pointwise(source, start, stop, conv, out)
            return
        self.run_directly(source.addresses(start, stop), source, conv, out, taps=1, stride=1)

    def prepare(self, conv: nn.Module) -> Any:  # noqa: D102
        from sd_vae.ops import direct, weights, winograd

        module: Any = conv
        if not is_plain(conv, nn.Conv2d) or winograd.unsupported(module.in_channels, module.out_channels):
            return conv
        bias = module.bias.detach()
        if module.kernel_size == (3, 3) and module.stride == (1, 1):
            points = weights.transformed(module.weight, self.workspace, keep=self.keep_weights)
            return Prepared(points, bias)
        return Prepared(direct.panels(module.weight, self.workspace), bias)

    def run_directly(self, rows: Any, source: Bands, conv: Prepared, out: Tensor, *, taps: int, stride: int) -> None:
        """Run the kernel of 1x1 and strided convolutions over source rows."""
        from sd_vae.ops.direct import convolve_directly

        convolve_directly(rows, source.width, conv.weights, conv.bias, out, self.workspace, taps=taps, stride=stride)

    def run_winograd(
        self, rows: Any, source: Bands, conv: Prepared, norm: Norm | None, out: Tensor, *, add: bool, double: bool
    ) -> None:
        """Run the kernel of 3x3 convolutions over source rows."""
        from sd_vae.ops import winograd

        affine = winograd.Affine.identity(source.channels) if norm is None else winograd.Affine(*norm, activate=True)
        winograd.convolve(
            rows[None], source.width, affine, conv.weights, conv.bias, out[None], self.workspace, add=add, double=double
        )

    def _room(self, shape: tuple[int, ...]) -> Tensor:
        return self.workspace.scratch("window", shape, self.dtype)


def _store(result: Tensor, out: Tensor, *, add: bool) -> None:
    """Put (1, C, R, W) into a band (R, W, C)."""
    rows = result[0].permute(1, 2, 0)
    if add:
        out.add_(rows.to(out.device))
    else:
        out.copy_(rows)
