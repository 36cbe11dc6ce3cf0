"""The network that a run starts from, which of its parameters train, and the plain network that it ends with."""

import torch
from torch import nn

from sd_vae.autoencoder import AutoencoderKL
from sd_vae.checkpoints import load_vae
from sd_vae.errors import UserError
from sd_vae.initialization import start_near_identity_

from .config import ModelConfig, TrainConfig
from .lora import add_lora_, has_lora, merged

__all__ = ["initial_vae", "plain_vae", "prepare_training_"]


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


def _is_within(name: str, start: str) -> bool:
    """Whether a parameter is the named one, or in the named module: decoder.conv_in is not in decoder.conv."""
    return name.startswith(start) and (not start or start.endswith(".") or name[len(start) :][:1] in ("", "."))
