"""A small fast autoencoder that learns from a large one: TAESD's architecture, for any VAE's latents.

The student is diffusers' `AutoencoderTiny`, so that pipelines take it as `vae=` for quick decodes and previews; ComfyUI
has the same layers under other names. Its decoder learns to give what the VAE's decoder gives, its encoder to give the
VAE's scaled latents; the two are trained side by side and share nothing.

Source: architecture and the idea of TAESD, github.com/madebyollin/taesd (MIT), by way of diffusers' `AutoencoderTiny`;
names of tensors of Comfy-Org/ComfyUI@v0.3.48:comfy/taesd/taesd.py and nodes.py.

Shapes: B batch, C latent channels, H W pixels, h w latent cells.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F

from sd_vae.checkpoints.families import latent_scale
from sd_vae.config import VAEConfig
from sd_vae.errors import UserError

if TYPE_CHECKING:
    from diffusers import AutoencoderTiny
    from torch import Tensor

    from sd_vae.autoencoder import AutoencoderKL
    from sd_vae.losses import Perceptual

__all__ = ["COMFYUI", "DistillConfig", "Step", "build_student", "comfyui_tensors", "distill", "losses", "scaled"]

WIDTH = 64
"""Channels of every level of the student, as TAESD has."""

COMFYUI = "comfyui.safetensors"
"""The file for ComfyUI in a saved student's folder."""

