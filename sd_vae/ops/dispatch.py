"""Which version of an operation runs: decided here and nowhere else, from device, dtype, shape, grad mode and modules.

Every operation has a plain PyTorch reference, which calls the modules as they are; the others each state a domain, and
outside it the reference runs. `Choice.why` says in words what decided; `sd-vae bench` prints it.

Versions: "reference" (PyTorch), "compiled" (numba kernels on the CPU), "triton" (fused kernels on a GPU), "four-phase"
(doubling folded into the convolution, in PyTorch).
"""

from __future__ import annotations

import functools
import importlib.util
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sd_vae.ops.modules import is_plain

__all__ = ["Choice", "choose_conv3x3", "choose_downsample", "choose_norm", "choose_sum", "choose_upsample"]
__all__ += [
    "compiled_unavailable",
    "is_traced",
    "needs_gradient",
    "not_compiled",
    "opaque",
    "planned_device",
    "planned_for",
    "reference",
    "reference_is_forced",
]

Version = Literal["reference", "compiled", "triton", "four-phase"]

_planned: ContextVar[str] = ContextVar("sd_vae_planned_device", default="meta")
_forced: ContextVar[bool] = ContextVar("sd_vae_reference", default=False)

MIN_PIXELS = 2048
"""Below this many output pixels in a batch, transforming the weights costs what the convolution saves."""
MIN_FLOPS, MIN_FLOPS_IN_TRAINING = 1e9, 2.5e9
"""Below this many operations of the direct convolution, calling the kernels costs what they save; measured on two cores
by `benchmarks/training_step.py`."""


@dataclass(frozen=True)
class Choice:
    """A version and the reason for it."""

    version: Version
    why: str


@contextmanager
def reference() -> Iterator[None]:
    """Run every operation by its plain PyTorch reference, in this thread or task, until the block ends."""
    token = _forced.set(True)
    try:
        yield
    finally:
        _forced.reset(token)


@contextmanager
def planned_for(device: str) -> Iterator[None]:
    """Say which type of device tensors on "meta" stand for until the block ends."""
    token = _planned.set(device)
    try:
        yield
    finally:
        _planned.reset(token)


def planned_device() -> str:
    """The device type that an open `planned_for()` block names."""
    return _planned.get()


def reference_is_forced() -> bool:
    """Whether a `reference()` block is open."""
    return _forced.get()


@functools.cache
def compiled_unavailable() -> str | None:
    """Why the compiled CPU kernels cannot run on this machine; None where they can."""
    system, machine = platform.system(), platform.machine()
    if (system, machine) != ("Linux", "x86_64"):
        return f"the compiled kernels are for Linux on x86_64, not {system} on {machine}"
    if importlib.util.find_spec("numba") is None:
        return 'numba is not installed; pip install "sd-vae[fast]"'
    try:
        from sd_vae.ops import kernels, vectors  # noqa: F401
    except (ImportError, RuntimeError) as error:  # made for another numpy; nowhere to keep what it compiles
        return f"numba cannot be used: {error}"
    return None if vectors.has_fused_vectors() else "this processor lacks AVX2 or FMA"


def choose_conv3x3(x: Tensor, conv: nn.Module, residual: Tensor | None) -> Choice:
    """For a 3x3 convolution with padding 1."""
    reason = opaque(x) or not_compiled(x) or _not_a_conv(x, conv, stride=1)
    if reason is None and residual is not None and residual.dtype != x.dtype:
        reason = f"the residual is {residual.dtype}, x is {x.dtype}"
    if reason is None and _is_too_small(x, conv):
        reason = f"{tuple(x.shape)} is too small to gain"
    return Choice("reference", reason) if reason else Choice("compiled", "fp32 on the CPU: Winograd F(4x4, 3x3)")


def choose_upsample(x: Tensor, conv: nn.Module) -> Choice:
    """For nearest-neighbour doubling and a 3x3 convolution."""
    if reason := opaque(x) or _not_3x3(conv, stride=1):
        return Choice("reference", reason)
    grad = needs_gradient(x, conv)
    reason = "gradients are on" if grad else not_compiled(x) or _not_a_conv(x, conv, stride=1)
    if reason is None:
        return Choice("compiled", "fp32 on the CPU without gradients: Winograd of the doubled map, never made")
    return Choice("four-phase", f"exact on any device; not compiled: {reason}")


def choose_downsample(x: Tensor, conv: nn.Module) -> Choice:
    """For padding on the right and at the bottom and a 3x3 convolution with stride 2."""
    reason = opaque(x) or ("gradients are on" if needs_gradient(x, conv) else None)
    reason = reason or not_compiled(x) or _not_a_conv(x, conv, stride=2)
    if reason is None:
        return Choice("compiled", "fp32 on the CPU without gradients: no padded copy")
    return Choice("reference", reason)


