"""Tiny VAEs of several kinds."""

import logging
from collections.abc import Callable

import pytest
import torch
from vae_files import TWO_LEVELS

from sd_vae.autoencoder import AutoencoderKL


@pytest.fixture
def make_vae() -> Callable[..., AutoencoderKL]:
    """A function that returns a VAE of two levels with 32 groups, random biases and norms, in eval mode."""

    def make(**fields: object) -> AutoencoderKL:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            vae = AutoencoderKL(**(TWO_LEVELS | fields)).eval()
            for parameter in vae.parameters():
                if parameter.dim() == 1:
                    torch.nn.init.normal_(parameter, 0.5, 0.2)
        return vae

    return make


@pytest.fixture
def vae(make_vae: Callable[..., AutoencoderKL]) -> AutoencoderKL:
    return make_vae()


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> None:
    """Collect what is announced instead of printing it."""
    caplog.set_level(logging.INFO, logger="sd_vae")
