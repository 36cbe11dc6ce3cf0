"""What every tensor is checked for at the model's door: shape always, finiteness where it costs nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from sd_vae.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from sd_vae.autoencoder import AutoencoderKL

__all__ = ["Action", "ensure_finite", "require_image", "require_latent", "set_checks", "set_overflow"]

Action = Literal["encode", "decode"]
"""A method whose result is looked at."""

_check_everywhere = False
_overflow: Literal["repeat", "raise"] = "repeat"


def set_checks(enabled: bool) -> None:
    """Check that tensors are finite on a GPU too, where looking costs a synchronisation; on the CPU it is always on."""
    global _check_everywhere
    _check_everywhere = enabled


def set_overflow(policy: Literal["repeat", "raise"]) -> None:
    """Choose what follows where encode or decode overflows in half precision, for every model in this process.

    Args:
        policy: "repeat", the default, runs it once more in a wider dtype and warns; "raise" raises a `UserError`. Both
            name the layer that overflowed first.

    Raises:
        UserError: Another policy.
    """
    global _overflow
    if policy not in ("repeat", "raise"):
        raise UserError(f"unknown overflow policy {policy!r}; choose repeat or raise.")
    _overflow = policy


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


def ensure_finite(vae: AutoencoderKL, action: Action, given: Tensor, result: Tensor) -> Tensor:
    """Return the result of encode or decode, known to be finite wherever it was looked at.

    Looks on the CPU, at every result in half precision, and everywhere after `set_checks(True)`; never while compiling
    or capturing, nor while weights in another dtype than the result's are trained: a trainer looks at its loss. Half
    precision overflows where other dtypes do not, so there a look is worth the synchronisation that it costs on a GPU,
    and its overflow is repeated or raised, as `set_overflow` says.

    Args:
        vae: The model.
        action: Which of its methods gave the result.
        given: What that was given.
        result: What it gave.

    Returns:
        `result` itself, or the outcome of the repeated run.

    Raises:
        UserError: A value is not finite; says whether it came in or arose inside.
    """
    import torch

    is_half = result.dtype in (torch.float16, torch.bfloat16)
    is_of_weights = is_half and next(vae.parameters(), result).dtype == result.dtype
    if vae.training and torch.is_grad_enabled() and not is_of_weights:
        return result
    if torch.compiler.is_compiling() or result.device.type == "meta":
        return result
    if not (is_half or result.device.type == "cpu" or _check_everywhere):
        return result
    if result.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return result
    if bool(result.isfinite().all()):
        return result
    num_bad = int((~given.isfinite()).sum())
    if num_bad:
        raise UserError(
            f"{action} was given {num_bad} values that are not finite, of {given.numel()}; clean its input first."
        )
    if is_half:
        from sd_vae.half_precision.overflow import mend_overflow

        return mend_overflow(vae, action, given, result.dtype, repeat=_overflow == "repeat")
    raise UserError(
        f"{action} gave values that are not finite in {str(result.dtype).removeprefix('torch.')} from an input of "
        f"largest magnitude {float(given.abs().max()):.1e}; give it images in [-1, 1] or unscaled latents, and if it "
        "fails for those too the weights are damaged."
    )
