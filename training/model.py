"""The network that a run starts from, and which of its parameters train."""

import torch
from torch import nn

from sd_vae.autoencoder import AutoencoderKL
from sd_vae.checkpoints import load_vae
from sd_vae.initialization import start_near_identity_

from .config import TrainConfig

__all__ = ["freeze", "initial_vae"]


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


def freeze(vae: AutoencoderKL, trainable: str) -> list[nn.Parameter]:
    """Set which parameters train and return them.

    Args:
        vae: Model, changed in place.
        trainable: `all`, or `decoder` for decoder and post_quant_conv.
    """
    vae.requires_grad_(True)
    if trainable == "decoder":
        vae.encoder.requires_grad_(False)
        if vae.quant_conv is not None:
            vae.quant_conv.requires_grad_(False)
    return [parameter for parameter in vae.parameters() if parameter.requires_grad]
