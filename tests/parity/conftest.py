"""Our class and diffusers' with the same weights, over every preset and the odd corners of the config.

Parity is that of the plain path; what the fast versions add to it is measured in tests/ops and tests/banded.
"""

from collections.abc import Generator

import pytest
import torch

from sd_vae import PRESETS, AutoencoderKL, ops
from sd_vae._diffusers import DiffusersAutoencoderKL

Pair = tuple[AutoencoderKL, DiffusersAutoencoderKL]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Generator[None, None, None]:
    """Run every test here on the plain path; a hook and no fixture, which hypothesis would refuse."""
    with ops.reference():
        return (yield)


NARROW = {"block_out_channels": (32, 64, 64, 64)}
SMALL = {
    "block_out_channels": (16, 32),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 8,
    "layers_per_block": 2,
}
ATTENDING = {
    "down_block_types": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
    "up_block_types": ("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
}

CONFIGS: dict[str, dict[str, object]] = {
    **{name: PRESETS[name].to_dict() | ({} if name == "mini" else NARROW) for name in PRESETS},
    "diffusers defaults": {},
    "one resnet a level": SMALL | {"layers_per_block": 1},
    "one level": {"block_out_channels": (32,), "norm_num_groups": 8},
    "no mid attention": SMALL | {"mid_block_add_attention": False},
    "no quant_conv": SMALL | {"use_quant_conv": False},
    "no post_quant_conv": SMALL | {"use_post_quant_conv": False},
    "attention in levels": SMALL | ATTENDING,
    "other channel counts": SMALL | {"in_channels": 1, "out_channels": 5, "latent_channels": 3},
    "narrowing": SMALL | {"block_out_channels": (32, 16)},
    **{f"act_fn {name}": SMALL | {"act_fn": name} for name in ("swish", "mish", "gelu", "relu", "SiLU")},
}
"""Name to fields; presets at reduced width where theirs takes long on two cores."""


def make_pair(fields: dict[str, object]) -> Pair:
    """Ours and theirs, built apart from the same seed's weights, in eval mode."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        ours = AutoencoderKL(**fields).eval()
    theirs = DiffusersAutoencoderKL(**fields).eval()
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


@pytest.fixture(params=CONFIGS, ids=lambda name: name.replace(" ", "-"))
def pair(request: pytest.FixtureRequest) -> Pair:
    """One pair a config of `CONFIGS`."""
    return make_pair(CONFIGS[request.param])


@pytest.fixture
def small_pair() -> Pair:
    """One pair with two levels, mid attention and both quant convolutions."""
    return make_pair(SMALL)


@pytest.fixture
def picture() -> torch.Tensor:
    """Three images of 24x40 pixels in [-1, 1]."""
    return torch.rand(3, 3, 24, 40, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.fixture
def large_picture() -> torch.Tensor:
    """Three images of 72x136 pixels in [-1, 1]: 9x17 cells at factor 8, odd both ways."""
    return torch.rand(3, 3, 72, 136, generator=torch.Generator().manual_seed(1)) * 2 - 1
