"""Kinds of tiny VAEs, and their weights under the names that other programs use."""

from pathlib import Path

import torch
from torch import Tensor

from sd_vae.autoencoder import AutoencoderKL
from sd_vae.checkpoints.keymap import key_table
from sd_vae.config import VAEConfig

TWO_LEVELS = {
    "block_out_channels": (32, 64),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
}
ATTENDING = {"down_block_types": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D")} | {
    "up_block_types": ("AttnUpDecoderBlock2D", "UpDecoderBlock2D")
}
PREFIX = "first_stage_model."
NO_QUANT = {"use_quant_conv": False, "use_post_quant_conv": False}


def ldm_tensors(vae: AutoencoderKL, prefix: str = "") -> dict[str, Tensor]:
    """The weights under CompVis' names."""
    state = vae.state_dict()
    keys = key_table(VAEConfig.from_dict(dict(vae.config)))
    return {prefix + key.ldm: state[key.diffusers].reshape(key.ldm_shape).clone() for key in keys}


def equal_weights(one: AutoencoderKL, other: AutoencoderKL) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def listing(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
