"""Latent scales of the model families, and moving a VAE from one to another exactly.

LDM and web-UI files carry weights and no scale: the program that reads them takes it from the model family. A VAE of
another scale is therefore folded before it is written: its 1x1 convolutions absorb the difference, so that the family's
scale applied to the new z gives the latents that the VAE's own scale gave to the old z.

Source: scales of the reference configs of stable-diffusion-v1-5, sdxl-vae, stable-diffusion-3 and FLUX.1, the presets
of `sd_vae.config`.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

from sd_vae.config import PRESETS, VAEConfig
from sd_vae.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["FAMILIES", "family_of", "fold", "fold_scale", "latent_scale"]

FAMILIES = {name: PRESETS[name] for name in ("sd1", "sdxl", "sd3", "flux")}
"""Model family to the config of its VAE; sd1 stands for Stable Diffusion 1 and 2."""


def family_of(config: VAEConfig) -> str | None:
    """Return the family whose scale and shift a VAE has, or None."""
    if config.latents_mean is not None:
        return None
    for name, family in FAMILIES.items():
        if math.isclose(config.scaling_factor, family.scaling_factor, rel_tol=1e-6) and math.isclose(
            config.shift_factor or 0.0, family.shift_factor or 0.0, rel_tol=1e-6, abs_tol=1e-9
        ):
            return name
    return None


def latent_scale(config: VAEConfig) -> tuple[list[float], list[float]]:
    """Return scale and shift of each latent channel: latents = (z - shift) * scale."""
    channels = config.latent_channels
    if config.latents_mean is None or config.latents_std is None:
        return [config.scaling_factor] * channels, [config.shift_factor or 0.0] * channels
    return [config.scaling_factor / deviation for deviation in config.latents_std], list(config.latents_mean)


def fold(tensors: dict[str, Tensor], config: VAEConfig, family: str) -> tuple[dict[str, Tensor], VAEConfig]:
    """Return weights and config of the same autoencoder with a family's scale and shift.

    With own latents (z - s) c and the family's (z' - s_f) c_f, equal latents need z' = a z + b with a = c / c_f and
    b = s_f - a s, per channel. The last convolution before z gets a and b in its mean rows and
    2 ln a in the bias of its logvar rows; the first one after z gets the inverse. Computed in float64. Posterior and
    decodes are those of before, except where logvar touches its clamp at -30 or 20.

    Args:
        tensors: Weights by diffusers name; not changed.
        config: Their config.
        family: One of `FAMILIES`.

    Raises:
        UserError: Unknown family, one with another number of latent channels, or b is not zero and there is no
            post_quant_conv: decoder.conv_in pads with zeros, so a shift folded into it would be wrong at the border.
    """
    target = _require_family(config, family)
    if family_of(config) == family:
        return tensors, config
    return fold_scale(tensors, config, target.scaling_factor, target.shift_factor)


def fold_scale(
    tensors: dict[str, Tensor], config: VAEConfig, scaling_factor: float, shift_factor: float | None = None
) -> tuple[dict[str, Tensor], VAEConfig]:
    """Return weights and config of the same autoencoder with one scale and shift for all channels, as `fold` does.

    Args:
        tensors: Weights by diffusers name; not changed.
        config: Their config, with `latents_mean` and `latents_std` where channels have scales of their own.
        scaling_factor: Of the result.
        shift_factor: Of the result.

    Raises:
        UserError: As `fold`, of a shift without post_quant_conv.
    """
    scales, shifts = latent_scale(config)
    factors = [scale / scaling_factor for scale in scales]
    offsets = [(shift_factor or 0.0) - factor * shift for factor, shift in zip(factors, shifts, strict=True)]
    folded = dict(tensors)
    _fold_encoder(folded, config, factors, offsets)
    _fold_decoder(folded, config, factors, offsets)
    scale: dict[str, Any] = {"scaling_factor": scaling_factor, "shift_factor": shift_factor}
    return folded, dataclasses.replace(config, **scale, latents_mean=None, latents_std=None)


def _require_family(config: VAEConfig, family: str) -> VAEConfig:
    if family not in FAMILIES:
        raise UserError(f"unknown model family {family!r}; choose one of: {', '.join(FAMILIES)} (sd1 is SD 1 and 2).")
    target = FAMILIES[family]
    if target.latent_channels != config.latent_channels:
        fitting = [name for name, other in FAMILIES.items() if other.latent_channels == config.latent_channels]
        raise UserError(
            f"models of family {family} take {target.latent_channels} latent channels, this VAE has "
            f"{config.latent_channels}; families that fit: {', '.join(fitting) or 'none, keep the diffusers layout'}."
        )
    return target


def _fold_encoder(tensors: dict[str, Tensor], config: VAEConfig, factors: list[float], offsets: list[float]) -> None:
    import torch

    name = "quant_conv" if config.use_quant_conv else "encoder.conv_out"
    channels = config.latent_channels
    weight, bias = (tensors[f"{name}.{kind}"].double() for kind in ("weight", "bias"))
    a, b = weight.new_tensor(factors), weight.new_tensor(offsets)
    mean_rows, logvar_rows = weight.split(channels)
    mean_bias, logvar_bias = bias.split(channels)
    weight = torch.cat([mean_rows * a[:, None, None, None], logvar_rows])
    bias = torch.cat([mean_bias * a + b, logvar_bias + 2 * a.log()])
    _store(tensors, name, weight, bias)


def _fold_decoder(tensors: dict[str, Tensor], config: VAEConfig, factors: list[float], offsets: list[float]) -> None:
    if not config.use_post_quant_conv and any(abs(offset) > 1e-12 for offset in offsets):
        raise UserError(
            "this VAE has no post_quant_conv, and its shift is not the family's: decoder.conv_in pads with zeros, so "
            "a shift folded into it would be wrong at the border; keep the diffusers layout, which stores the shift."
        )
    name = "post_quant_conv" if config.use_post_quant_conv else "decoder.conv_in"
    weight, bias = (tensors[f"{name}.{kind}"].double() for kind in ("weight", "bias"))
    a, b = weight.new_tensor(factors), weight.new_tensor(offsets)
    weight = weight / a[:, None, None]
    if config.use_post_quant_conv:
        bias = bias - weight[:, :, 0, 0] @ b
    _store(tensors, name, weight, bias)


def _store(tensors: dict[str, Tensor], name: str, weight: Tensor, bias: Tensor) -> None:
    """Put float64 results back in the dtype of what they replace."""
    tensors[f"{name}.weight"] = weight.to(tensors[f"{name}.weight"].dtype)
    tensors[f"{name}.bias"] = bias.to(tensors[f"{name}.bias"].dtype)
