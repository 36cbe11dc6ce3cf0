"""Shared fixtures: tiny real models and pictures, the photos beside the checkout where they are."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

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


@pytest.fixture(autouse=True)
def seed() -> None:
    """The same numbers in every run, whatever ran before: a bound that holds once holds again."""
    torch.manual_seed(0)


@pytest.fixture
def tiny_vae() -> AutoencoderKL:
    """Factor 2, 4 latent channels, a few thousand parameters, in eval mode."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoencoderKL(**TINY).eval()


@pytest.fixture
def assert_close() -> Callable[..., None]:
    """A check that a result of the fast versions is the plain path's, relative to the largest magnitude."""

    def check(actual: Any, expected: Any, bound: float = 1e-4) -> None:
        ours, theirs = torch.as_tensor(actual), torch.as_tensor(expected)
        assert ours.shape == theirs.shape
        difference = float((ours - theirs).abs().max().detach() / theirs.abs().max().detach())
        assert difference <= bound, (
            f"differs by {difference:.1e} of the largest magnitude, at most {bound:.0e} is right"
        )

    return check


@pytest.fixture
def shared() -> Path:
    """The folder of photos and weights beside the checkout; skips where there is none."""
    if not SHARED.is_dir():
        pytest.skip("needs the folder shared/ beside the checkout: real photos and LPIPS weights are not in the repo")
    return SHARED
