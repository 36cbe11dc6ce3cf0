"""What happens when encode or decode overflows in half precision: the run is repeated in a wider dtype, or refused.

The live weights stay as they are, and no second model is made: `_Widening` casts what each operation is given, just
before it runs. So the second run takes the very same path, whatever tiling, offloading hooks, adapters or attention
processors the model has, other threads do not notice, and gradients reach the live weights.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

from sd_vae.errors import UserError
from sd_vae.ops.dispatch import reference

if TYPE_CHECKING:
    from sd_vae.autoencoder import AutoencoderKL
    from sd_vae.checks import Action

__all__ = ["Overflow", "mend_overflow", "wider_dtype"]

_SUMS = frozenset({Tensor.add, Tensor.add_, torch.add})
_LAYERS = frozenset({torch.conv2d, F.linear, F.group_norm, F.scaled_dot_product_attention})


@dataclass(frozen=True, kw_only=True)
class Overflow:
    """The first result of a run that half precision does not hold."""

    place: str
    """Layer, or `the sum after` the layer that was added."""
    magnitude: float
    """Its largest magnitude."""


def mend_overflow(vae: AutoencoderKL, action: Action, given: Tensor, half: torch.dtype, *, repeat: bool) -> Tensor:
    """Return what encode or decode gives in a wider dtype, after it overflowed in half precision.

    Args:
        vae: The model; its weights are not changed.
        action: What to run.
        given: Images or latents, finite.
        half: The dtype that overflowed, float16 or bfloat16.
        repeat: Run again in `wider_dtype` and warn; else only find the layer and raise.

    Returns:
        Moments or pictures, in `half` where they fit and else in the wider dtype.

    Raises:
        UserError: `repeat` is False, weights are not finite, or the wider dtype overflows too.
    """
    damaged = [name for name, weight in vae.named_parameters() if not weight.is_meta and not weight.isfinite().all()]
    if damaged:
        count = f"{len(damaged)} weight tensors are" if len(damaged) > 1 else "1 weight tensor is"
        raise UserError(
            f"{action} gave values that are not finite because {count} not finite, {damaged[0]}; load the VAE in "
            "bfloat16 or float32, and if they are not finite there either use another copy."
        )
    wide = wider_dtype(half, given.device) if repeat else half
    widening = _Widening(vae, half, wide)
    # The fast kernels read memory behind PyTorch's back, where nothing has been cast.
    with _uncompiled(), reference(), torch.autocast(given.device.type, enabled=False), widening:
        result = _run(vae, action, given.to(wide))
    what = f"{action} overflowed {_name(half)} {_describe(widening.first, half)}"
    if not repeat:
        raise UserError(
            f'{what}; set_overflow is "raise": load the VAE in bfloat16 or float32, or convert it once with '
            "sd-vae convert --fp16-safe."
        )
    if not bool(result.isfinite().all()):
        raise UserError(
            f"{what}, and {_name(wide)} too; give it images in [-1, 1] or unscaled latents, and if it fails for those "
            "too the weights are damaged."
        )
    warnings.warn(
        f"{what}, so it was repeated in {_name(wide)}; load the VAE in bfloat16 or float32, or convert it once with "
        "sd-vae convert --fp16-safe.",
        RuntimeWarning,
        stacklevel=3,
    )
    narrow = result.to(half)
    return narrow if bool(narrow.isfinite().all()) else result


def wider_dtype(half: torch.dtype, device: torch.device) -> torch.dtype:
    """Return the dtype of a repeated run: bfloat16 after float16 on a GPU that computes in it, float32 otherwise."""
    if half == torch.float16 and device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16
    return torch.float32


class _Widening(TorchFunctionMode):
    """Casts half-precision tensors to `wide` as operations take them, and finds the first that `half` does not hold."""

    def __init__(self, vae: AutoencoderKL, half: torch.dtype, wide: torch.dtype) -> None:
        super().__init__()
        self.first: Overflow | None = None
        self._half, self._wide = half, wide
        self._names = {id(weight): name.rpartition(".")[0] for name, weight in vae.named_parameters()}
        self._layer = "the input"

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        taken = (args, dict(kwargs or {}))
        for tensor in tree_leaves(taken):
            self._layer = self._names.get(id(tensor), self._layer)
        args, kwargs = tree_map_only(Tensor, self._widen, taken)
        result = func(*args, **kwargs)
        if self.first is None and (func in _LAYERS or func in _SUMS):
            self._look(func, result)
        return result

    def _widen(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._wide) if tensor.dtype in (self._half, torch.float16) else tensor

    def _look(self, func: Callable[..., Any], result: Tensor) -> None:
        low, high = (float(bound) for bound in torch.aminmax(result.detach()))
        magnitude = max(-low, high)
        if not magnitude <= torch.finfo(self._half).max:  # NaN too
            place = f"the sum after {self._layer}" if func in _SUMS else self._layer
            self.first = Overflow(place=place, magnitude=magnitude)


def _run(vae: AutoencoderKL, action: Action, given: Tensor) -> Tensor:
    """Moments or pictures, one item at a time: a wide run takes up to twice the memory of the run that overflowed."""
    step: Callable[[Tensor], Any] = vae._encode if action == "encode" else vae._decode
    parts = [step(part) for part in given.split(1)]
    return torch.cat([getattr(part, "sample", part) for part in parts])  # diffusers' own _decode wraps its pictures


def _uncompiled() -> AbstractContextManager[object]:
    """Compiled code run as it was written: traced anew for one run, it would take long and hide its layers."""
    if "torch._dynamo" not in sys.modules:  # then nothing is compiled, and importing it takes seconds
        return nullcontext()
    return torch.compiler.set_stance("force_eager")


def _describe(first: Overflow | None, half: torch.dtype) -> str:
    limit = torch.finfo(half).max
    if first is None:
        return f"inside an operation (no layer's result is above {limit:.5g})"
    return f"at {first.place} (largest magnitude {first.magnitude:.3g}, it holds {limit:.5g})"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
