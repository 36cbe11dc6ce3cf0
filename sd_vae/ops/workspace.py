"""Memory of one encode or decode on the CPU: slabs for row bands, taken and given back, and scratch areas.

A feature map that is allocated afresh is paid for page by page as it is first written, a third of a plain decode's
time. Here every band takes a slab that another has left, still warm. The memory is ours, outside PyTorch's allocator,
and all of it goes back to the system when the call ends: an idle process holds nothing.
"""

import ctypes
import functools
import mmap
import sys
from collections.abc import Callable
from math import prod
from types import TracebackType

import torch
from torch import Tensor

__all__ = ["Workspace", "trim_heap"]

ALIGNMENT = 64  # bytes: one cache line
HUGE_PAGE = 2**21


def trim_heap() -> None:
    """Give freed memory that glibc's allocator has kept back to the system; nothing where there is no glibc."""
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None


class Workspace:
    """Slabs of one size, and scratch areas that grow; a context manager that lets go of everything at its end.

    Args:
        slab_bytes: Size of the largest band; 0 where there are none: then PyTorch's allocator serves the scratch.
        device: "cpu", or "meta" to plan: then nothing has memory.
    """

    def __init__(self, slab_bytes: int, device: str = "cpu") -> None:
        self.slab_bytes = slab_bytes
        self.device = torch.device(device)
        self._free: list[Tensor] = []
        self._slabs: dict[int, Tensor] = {}
        self._areas: dict[str, Tensor] = {}

    def __enter__(self) -> "Workspace":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._free.clear()
        self._slabs.clear()
        self._areas.clear()

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return a contiguous tensor in a slab of its own, its values arbitrary; `give` it back in the end."""
        num_bytes = prod(shape) * dtype.itemsize
        assert num_bytes <= self.slab_bytes, f"a band of {num_bytes} bytes is larger than a slab, {self.slab_bytes}"
        slab = self._free.pop() if self._free else self._allocate(self.slab_bytes)
        band = slab[:num_bytes].view(dtype).view(shape)
        self._slabs[id(band)] = slab
        return band

    def give(self, band: Tensor) -> None:
        """Take back what `take` returned; its values are lost to whoever still looks."""
        self._free.append(self._slabs.pop(id(band)))

    def trim(self) -> None:
        """Let go of the slabs that nobody has taken, before something else needs the memory."""
        self._free.clear()

    def scratch(self, area: str, shape: tuple[int, ...], dtype: torch.dtype = torch.uint8) -> Tensor:
        """Return room in a named area, starting at a page, its values arbitrary; good until the area's next use."""
        num_bytes = prod(shape) * dtype.itemsize
        if area not in self._areas or self._areas[area].numel() < num_bytes:
            self._areas.pop(area, None)
            self._areas[area] = self._allocate(num_bytes)
        return self._areas[area][:num_bytes].view(dtype).view(shape)

    def _allocate(self, num_bytes: int) -> Tensor:
        """Memory that is gone with the last reference; for bands fresh pages, huge where the system has them."""
        if self.device.type == "meta" or not self.slab_bytes:
            return torch.empty(num_bytes, dtype=torch.uint8, device=self.device)
        pages = mmap.mmap(-1, num_bytes + HUGE_PAGE)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            pages.madvise(mmap.MADV_HUGEPAGE)
        whole = torch.frombuffer(pages, dtype=torch.uint8)
        start = -whole.data_ptr() % HUGE_PAGE
        return whole[start : start + num_bytes]
