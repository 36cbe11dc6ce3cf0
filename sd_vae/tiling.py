"""Encoding and decoding in row bands: exact, whatever the size, and within a budget of memory.

A tile that takes its own GroupNorm statistics comes out in its own contrast; that is the seam in other tools' tiling.
Here a feature map is held as bands of rows, and no band is normalised before the statistics of the whole map are known,
so the result is the untiled one up to rounding (1e-4 of the largest magnitude in fp32, measured 2e-5). On the CPU in
fp32 bands are also the fastest way, so encode and decode use them unasked wherever no gradient is recorded.

What a run will take is known before it starts: `plan_memory` walks through the same code with tensors that have a
shape and no memory, and counts.
"""

from __future__ import annotations

import warnings
from numbers import Real
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor, nn

from sd_vae.banded.measures import Measure, MemoryPlan, choose_measure, plan_memory
from sd_vae.errors import UserError
from sd_vae.ops import dispatch, forget_weights
from sd_vae.ops.modules import hooked, pads_zeros, watched

if TYPE_CHECKING:
    from sd_vae.autoencoder import AutoencoderKL

__all__ = ["ExactTiling", "Measure", "MemoryPlan", "in_bands", "plan_memory", "why_whole"]


class ExactTiling:
    """The part of `AutoencoderKL` that turns tiling on and off, and drops what fast inference keeps."""

    use_tiling: bool
    max_memory_gib: float | None

    def train(self, mode: bool = True) -> Any:
        """Set training mode, or end it; transformed weights that inference kept are dropped."""
        forget_weights(self)  # type: ignore[arg-type]
        return super().train(mode)  # type: ignore[misc]

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Load weights as usual; what was kept of the old ones is dropped."""
        forget_weights(self)  # type: ignore[arg-type]
        return super().load_state_dict(*args, **kwargs)  # type: ignore[misc]

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        forget_weights(self)  # type: ignore[arg-type]
        return super()._apply(*args, **kwargs)  # type: ignore[misc]

    def enable_tiling(self, use_tiling: bool = True, *, max_memory_gib: float | None = None) -> None:
        """Encode and decode in row bands from now on; the results stay the untiled ones.

        Args:
            use_tiling: False turns it off again.
            max_memory_gib: Memory that a call may take above the loaded weights, in GiB, for one picture at a time.
                The first measure that fits is taken: larger bands, smaller bands, on a GPU bands kept in host memory.
                None takes bands of the default size. A call whose picture cannot fit raises before it allocates.

        Raises:
            UserError: `use_tiling` is no switch, or the budget no positive number.
        """
        if not isinstance(use_tiling, bool):
            raise UserError(f"use_tiling is {use_tiling!r}, it must be True or False; a budget is max_memory_gib=1.5.")
        if max_memory_gib is not None and not _is_positive(max_memory_gib):
            raise UserError(
                f"max_memory_gib is {max_memory_gib!r}, it must be a positive number of GiB, or None for no budget."
            )
        self.use_tiling = use_tiling
        self.max_memory_gib = max_memory_gib if use_tiling else None

    def disable_tiling(self) -> None:
        """Turn tiling off, and lift its budget."""
        self.enable_tiling(False)

    def tiled_decode(self, z: Tensor, return_dict: bool = True) -> Any:
        """Return `decode(z)` in row bands, whatever `enable_tiling` says; the name is diffusers'."""
        return self._while_tiling(lambda vae: vae.decode(z, return_dict=return_dict))

    def tiled_encode(self, x: Tensor, return_dict: bool = True) -> Any:
        """Return `encode(x)` in row bands, whatever `enable_tiling` says; the name is diffusers'."""
        return self._while_tiling(lambda vae: vae.encode(x, return_dict=return_dict))

    def _while_tiling(self, run: Any) -> Any:
        before = self.use_tiling
        self.use_tiling = True
        try:
            return run(self)
        finally:
            self.use_tiling = before


def _is_positive(number: object) -> bool:
    """Whether this is a number above zero; NaN is none, and neither is True."""
    return isinstance(number, Real) and not isinstance(number, bool) and float(number) > 0


def in_bands(vae: AutoencoderKL, action: Literal["encode", "decode"], x: Tensor) -> Tensor | None:
    """Return the encoder's or decoder's result in row bands, or None where the plain forward pass is to run.

    Args:
        vae: The model.
        action: Which half.
        x: Images, or latents after post_quant_conv.

    Raises:
        UserError: `max_memory_gib` cannot be met; names the smallest that can.
    """
    half: nn.Module = vae.encoder if action == "encode" else vae.decoder
    reason = why_whole(vae, action, x)
    if reason is not None:
        if vae.use_tiling and not dispatch.is_traced():
            warnings.warn(f"{action} runs untiled although tiling is on: {reason}.", stacklevel=4)
        return None
    measure = choose_measure(vae, action, x)
    keep_weights = not (vae.use_tiling or vae.training)
    return measure.run(half, action, x, keep_weights=keep_weights, num_groups=vae.config.norm_num_groups)


def why_whole(vae: AutoencoderKL, action: Literal["encode", "decode"], x: Tensor) -> str | None:
    """Return why the plain forward pass runs, over whole maps; None where row bands do.

    Args:
        vae: The model.
        action: Which half.
        x: What it is given; only its type, device, dtype and shape count.
    """
    half: nn.Module = vae.encoder if action == "encode" else vae.decoder
    reason = _cannot(half, x)
    return reason if reason is not None or vae.use_tiling else _is_not_faster(half, x)


def _cannot(half: nn.Module, x: Tensor) -> str | None:
    """Why a half cannot run in bands at all."""
    if dispatch.is_traced():
        return "it is being compiled or traced"
    if type(x) not in (Tensor, nn.Parameter) or x.device.type == "meta":
        return f"{type(x).__name__} on {x.device.type} has no memory to read"
    if dispatch.needs_gradient(x, half):
        return "gradients are recorded; call it under torch.no_grad()"
    for name, module in half.named_modules():
        if hasattr(module, "_diffusers_hook"):
            return f"{name or 'the model'} is offloaded by groups; use enable_model_cpu_offload instead"
        if isinstance(module, nn.Conv2d) and not pads_zeros(module):
            return f"{name} does not pad with zeros"
        if name.endswith("nonlinearity") and not isinstance(module, nn.SiLU):
            return f"{name} is {type(module).__name__}, and bands are written for SiLU"
        if not _is_called(name) and watched(module):
            return f"{name or 'the model'} has a hook, which bands would pass by"
    return None


def _is_called(name: str) -> bool:
    """Whether bands call a module of this name, or what holds it: convolutions and attention, and nothing else."""
    return any(
        part == "attentions" or (part.startswith("conv") and part != "conv_norm_out") for part in name.split(".")
    )


def _is_not_faster(half: nn.Module, x: Tensor) -> str | None:
    """Why bands would gain nothing, or would pass by something that hangs on a module's call."""
    if reason := dispatch.opaque(x) or dispatch.not_compiled(x):
        return reason
    with_hook = next((name for name, module in half.named_modules() if hooked(module)), None)
    if with_hook is not None:
        return f"{with_hook or 'the model'} has a hook"
    if next(half.parameters()).dtype != x.dtype:
        return "the weights have another dtype"
    return None
