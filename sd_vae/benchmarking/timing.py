"""Timing on a machine that is busy with other things too: the ways to compare take turns, and ratios are paired.

What slows a machine down for a while slows both ways of a round, so the median over the rounds of a ratio is steady
where the ratio of two medians is not.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Turn", "median_ratio", "relative_difference", "take_turns"]


class Turn(NamedTuple):
    """What one call took."""

    wall_s: float
    """From an idle device to an idle device."""
    cpu_s: float
    """Of all threads of this process together."""


def take_turns(
    ways: Mapping[str, Callable[[], object]],
    rounds: int,
    device: torch.device,
    on_turn: Callable[[], None] = lambda: None,
) -> dict[str, list[Turn]]:
    """Return what every way took in every round; the order is turned round from one round to the next.

    Args:
        ways: What to call, by name; called before, so that nothing is set up while it is timed.
        rounds: Calls of each.
        device: Where they compute.
        on_turn: Called after each call.
    """
    turns: dict[str, list[Turn]] = {name: [] for name in ways}
    for index in range(rounds):
        for name in list(ways)[:: -1 if index % 2 else 1]:
            _synchronize(device)
            wall, cpu = time.perf_counter(), time.process_time()
            ways[name]()
            _synchronize(device)
            turns[name].append(Turn(time.perf_counter() - wall, time.process_time() - cpu))
            on_turn()
    return turns


def median_ratio(baseline: Sequence[float], times: Sequence[float]) -> float:
    """Return the median over the rounds of baseline / time: how many times faster than the baseline."""
    return statistics.median(theirs / ours for theirs, ours in zip(baseline, times, strict=True))


def relative_difference(found: Tensor, reference: Tensor) -> float:
    """Return the largest absolute difference, relative to the reference's largest magnitude; NaN where there is one."""
    reference = reference.float()
    return float((found.float() - reference).abs().max() / reference.abs().max())


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
