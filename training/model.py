"""The network that a run starts from, which of its parameters train, and the plain network that it ends with."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from sd_vae.autoencoder import AutoencoderKL
from sd_vae.checkpoints import load_vae
from sd_vae.errors import UserError
from sd_vae.initialization import start_near_identity_

from .config import ModelConfig, TrainConfig
from .lora import add_lora_, has_lora, merged
from .validation import latent_moments

__all__ = ["initial_vae", "plain_vae", "prepare_training_", "set_scale_"]

NUM_SCALING_PHOTOS = 64
"""Training photos whose latents set the scaling factor of a VAE trained from random weights."""


def initial_vae(config: TrainConfig) -> AutoencoderKL:
    """Return the VAE that a run starts from: other weights, or a preset's random ones, drawn from the run's seed."""
    model = config.model
    if model.pretrained:
        return load_vae(model.pretrained, dtype=torch.float32)
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        vae = AutoencoderKL.from_preset(model.preset, sample_size=config.data.size)
        if model.init == "near_identity":
            start_near_identity_(vae)
    return vae.eval()


def prepare_training_(vae: AutoencoderKL, model: ModelConfig, *, seed: int = 0) -> list[nn.Parameter]:
    """Set which parameters train and return them; `lora` adds them first.

    Args:
        vae: Model, changed in place.
        model: What trains: everything; decoder and post_quant_conv; named parts; low-rank additions to the decoder.
        seed: Of the additions' random half.

    Raises:
        UserError: A part names no parameter.
    """
    if model.trainable == "lora":
        add_lora_(vae, model, seed)
    beginnings = {"all": ("",), "decoder": ("decoder.", "post_quant_conv."), "parts": model.parts, "lora": ()}
    starts = beginnings[model.trainable]
    names = [name for name, _ in vae.named_parameters()]
    unknown = [part for part in model.parts if not any(_is_within(name, part) for name in names)]
    if unknown:
        kinds = sorted({".".join(name.split(".")[:2]) for name in names})
        raise UserError(f"model.parts names {unknown[0]!r}, which no parameter is in; choose from: {', '.join(kinds)}.")
    for name, parameter in vae.named_parameters():
        parameter.requires_grad_(".lora_" in name or any(_is_within(name, start) for start in starts))
    return [parameter for parameter in vae.parameters() if parameter.requires_grad]


def plain_vae(vae: AutoencoderKL) -> AutoencoderKL:
    """Return the VAE without adapters: the same weights with a config of its own, or a copy with LoRA merged in."""
    return AutoencoderKL.from_diffusers(merged(vae) if has_lora(vae) else vae)


def set_scale_(vae: AutoencoderKL, model: ModelConfig, photos: Callable[[int], Tensor], device: torch.device) -> str:
    """Give a VAE the scale and shift of its own latents, if it began with random weights or is told to; say whose.

    Args:
        vae: Trained, changed in place.
        model: What it began with.
        photos: Returns so many training photos, (N, 3, S, S) in [-1, 1].
        device: Where the VAE is.
    """
    if model.scaling_factor == "keep" or (model.scaling_factor == "auto" and model.pretrained):
        return "kept"
    x = photos(NUM_SCALING_PHOTOS)
    mean, std = latent_moments(vae, x, device)
    shift = None if vae.config.shift_factor is None else mean
    vae.register_to_config(scaling_factor=1.0 / std, shift_factor=shift)
    return f"1 / standard deviation of the latents of {len(x)} training photos"


def _is_within(name: str, start: str) -> bool:
    """Whether a parameter is the named one, or in the named module: decoder.conv_in is not in decoder.conv."""
    return name.startswith(start) and (not start or start.endswith(".") or name[len(start) :][:1] in ("", "."))
