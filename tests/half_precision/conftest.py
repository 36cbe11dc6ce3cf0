"""Tiny VAEs whose activations exceed what float16 holds, as the public SDXL VAE's do."""

from collections.abc import Callable, Iterator

import pytest
import torch

from sd_vae import AutoencoderKL, set_overflow

MakeLoud = Callable[..., AutoencoderKL]


@pytest.fixture
def make_loud(tiny_vae: AutoencoderKL) -> MakeLoud:
    """A function that multiplies a half's residual stream by 2^exponent, up to eps without changing the outcome."""

    def make(half: str = "decoder", exponent: int = 17) -> AutoencoderKL:
        for name, weight in tiny_vae.named_parameters():
            # Into the stream: its first convolution, each branch's last; layers on the stream itself add their bias.
            writes = name.startswith(f"{half}.conv_in.") or ".conv2." in name or ".to_out." in name
            adds = name.endswith("bias") and (".conv_shortcut." in name or "samplers." in name)
            if name.startswith(half) and (writes or adds):
                weight.data.mul_(2**exponent)
        return tiny_vae

    return make


@pytest.fixture
def x() -> torch.Tensor:
    """Two images."""
    return 2 * torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(0)) - 1


@pytest.fixture
def z() -> torch.Tensor:
    """Two raw latents."""
    return torch.randn(2, 4, 8, 12, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def raising() -> Iterator[None]:
    """`set_overflow("raise")` for one test."""
    set_overflow("raise")
    yield
    set_overflow("repeat")
