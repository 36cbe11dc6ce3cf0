"""The compiled CPU kernels behind the operations, over whole maps (B, D, H, W) in fp32, and statistics of bands.

Maps are channels_last inside: one that is not is copied first. Results are ordinary tensors of the caller's.
"""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from sd_vae.ops import direct, kernels, weights, winograd
from sd_vae.ops.groupnorm import Statistics, scale_and_shift
from sd_vae.ops.threads import num_threads, run_together
from sd_vae.ops.workspace import Workspace

__all__ = ["Convolution", "band_statistics", "convolve_map", "group_norm_silu", "halve_map"]


def band_statistics(band: Tensor, num_groups: int) -> Statistics:
    """Return the statistics of a contiguous fp32 band (R, W, C), one piece a row."""
    num_rows, num_columns, num_channels = band.shape
    mean = np.empty((num_rows, num_channels), np.float64)
    second = np.empty((num_rows, num_channels), np.float64)
    plain = band.detach().numpy()
    threads = num_threads()

    def work(thread: int) -> None:
        part = slice(num_rows * thread // threads, num_rows * (thread + 1) // threads)
        kernels.statistics(plain[part], mean[part], second[part])

    run_together(work)
    return Statistics.of_channels(torch.from_numpy(mean), torch.from_numpy(second), num_columns, num_groups)


def group_norm_silu(x: Tensor, norm: nn.GroupNorm) -> Tensor:
    """Return silu(norm(x)); statistics in double precision."""
    source = _pixels(x)
    out = torch.empty_like(source)
    _, height, width, num_channels = source.shape
    num_pixels, threads = height * width, num_threads()
    for picture, target in zip(source, out, strict=True):
        affine = scale_and_shift([band_statistics(picture, norm.num_groups)], norm.weight, norm.bias, norm.eps)
        addresses = [part.data_ptr() for part in affine]
        start, end = picture.data_ptr(), target.data_ptr()

        def work(thread: int, start: int = start, end: int = end, addresses: list[int] = addresses) -> None:
            first, last = num_pixels * thread // threads, num_pixels * (thread + 1) // threads
            skip = 4 * num_channels * first
            kernels.normalise(start + skip, last - first, 4 * num_channels, *addresses, 1, end + skip)

        run_together(work)
    return out.permute(0, 3, 1, 2)


def convolve_map(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None, *, double: bool = False, keep: bool
) -> Tensor:
    """Return a 3x3 convolution with padding 1, by Winograd, plus a residual.

    Args:
        x: (B, D_in, H, W).
        weight: (D_out, D_in, 3, 3), any strides.
        bias: (D_out,).
        residual: (B, D_out, H, W), not changed.
        double: Convolve x with every pixel repeated 2x2.
        keep: Whether the transformed weights may be kept for the next call.
    """
    source = _pixels(x)
    batch_size, height, width, in_channels = source.shape
    scale = 2 if double else 1
    shape = (batch_size, scale * height, scale * width, len(bias))
    out = torch.empty(shape) if residual is None else _pixels(residual).clone()
    affine = winograd.Affine.identity(in_channels)
    rows = np.zeros((batch_size, height + 2), np.int64)
    rows[:, 1:-1] = source.data_ptr() + 4 * width * in_channels * np.arange(batch_size * height).reshape(batch_size, -1)
    with Workspace(0) as workspace:
        points = weights.transformed(weight, workspace, keep=keep)
        add = residual is not None
        winograd.convolve(rows, width, affine, points, bias.detach(), out, workspace, add=add, double=double)
    return out.permute(0, 3, 1, 2)


def halve_map(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return a 3x3 convolution with stride 2 of x padded on the right and at the bottom, even H and W."""
    source = _pixels(x)
    batch_size, height, width, in_channels = source.shape
    out = torch.empty(batch_size, height // 2, width // 2, len(bias))
    rows = np.zeros(height + 1, np.int64)
    with Workspace(0) as workspace:
        panels = direct.panels(weight, workspace)
        for picture, target in zip(source, out, strict=True):
            rows[:-1] = picture.data_ptr() + 4 * width * in_channels * np.arange(height)
            direct.convolve_directly(rows, width, panels, bias.detach(), target, workspace, taps=3, stride=2)
    return out.permute(0, 3, 1, 2)


class Convolution(torch.autograd.Function):
    """`convolve_map` with its gradient: the data's with turned weights, and the weights', both by Winograd."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None) -> Tensor:
        """Return conv3x3(x) + bias + residual; weights in training are transformed at every call."""
        ctx.save_for_backward(x, weight)
        return convolve_map(x, weight, bias, residual, keep=False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, weight, bias and residual."""
        x, weight = ctx.saved_tensors
        (grad,) = grads
        wants_x, wants_weight, wants_bias, wants_residual = ctx.needs_input_grad
        grad_x = grad_weight = grad_bias = None
        if wants_x:
            turned = weight.flip(2, 3).transpose(0, 1)
            if winograd.unsupported(turned.shape[1], turned.shape[0]) is None:
                grad_x = Convolution.apply(grad, turned, grad.new_zeros(turned.shape[0]), None)
            else:
                grad_x = F.conv2d(grad, turned, padding=1)
        if wants_weight:
            grad_weight = WeightGradient.apply(x, grad)
        if wants_bias:
            grad_bias = grad.sum((0, 2, 3))
        return grad_x, grad_weight, grad_bias, grad if wants_residual else None


class WeightGradient(torch.autograd.Function):
    """The gradient of a 3x3 convolution's weights, by Winograd, from its source and its result's gradient."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, grad: Tensor) -> Tensor:
        """Return (D_out, D_in, 3, 3)."""
        ctx.save_for_backward(x, grad)
        source, gradient = _pixels(x), _pixels(grad)
        with Workspace(0) as workspace:
            return winograd.weight_gradient(source, gradient, workspace)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradients of both, which it is linear in: plain convolutions with the gradient as weights."""
        x, grad = ctx.saved_tensors
        (weight,) = grads
        turned = weight.flip(2, 3).transpose(0, 1)
        return F.conv2d(grad, turned, padding=1), F.conv2d(x, weight, padding=1)


def _pixels(x: Tensor) -> Tensor:
    """A map as pixels in order, (B, H, W, D), contiguous; a copy where it is laid out otherwise."""
    return x.detach().permute(0, 2, 3, 1).contiguous()