WARMUP_STEPS = 100
"""Steps over which the learning rate rises."""


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """How a student is taught."""

    steps: int = 5000
    """Optimizer steps."""
    lr: float = 5e-4
    """Largest learning rate; it falls to 0 along a cosine."""
    perceptual_weight: float = 0.5
    """Weight of the perceptual distance, where there is one, beside the absolute difference of pixels."""
    seed: int = 0
    """Of the draws from the posterior."""

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            UserError: One is out of its range.
        """
        if self.steps < 1:
            raise UserError(f"steps is {self.steps}, it must be at least 1.")
        for name in ("lr", "perceptual_weight"):
            value = getattr(self, name)
            if not 0 < value < float("inf"):
                raise UserError(f"{name} is {value}, it must be above 0 and finite.")


class Step(NamedTuple):
    """What one step gave."""

    number: int
    """Steps done."""
    losses: dict[str, float]
    """By name, before weighting."""


def build_student(vae: AutoencoderKL) -> AutoencoderTiny:
    """Return an `AutoencoderTiny` with random weights for the VAE's factor and latent channels.

    At factor 8 it has TAESD's architecture, 2.4 million parameters for 4 channels. It takes scaled latents, so that its
    own scaling factor is 1.

    Raises:
        UserError: The VAE's factor is 1, for which there is nothing to enlarge.
    """
    from diffusers import AutoencoderTiny

    levels = vae.factor.bit_length()
    if levels < 2:
        raise UserError("the VAE has factor 1, a student needs at least 2; distill a VAE that shrinks pictures.")
    widths = (WIDTH,) * levels
    return AutoencoderTiny(
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        num_encoder_blocks=(1, *(3,) * (levels - 1)),
        num_decoder_blocks=(*(3,) * (levels - 1), 1),
        latent_channels=int(vae.config.latent_channels),
    )


def scaled(vae: AutoencoderKL, z: Tensor) -> Tensor:
    """Return the latents that a diffusion model sees, and the student takes, of raw z (B, C, h, w)."""
    scales, shifts = (z.new_tensor(values)[:, None, None] for values in latent_scale(_config(vae)))
    return (z - shifts) * scales


def distill(
    vae: AutoencoderKL,
    batches: Iterable[Tensor],
    config: DistillConfig | None = None,
    *,
    student: AutoencoderTiny | None = None,
    perceptual: Perceptual | None = None,
    progress: Callable[[Step], None] | None = None,
) -> AutoencoderTiny:
    """Return a student of the VAE, in eval mode on its device.

    Args:
        vae: The teacher, left as it is.
        batches: Pictures (B, 3, H, W) in [-1, 1], sides divisible by the factor; at least `config.steps` batches.
        config: How; the defaults where left out.
        student: Where to begin, trained in place; random weights where left out.
        perceptual: Distance to judge the decoder by beside pixels.
        progress: Called after each step.

    Raises:
        UserError: The batches end too soon, the student is for other latents, or the loss is not finite.
    """
    config = config or DistillConfig()
    student = build_student(vae) if student is None else student
    _require_same_latents(vae, student)
    student.to(vae.device, torch.float32).train()
    optimizer = torch.optim.AdamW(student.parameters(), config.lr, betas=(0.9, 0.99), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, config.steps))
    generator = torch.Generator(vae.device).manual_seed(config.seed)
    weights = {"encoder": 1.0, "decoder": 1.0, "perceptual": config.perceptual_weight}
    number = 0
    try:
        for number, x in enumerate(batches, start=1):
            found = losses(vae, student, x.to(vae.device), generator, perceptual)
            total = torch.stack([weights[name] * loss for name, loss in found.items()]).sum()
            if not bool(total.isfinite()):
                raise UserError(
                    f"the loss is {float(total.detach())} at step {number}; lower the learning rate {config.lr}."
                )
            optimizer.zero_grad()
            total.backward()
            torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            if progress is not None:
                progress(Step(number, {name: float(loss.detach()) for name, loss in found.items()}))
            if number == config.steps:
                break
    finally:
        student.eval()
    if number < config.steps:
        raise UserError(f"the pictures ended after {number} batches of {config.steps}; give more, or fewer steps.")
    return student


def losses(
    vae: AutoencoderKL,
    student: AutoencoderTiny,
    x: Tensor,
    generator: torch.Generator,
    perceptual: Perceptual | None = None,
) -> dict[str, Tensor]:
    """Return what the student lacks on a batch, each a mean over all elements.

    encoder: squared difference from the scaled mean of q(z|x). decoder: absolute difference from the VAE's decode of a
    draw from q(z|x). perceptual: distance between these two.

    Args:
        vae: The teacher.
        student: The student.
        x: (B, 3, H, W) in [-1, 1].
        generator: What the draw comes from.
        perceptual: Distance; left out where there is none.
    """
    with torch.no_grad():
        posterior = vae.encode(x.to(vae.dtype)).latent_dist
        mean, z = posterior.mode(), posterior.sample(generator)
        taught = vae.decode(z).sample.float().clamp(-1.0, 1.0)
    recon = student.decoder(scaled(vae, z).float())
    found = {
        "encoder": F.mse_loss(student.encoder(x.float()), scaled(vae, mean).float()),
        "decoder": F.l1_loss(recon, taught),
    }
    if perceptual is not None:
        found["perceptual"] = perceptual(recon, taught).mean()
    return found


def comfyui_tensors(student: AutoencoderTiny, vae: AutoencoderKL) -> dict[str, Tensor]:
    """Return the student's weights under the names of ComfyUI's TAESD, with the VAE's scale and shift.

    ComfyUI counts the clamp before the decoder as its first layer, and turns raw latents to scaled ones itself.

    Raises:
        UserError: The VAE has a scale for each channel, ComfyUI's TAESD has one, or a factor other than 8.
    """
    scales, shifts = (set(values) for values in latent_scale(_config(vae)))
    if len(scales) > 1 or len(shifts) > 1:
        raise UserError("ComfyUI's TAESD has one scale for all channels, this VAE has one for each; fold it first.")
    if vae.factor != 8:
        raise UserError(f"ComfyUI's TAESD has factor 8, this VAE has {vae.factor}; use the folder in diffusers.")
    tensors = {"vae_scale": torch.tensor(scales.pop()), "vae_shift": torch.tensor(shifts.pop())}
    for name, tensor in student.state_dict().items():
        half, _, layer, rest = name.split(".", 3)
        tensors[f"taesd_{half}.{int(layer) + (half == 'decoder')}.{rest}"] = tensor
    return tensors


def _require_same_latents(vae: AutoencoderKL, student: Any) -> None:
    theirs = (int(student.config.latent_channels), 2 ** (len(student.config.decoder_block_out_channels) - 1))
    ours = (int(vae.config.latent_channels), vae.factor)
    if theirs != ours:
        raise UserError(
            f"the student has {theirs[0]} latent channels and factor {theirs[1]}, the VAE {ours[0]} and {ours[1]}; "
            "begin with another, or with none."
        )


def _rate(step: int, steps: int) -> float:
    """Share of the largest learning rate: a short rise, then a cosine to 0."""
    warmup = min(WARMUP_STEPS, steps // 10)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1)))


def _config(vae: AutoencoderKL) -> VAEConfig:
    return VAEConfig.from_dict(dict(vae.config), source="the VAE's config")
