"""What the machine can do at most, and how much the network asks of it.

A time alone does not say whether it could be shorter. Beside the machine's matrix product and its copy it does: a
network of convolutions is a row of matrix products, and one that is slower than they are waits for memory.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from sd_vae import ops
from sd_vae.autoencoder import AutoencoderKL
from sd_vae.config import VAEConfig

__all__ = ["Ceilings", "Flops", "count_flops", "measure_ceilings"]

MIN_SIDE, MAX_SIDE = 256, {"cpu": 2048, "cuda": 8192}
LONG_PRODUCT_S = 0.05
"""No larger matrices where a product takes this long: some CPUs do half precision one number at a time."""
COPY_BYTES = {"cpu": 256 * 2**20, "cuda": 2**30}
MIN_RUNS, MIN_SECONDS = 3, 0.5


@dataclass(frozen=True, kw_only=True)
class Ceilings:
    """The fastest that was seen of each."""

    matmul_gflop_per_s: float
    """Product of two square matrices; a multiplication and an addition are two operations."""
    copy_gb_per_s: float
    """Bytes read and written a second, 1e9 bytes, as one tensor is copied into another."""


class Flops(NamedTuple):
    """Operations of a plain forward pass over one picture, a multiplication and an addition counting as two."""

    total: int
    """Convolutions, linear layers and attention."""
    attention: int
    """Of these, the products of queries, keys and values, which grow with the square of the pixels."""


def measure_ceilings(device: torch.device, dtype: torch.dtype, *, copy_bytes: int | None = None) -> Ceilings:
    """Return what a device reaches in a dtype; a few seconds of work.

    Args:
        device: CPU or CUDA device.
        dtype: Of the matrices.
        copy_bytes: Size of the tensor; by default beyond any cache.
    """
    side, flop_per_s = MIN_SIDE, 0.0
    while True:
        seconds = _product_seconds(side, device, dtype)
        flop_per_s = max(flop_per_s, 2 * side**3 / seconds)
        if side >= MAX_SIDE[device.type] or seconds > LONG_PRODUCT_S:
            break
        side *= 2
    num_bytes = copy_bytes or COPY_BYTES[device.type]
    source, target = (torch.ones(num_bytes, device=device, dtype=torch.uint8) for _ in range(2))
    copy_s = _least_seconds(lambda: target.copy_(source), device)
    return Ceilings(matmul_gflop_per_s=flop_per_s / 1e9, copy_gb_per_s=2 * num_bytes / copy_s / 1e9)


def _product_seconds(side: int, device: torch.device, dtype: torch.dtype) -> float:
    """The least time of a product of two square matrices."""
    left, right, product = (torch.ones(side, side, device=device, dtype=dtype) for _ in range(3))
    return _least_seconds(lambda: torch.mm(left, right, out=product), device)


def count_flops(config: VAEConfig, action: Literal["encode", "decode"], height: int, width: int) -> Flops:
    """Return the operations of one picture of height x width pixels, counted on the plain path without computing them.

    Faster versions need fewer multiplications (Winograd 2.25 to 4 times fewer), so what they do of these a second may
    exceed the machine's ceiling.
    """
    with torch.device("meta"), torch.no_grad(), ops.reference():
        vae = AutoencoderKL(**config.to_dict()).eval()
        x = torch.empty(1, config.in_channels, height, width)
        z = torch.empty(1, config.latent_channels, height // config.factor, width // config.factor)
        with FlopCounterMode(display=False) as counter:
            vae.encode(x) if action == "encode" else vae.decode(z)
    counts = {str(operation): count for operation, count in counter.get_flop_counts()["Global"].items()}
    attention = sum(count for name, count in counts.items() if "bmm" in name or "attention" in name)
    return Flops(counter.get_total_flops(), attention)


def _least_seconds(run: Callable[[], object], device: torch.device) -> float:
    """The shortest of several runs."""
    run()
    times: list[float] = []
    while len(times) < MIN_RUNS or sum(times) < MIN_SECONDS:
        _wait(device)
        started = time.perf_counter()
        run()
        _wait(device)
        times.append(time.perf_counter() - started)
    return min(times)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
