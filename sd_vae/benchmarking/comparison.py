"""Our model beside diffusers' with the same weights: time, memory, difference, fraction of the machine's ceiling."""

import copy
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch

from sd_vae.autoencoder import AutoencoderKL
from sd_vae.benchmarking.ceilings import Ceilings, count_flops
from sd_vae.benchmarking.inputs import caller, random_input
from sd_vae.benchmarking.memory import Way, peak_memory
from sd_vae.benchmarking.timing import median_ratio, relative_difference, take_turns
from sd_vae.config import VAEConfig

__all__ = ["Comparison", "Side", "compare", "count_steps"]

WAYS: tuple[Way, ...] = ("ours", "diffusers")


@dataclass(frozen=True, kw_only=True)
class Side:
    """One model's figures."""

    median_s: float
    """Seconds of a call."""
    memory_gib: float | None
    """Peak above the loaded weights; None where the system does not tell."""
    difference: float
    """Largest, of the largest magnitude, to diffusers in float32 with the same weights."""
    of_ceiling: float
    """Operations of the plain network a second, as a fraction of what the machine's matrix product reaches."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One action on one square picture."""

    action: Literal["encode", "decode"]
    size: int
    """Pixels of a side."""
    gflop: float
    """Operations of the plain network, 1e9."""
    ours: Side
    diffusers: Side
    speedup: float
    """How many times faster ours is: the median over the rounds of the ratio within a round."""


def count_steps(rounds: int) -> int:
    """Return how often one comparison calls its `on_step`."""
    return len(WAYS) * (2 + rounds)


@torch.no_grad()
def compare(
    vae: AutoencoderKL,
    action: Literal["encode", "decode"],
    size: int,
    ceilings: Ceilings,
    *,
    rounds: int,
    on_step: Callable[[], None] = lambda: None,
) -> Comparison:
    """Run both models on the same input, in turns, and each alone for its memory.

    Args:
        vae: Ours; diffusers' is made from it and shares its weights.
        action: Which half.
        size: Pixels of a side, a multiple of the factor.
        ceilings: Of this device and dtype.
        rounds: Timed calls of each, after one that is not.
        on_step: Called `count_steps(rounds)` times on the way.

    Raises:
        UserError: Memory ran out, see `peak_memory`.
    """
    memory = {}
    for way in WAYS:
        memory[way] = peak_memory(vae, way, action, size, size)
        on_step()
    calls = {"ours": caller(vae, action), "diffusers": caller(vae.to_diffusers(), action)}
    x = random_input(vae, action, size, size)
    results = {}
    for way in WAYS:
        results[way] = calls[way](x)
        on_step()
    exact = results["diffusers"]
    if vae.dtype != torch.float32:
        exact = caller(copy.deepcopy(vae).float().to_diffusers(), action)(x.float())
    turns = take_turns({way: partial(calls[way], x) for way in WAYS}, rounds, vae.device, on_step)
    seconds = {way: [turn.wall_s for turn in taken] for way, taken in turns.items()}
    gflop = count_flops(VAEConfig.from_dict(dict(vae.config), source="the model"), action, size, size).total / 1e9
    sides = {}
    for way in WAYS:
        median_s = statistics.median(seconds[way])
        sides[way] = Side(
            median_s=median_s,
            memory_gib=memory[way],
            difference=relative_difference(results[way], exact),
            of_ceiling=gflop / median_s / ceilings.matmul_gflop_per_s,
        )
    return Comparison(
        action=action,
        size=size,
        gflop=gflop,
        ours=sides["ours"],
        diffusers=sides["diffusers"],
        speedup=median_ratio(seconds["diffusers"], seconds["ours"]),
    )
