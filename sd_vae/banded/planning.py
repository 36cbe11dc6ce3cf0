"""Peak memory of a run, counted by running it without memory."""

from __future__ import annotations

import functools
import json
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sd_vae.banded.bands import Bands
from sd_vae.banded.engines import CompiledEngine, Norm, Prepared, TorchEngine
from sd_vae.config import VAEConfig
from sd_vae.ops import dispatch
from sd_vae.ops.groupnorm import Statistics

if TYPE_CHECKING:
    from sd_vae.autoencoder import AutoencoderKL
    from sd_vae.banded.measures import Action, Measure

__all__ = ["PeakMemory", "PlannedEngine", "SpilledPlan", "predict"]

_on_host: ContextVar[bool] = ContextVar("sd_vae_on_host", default=False)

NOTHING = Statistics(*(torch.empty(0),) * 3)
LIBRARY_BYTES = 86 * 2**20
"""What numba and its compiled kernels take once in a process, measured with a picture of 8x8."""
HEAP_BYTES = 45 * 2**20
"""What a CPU process takes beside tensors: PyTorch's own, and freed blocks below 32 MiB that glibc keeps; measured at
256x256, where it was 17 to 105."""
HALF_HEAP_BYTES = 95 * 2**20
"""The same in half precision, for which oneDNN compiles kernels of its own and makes wider copies; measured at 256x256
in bands, where it was 75 to 105."""


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of every tensor made inside the block while it lives; `peak_bytes` is the most at once.

    Args:
        known: Tensors from outside whose views are not to be counted.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak_bytes = 0
        self._live_bytes = 0
        self._seen = weakref.WeakSet(tensor.untyped_storage() for tensor in known)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and count what it made."""
        result = func(*args, **(kwargs or {}))
        is_convolution = func is torch.ops.aten.convolution.default and dispatch.planned_device() == "cpu"
        if is_convolution and _is_channels_last(args[0]):
            result = result.to(memory_format=torch.channels_last)  # as the device would; "meta" forgets it
        for leaf in [result] if isinstance(result, Tensor) else tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._count(leaf.untyped_storage())
        if is_convolution:
            self.peak_bytes = max(self.peak_bytes, self._live_bytes + _reordered_bytes(*args[:2]))
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage in self._seen:
            return
        self._seen.add(storage)
        if _on_host.get():
            return
        num_bytes = storage.nbytes()
        self._live_bytes += num_bytes
        self.peak_bytes = max(self.peak_bytes, self._live_bytes)
        weakref.finalize(storage, self._discount, num_bytes)

    def _discount(self, num_bytes: int) -> None:
        self._live_bytes -= num_bytes


def _reordered_bytes(x: Tensor, weight: Tensor) -> int:
    """What oneDNN copies into layouts of its own for a convolution: the weights, and a source in NCHW; measured.

    Half precision runs in channels_last, whatever the layout on "meta".
    """
    if x.dtype != torch.float32 or _is_channels_last(x):
        return 2 * weight.nbytes if weight.shape[-1] > 1 else 0
    return x.nbytes + weight.nbytes


def _is_channels_last(x: Tensor) -> bool:
    """Whether pixels lie in order, which the plain network's maps do after the attention of a batch above one."""
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


class PlannedEngine(CompiledEngine):
    """The compiled engine without its kernels: takes the scratch memory that they take, and computes nothing."""

    def statistics(self, band: Tensor) -> Statistics:  # noqa: D102
        return NOTHING

    def norm(self, source: Bands, norm: torch.nn.GroupNorm) -> Norm:  # noqa: D102
        return norm.weight, norm.bias

    def convolve(  # noqa: D102
        self, source: Bands, start: int, stop: int, conv: Any, norm: Norm | None, out: Tensor, *, add: bool
    ) -> None:
        if isinstance(conv, Prepared):
            self._book(source, out, double=False)
        else:
            super().convolve(source, start, stop, conv, norm, out, add=add)

    def double(self, source: Bands, start: int, stop: int, conv: Any, out: Tensor) -> None:  # noqa: D102
        if isinstance(conv, Prepared):
            self._book(source, out, double=True)
        else:
            super().double(source, start, stop, conv, out)

    def run_directly(self, rows: Any, source: Any, conv: Prepared, out: Tensor, *, taps: int, stride: int) -> None:  # noqa: D102
        from sd_vae.ops.direct import scratch_bytes

        self.workspace.scratch("winograd", (scratch_bytes(taps, source.channels),))

    def _book(self, source: Bands, out: Tensor, *, double: bool) -> None:
        from sd_vae.ops.winograd import scratch_bytes

        height, width, channels = out.shape
        num_bytes = scratch_bytes(height, width, source.channels, channels, double=double)
        self.workspace.scratch("winograd", (num_bytes,))


class SpilledPlan(TorchEngine):
    """PyTorch's engine with maps in host memory, which does not count: a GPU's budget is of its own."""

    def take(self, num_rows: int, width: int, channels: int) -> Tensor:  # noqa: D102
        with _uncounted():
            return super().take(num_rows, width, channels)

    def bring(self, rows: Tensor) -> Tensor:  # noqa: D102
        return torch.empty_like(rows)  # on "meta" moving would copy nothing


@contextmanager
def _uncounted() -> Iterator[None]:
    """What is made inside the block is not on the device that is planned for."""
    token = _on_host.set(True)
    try:
        yield
    finally:
        _on_host.reset(token)


@functools.lru_cache(maxsize=1024)
def predict(
    config: str,
    action: Action,
    batch_size: int,
    height: int,
    width: int,
    dtype: torch.dtype,
    device: str,
    measure: Measure | None,
) -> int:
    """Return the peak bytes of a call above the loaded weights; input and result are counted.

    Args:
        config: `VAEConfig` as JSON.
        action: Which half.
        batch_size: Pictures.
        height: Pixels.
        width: Pixels.
        dtype: Of weights and activations.
        device: Type of the device, "cpu" or "cuda".
        measure: How; None for the plain forward pass.
    """
    vae = _skeleton(config, dtype)
    num_channels, factor = vae.config.in_channels, 1
    if action == "decode":
        num_channels, factor = vae.config.latent_channels, vae.factor
    half = vae.encoder if action == "encode" else vae.decoder
    with PeakMemory(half.parameters()) as memory, dispatch.planned_for(device), torch.no_grad():
        x = torch.empty(batch_size, num_channels, height // factor, width // factor, dtype=dtype, device="meta")
        if measure is None:
            half(x)
        else:
            measure.run(half, action, x, keep_weights=False, num_groups=vae.config.norm_num_groups)
    if device != "cpu":
        return memory.peak_bytes
    libraries = LIBRARY_BYTES if measure is not None and measure.compiled else 0
    return memory.peak_bytes + libraries + (HALF_HEAP_BYTES if dtype.itemsize < 4 else HEAP_BYTES)


@functools.lru_cache(maxsize=8)
def _skeleton(config: str, dtype: torch.dtype) -> AutoencoderKL:
    """The model without memory."""
    from sd_vae.autoencoder import AutoencoderKL

    fields = VAEConfig.from_dict(json.loads(config), source="the model").to_dict()
    with torch.device("meta"):
        vae = AutoencoderKL(**fields).eval()
    return torch.nn.Module.to(vae, dtype)  # past diffusers' own, which logs a warning