def choose_norm(x: Tensor, norm: nn.Module, nonlinearity: nn.Module | None) -> Choice:
    """For GroupNorm with SiLU after it, or with nothing."""
    if reason := opaque(x):
        return Choice("reference", reason)
    if not is_plain(norm, nn.GroupNorm) or not (nonlinearity is None or is_plain(nonlinearity, nn.SiLU)):
        return Choice("reference", "not a plain GroupNorm with SiLU")
    group_norm: Any = norm
    if x.device.type == "cuda":
        from sd_vae.ops import triton_norm

        reason = triton_norm.supports(x, group_norm.num_groups)
        return Choice("reference", reason) if reason else Choice("triton", "on a GPU, channels_last, no gradients")
    reason = "gradients are on" if needs_gradient(x, norm) else not_compiled(x)
    if reason is None and group_norm.weight.dtype != x.dtype:
        reason = f"the weights are {group_norm.weight.dtype}"
    if reason is None and x.shape[1] % 16:
        reason = f"{x.shape[1]} channels are not a multiple of 16"
    return Choice("reference", reason) if reason else Choice("compiled", "fp32 on the CPU without gradients")


def choose_sum(residual: Tensor, h: Tensor) -> Choice:
    """For a residual sum, whose statistics the next norm needs."""
    if h.device.type != "cuda":
        return Choice("reference", f"h is on {h.device.type}")
    from sd_vae.ops import triton_norm

    reason = opaque(h) or triton_norm.supports(h, 1) or triton_norm.supports(residual, 1)
    if reason is None and residual.dtype != h.dtype:
        reason = f"the residual is {residual.dtype}, h is {h.dtype}"
    return Choice("reference", reason) if reason else Choice("triton", "on a GPU, channels_last, no gradients")


def opaque(x: Tensor) -> str | None:
    """Why nothing but PyTorch's own operations may touch x: something watches, traces or stands in for it."""
    if is_traced():  # first: a compiler would stumble over what follows
        return "being compiled or traced"
    if _forced.get():
        return "the reference is forced"
    if type(x) not in (Tensor, nn.Parameter) or x.device.type == "meta":
        return f"{type(x).__name__} on {x.device.type} has no memory to read"
    if torch._C._len_torch_dispatch_stack() or torch._C._functorch.peek_interpreter_stack() is not None:
        return "a dispatch mode or function transform is active"
    if torch.autograd.forward_ad._current_level >= 0:
        return "forward-mode differentiation is active"
    if torch.is_autocast_enabled(x.device.type):
        return "autocast is on"
    return None


def is_traced() -> bool:
    """Whether torch.compile, torch.export or torch.jit is watching."""
    return torch.compiler.is_compiling() or bool(torch._C._get_tracing_state())


def needs_gradient(x: Tensor, *modules: nn.Module) -> bool:
    """Whether autograd records what happens to x and these modules' weights."""
    if not torch.is_grad_enabled():
        return False
    return x.requires_grad or any(p.requires_grad for module in modules for p in module.parameters())


def _is_too_small(x: Tensor, conv: Any) -> bool:
    """Whether the kernels' fixed costs exceed what they save on this map."""
    num_pixels = x.shape[0] * x.shape[2] * x.shape[3]
    flops = 18 * conv.in_channels * conv.out_channels * num_pixels
    return num_pixels < MIN_PIXELS or flops < (MIN_FLOPS_IN_TRAINING if needs_gradient(x, conv) else MIN_FLOPS)


def not_compiled(x: Tensor) -> str | None:
    """Why the compiled kernels cannot take x."""
    if x.device.type != "cpu" or x.dtype != torch.float32:
        return f"x is {str(x.dtype).removeprefix('torch.')} on {x.device.type}, not float32 on the CPU"
    if x.dim() != 4 or not x.numel():
        return f"x has shape {tuple(x.shape)}, not (B, D, H, W)"
    return compiled_unavailable()


def _not_3x3(conv: nn.Module, stride: int) -> str | None:
    """Why a module is not a plain 3x3 convolution of this stride, with the padding that the model gives it."""
    if not is_plain(conv, nn.Conv2d):
        return f"{type(conv).__name__} is not a plain convolution, or carries a hook"
    module: Any = conv
    padding = (1, 1) if stride == 1 else (0, 0)
    shape = (module.kernel_size, module.stride, module.padding, module.dilation, module.groups, module.padding_mode)
    return None if shape == ((3, 3), (stride, stride), padding, (1, 1), 1, "zeros") else "not a plain 3x3 convolution"


def _not_a_conv(x: Tensor, conv: nn.Module, stride: int) -> str | None:
    """Why a module is not a convolution that the compiled kernels know."""
    if reason := _not_3x3(conv, stride):
        return reason
    from sd_vae.ops.winograd import unsupported

    module: Any = conv
    if module.bias is None or not module.bias.is_contiguous():
        return "the bias is missing, or is not contiguous"
    for weight in (module.weight, module.bias):
        if type(weight) not in (Tensor, nn.Parameter):
            return f"the weights are {type(weight).__name__}"
        if weight.dtype != x.dtype or weight.device != x.device:
            return f"the weights are {weight.dtype} on {weight.device}"
    return unsupported(module.in_channels, module.out_channels)
