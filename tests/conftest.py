"""Shared fixtures: tiny real models and pictures, the photos beside the checkout where they are."""

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before diffusers is imported: no test reaches a hub

import pytest
import torch

from sd_vae.autoencoder import AutoencoderKL

SHARED = Path(__file__).resolve().parents[2] / "shared"

TINY = {
    "block_out_channels": (8, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 4,
    "sample_size": 32,
}


@pytest.fixture
def tiny_vae() -> AutoencoderKL:
    """Factor 2, 4 latent channels, a few thousand parameters, in eval mode."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoencoderKL(**TINY).eval()


@pytest.fixture
def shared() -> Path:
    """The folder of photos and weights beside the checkout; skips where there is none."""
    if not SHARED.is_dir():
        pytest.skip("needs the folder shared/ beside the checkout: real photos and LPIPS weights are not in the repo")
    return SHARED
