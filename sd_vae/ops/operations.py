"""What the model calls for its heavy steps, one function an operation; `dispatch` says which version of each runs.

Arguments are modules, not weights, so that the reference is the plain call, with every hook, adapter and offloader that
hangs on it. Feature maps are (B, D, H, W); fast versions take and give channels_last.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from sd_vae.ops import dispatch

__all__ = ["attention", "conv1x1", "conv3x3", "downsample_conv", "group_norm_silu", "lay_out", "upsample_conv"]

SILU = nn.SiLU()
_statistics_of_sums = WeakTensorKeyDictionary()  # with the sum's version; gone with the sum
MAX_SCORE_BYTES = 2 * 2**30
"""Attention scores held at once where the backend holds them all."""


def lay_out(x: Tensor) -> Tensor:
    """Return x in the memory format that the fast versions want, channels_last; untouched where they cannot run."""
    if dispatch.opaque(x) or x.device.type not in ("cpu", "cuda"):
        return x
    return x.contiguous(memory_format=torch.channels_last)


def group_norm_silu(x: Tensor, norm: nn.Module, nonlinearity: nn.Module = SILU) -> Tensor:
    """Return nonlinearity(norm(x)), same shape.

    Args:
        x: Feature map (B, D, H, W).
        norm: GroupNorm with D channels.
        nonlinearity: SiLU, or another, by the reference.
    """
    choice = dispatch.choose_norm(x, norm, nonlinearity)
    group_norm: Any = norm
    if choice.version == "triton":
        from sd_vae.ops import triton_norm

        return triton_norm.group_norm_silu(
            x,
            group_norm.weight,
            group_norm.bias,
            group_norm.num_groups,
            group_norm.eps,
            silu=True,
            statistics=_known_statistics(x),
        )
    if choice.version == "compiled":
        from sd_vae.ops import compiled

        return compiled.group_norm_silu(x, group_norm)
    return nonlinearity(norm(x))


def conv3x3(x: Tensor, conv: nn.Module, residual: Tensor | None = None) -> Tensor:
    """Return conv(x), plus the residual where there is one: (B, D_in, H, W) to (B, D_out, H, W).

    Args:
        x: Feature map.
        conv: 3x3 convolution with padding 1.
        residual: (B, D_out, H, W), not changed.
    """
    if dispatch.choose_conv3x3(x, conv, residual).version == "compiled":
        from sd_vae.ops import compiled

        module: Any = conv
        if dispatch.needs_gradient(x, conv) or (residual is not None and dispatch.needs_gradient(residual)):
            return compiled.Convolution.apply(x, module.weight, module.bias, residual)
        return compiled.convolve_map(x, module.weight, module.bias, residual, keep=not conv.training)
    h = conv(x)
    return h if residual is None else _add(residual, h)


def _add(residual: Tensor, h: Tensor) -> Tensor:
    """The sum; on a GPU with its statistics for the norm that follows, from the same pass."""
    if dispatch.choose_sum(residual, h).version != "triton":
        return residual + h
    from sd_vae.ops import triton_norm

    total, statistics = triton_norm.add_with_statistics(h, residual)
    if not total.is_inference():  # such a tensor does not count its changes
        _statistics_of_sums[total] = (statistics, total._version)
    return total


def _known_statistics(x: Tensor) -> Any:
    """What the pass that made x found, where nobody, such as a hook, has changed x in place since; None otherwise."""
    statistics, version = _statistics_of_sums.get(x, (None, None))
    return statistics if statistics is not None and version == x._version else None


def conv1x1(x: Tensor, conv: nn.Module) -> Tensor:
    """Return conv(x) for a 1x1 convolution: (B, D_in, H, W) to (B, D_out, H, W)."""
    if conv.training and dispatch.opaque(x):
        # As in diffusers: DDP wants the weight's gradient contiguous, whatever layout attention left x in.
        x = x.contiguous()
    return conv(x)


def upsample_conv(x: Tensor, conv: nn.Module) -> Tensor:
    """Return conv of x with every pixel repeated 2x2: (B, D, H, W) to (B, D, 2H, 2W).

    Args:
        x: Feature map.
        conv: 3x3 convolution with padding 1.
    """
    choice = dispatch.choose_upsample(x, conv)
    module: Any = conv
    if choice.version == "compiled":
        from sd_vae.ops import compiled

        return compiled.convolve_map(x, module.weight, module.bias, double=True, keep=not conv.training)
    if choice.version == "four-phase":
        from sd_vae.ops import four_phase

        return four_phase.upsample_conv(x, module.weight, module.bias)
    return conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def downsample_conv(x: Tensor, conv: nn.Module) -> Tensor:
    """Return conv of x padded by zeros on the right and at the bottom: (B, D, H, W) to (B, D, H/2, W/2).

    Stable Diffusion was trained with this padding.

    Args:
        x: Feature map.
        conv: 3x3 convolution with stride 2 and no padding of its own.
    """
    if dispatch.choose_downsample(x, conv).version == "compiled":
        from sd_vae.ops import compiled

        module: Any = conv
        return compiled.halve_map(x, module.weight, module.bias)
    return conv(F.pad(x, (0, 1, 0, 1)))


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return softmax(q k^T / sqrt(D)) v, all (B, 1, N, D).

    One head as wide as the map is outside the GPU's flash kernels, whose substitutes hold all N x N scores; queries go
    in pieces there, so that a piece's scores stay below 2 GiB. Every query still sees all keys.
    """
    device = dispatch.planned_device() if q.is_meta else q.device.type
    row_bytes = q.shape[0] * k.shape[2] * q.element_size()
    pieces = -(-q.shape[2] * row_bytes // MAX_SCORE_BYTES)
    if q.is_meta and device != "meta":
        # Where memory is planned: what the device would hold, and not what "meta" would.
        _scores = q.new_empty(0 if device == "cpu" else q.shape[2] * row_bytes // pieces, dtype=torch.uint8)
        return torch.empty_like(q)
    if device == "cpu" or pieces <= 1 or torch.compiler.is_compiling():
        return F.scaled_dot_product_attention(q, k, v)
    return _attend_in_pieces(q, k, v, pieces)


def _attend_in_pieces(q: Tensor, k: Tensor, v: Tensor, count: int) -> Tensor:
    """Attention of some queries after the others, each to all keys."""
    return torch.cat([F.scaled_dot_product_attention(part, k, v) for part in q.chunk(count, dim=2)], dim=2)
