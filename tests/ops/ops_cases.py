"""Random feature maps, modules and models for the tests of the compiled operations, and the error that they measure."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from sd_vae.autoencoder import AutoencoderKL
from sd_vae.ops import dispatch

EPS = 1e-6
NARROW = {
    "block_out_channels": (32, 64),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 4,
    "sample_size": 32,
}
needs_compiled = pytest.mark.skipif(
    dispatch.compiled_unavailable() is not None, reason=f"needs the kernels: {dispatch.compiled_unavailable()}"
)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def fake_map(**changes: Any) -> torch.Tensor:
    """A map on a GPU that need not exist: shape, dtype and format without values."""
    facts = {"shape": (2, 12, 5, 7), "dtype": torch.float16, "device": "cuda", "format": torch.channels_last} | changes
    with FakeTensorMode():
        x = torch.empty(facts["shape"], dtype=facts["dtype"], device=facts["device"])
        return x.contiguous(memory_format=facts["format"]) if x.dim() == 4 else x


def conv(num_in: int, num_out: int, *, seed: int = 0, size: int = 3, stride: int = 1) -> nn.Conv2d:
    """A convolution whose filters differ in size by log-normal factors; frozen."""
    padding = 1 if size == 3 and stride == 1 else 0
    module = nn.Conv2d(num_in, num_out, size, stride, padding)
    with torch.no_grad():
        gains = draw(num_out, 1, 1, 1, seed=seed + 1).exp()
        module.weight.copy_(draw(*module.weight.shape, seed=seed) * gains / (size * num_in**0.5))
        module.bias.copy_(draw(num_out, seed=seed + 2))  # type: ignore[union-attr]
    return module.requires_grad_(False).eval()


def group_norm(num_groups: int, num_channels: int, *, seed: int = 0) -> nn.GroupNorm:
    """A GroupNorm with log-normal gains; frozen."""
    norm = nn.GroupNorm(num_groups, num_channels, eps=EPS)
    with torch.no_grad():
        norm.weight.copy_(draw(num_channels, seed=seed).exp())
        norm.bias.copy_(draw(num_channels, seed=seed + 1))
    return norm.requires_grad_(False).eval()


def wide(module: nn.Module) -> nn.Module:
    """A copy in fp64, which every operation runs by its reference."""
    return copy.deepcopy(module).double()


def narrow_vae(**changes: object) -> AutoencoderKL:
    """Factor 2 and widths that the compiled kernels take, in eval mode."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoencoderKL(**(NARROW | changes)).eval()  # type: ignore[arg-type]


def error(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference, of the largest magnitude."""
    return float((ours.double() - theirs.double()).abs().max() / theirs.double().abs().max())
