"""What every tensor is checked for at the model's door: shape always, finiteness where it costs nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sd_vae.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["require_finite", "require_image", "require_latent", "set_checks"]

_check_everywhere = False


def set_checks(enabled: bool) -> None:
    """Check that tensors are finite on a GPU too, where looking costs a synchronisation; on the CPU it is always on."""
    global _check_everywhere
    _check_everywhere = enabled


def require_image(x: Tensor, num_channels: int, factor: int) -> None:
    """Check that x can be encoded.

    Raises:
        UserError: x is not (B, num_channels, H, W) with H and W positive multiples of `factor`.
    """
    _require_shape("x", x, num_channels)
    height, width = x.shape[-2:]
    if height % factor or width % factor or not height or not width:
        raise UserError(
            f"image size {height}x{width} is not a multiple of {factor} in both directions; "
            f"pad it with sd_vae.pad_to_factor(x, {factor}) and crop the reconstruction back, or resize it."
        )


def require_latent(z: Tensor, num_channels: int) -> None:
    """Check that z can be decoded.

    Raises:
        UserError: z is not (B, num_channels, h, w).
    """
    _require_shape("z", z, num_channels)
    if not z.shape[-1] or not z.shape[-2]:
        raise UserError(f"z has shape {tuple(z.shape)}, which holds no latent cell; give it at least 1x1.")


def _require_shape(name: str, tensor: Tensor, num_channels: int) -> None:
    import torch

    if not isinstance(tensor, torch.Tensor):
        raise UserError(
            f"{name} is of type {type(tensor).__name__}, it must be a tensor; pictures go through to_tensor."
        )
    if tensor.dim() != 4 or not len(tensor):
        raise UserError(
            f"{name} has shape {tuple(tensor.shape)}, it must be (batch, {num_channels}, height, width) "
            "with at least one item; add the batch dimension with unsqueeze(0)."
        )
    if tensor.shape[1] != num_channels:
        raise UserError(
            f"{name} has {tensor.shape[1]} channels, this VAE takes {num_channels}; "
            "convert the picture to RGB, or load the VAE that the latents belong to."
        )
    if not tensor.is_floating_point():
        raise UserError(f"{name} has dtype {tensor.dtype}, it must be a float type; pictures go through to_tensor.")


def require_finite(module: torch.nn.Module, action: str, given: Tensor, result: Tensor) -> None:
    """Check input and result of encode or decode for NaN and infinity.

    Looks on the CPU, and on a GPU after `set_checks(True)`; never while training, compiling or capturing.

    Raises:
        UserError: A value is not finite; says whether it came in or arose inside.
    """
    import torch

    if module.training or torch.compiler.is_compiling() or not (result.device.type == "cpu" or _check_everywhere):
        return
    if result.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return
    if bool(result.isfinite().all()):
        return
    num_bad = int((~given.isfinite()).sum())
    if num_bad:
        raise UserError(
            f"{action} was given {num_bad} values that are not finite, of {given.numel()}; clean its input first."
        )
    raise UserError(
        f"{action} gave values that are not finite in {str(result.dtype).removeprefix('torch.')}; run it in float32 or "
        "bfloat16, and if it fails there too the weights are damaged."
    )
