"""A small network that is taught, on painted defects, to say where a picture does not belong together.

It sees the picture alone and answers once in 8x8 pixels, for each kind of defect by itself: where it cannot be sure of
blur, lines are still plain to see. It learns from pairs, a square of a normal picture and the same square with
defects, so that the two differ in nothing else. 430 k parameters.

Source: Li et al., "CutPaste", arXiv 2104.04015, for learning from painted defects.

Shapes: B pictures, K kinds of defects, H W pixels, h' w' cells of 8x8 pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.random import Generator
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, adaptive_max_pool2d, binary_cross_entropy_with_logits

from sd_vae.images import to_unit_range
from sd_vae.latents.anomaly.painting import KINDS, Painted, paint
from sd_vae.muon import Muon

__all__ = ["DefectNet", "teach"]

WIDTHS = (24, 48, 96)
"""Channels after each halving of the picture."""
NUM_PAIRS = 8
"""Normal squares of a batch, each of which comes with defects too."""
MAX_LEARNING_RATE = 5e-3
WARM_UP = 0.04
"""Share of the steps in which the learning rate rises."""
WEIGHT_DECAY = 0.01
SQUARE_SIDE = 128
"""Pixels of the squares, at most."""
COVERED = 0.4
"""A cell counts as defective where the mask somewhere in it is above this."""


class DefectNet(nn.Module):
    """Pictures to the log-odds of each kind of defect in each cell of 8x8 pixels."""

    def __init__(self) -> None:
        super().__init__()
        first, second, last = WIDTHS
        self.layers = nn.Sequential(
            _conv(3, first, stride=2),
            _conv(first, first),
            _conv(first, second, stride=2),
            _Residual(second),
            _conv(second, last, stride=2),
            _Residual(last),
            _Residual(last, dilation=2),
            nn.Conv2d(last, len(KINDS), 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return log-odds (B, K, h', w').

        Args:
            x: Images (B, 3, H, W) in [-1, 1].
        """
        found: Tensor = self.layers(x.contiguous(memory_format=torch.channels_last))
        return found


class _Residual(nn.Module):
    def __init__(self, width: int, dilation: int = 1) -> None:
        super().__init__()
        self.first = _conv(width, width, dilation=dilation)
        self.second = nn.Sequential(nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.second(self.first(x))).relu()


def _conv(before: int, after: int, *, stride: int = 1, dilation: int = 1) -> nn.Module:
    conv = nn.Conv2d(before, after, 3, stride=stride, padding=dilation, dilation=dilation, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(after), nn.ReLU())


def teach(
    pictures: Sequence[np.ndarray],
    *,
    num_steps: int,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> DefectNet:
    """Return a network that was taught on squares of normal pictures, as they are and painted, in eval mode.

    Defects are painted anew at every step. Binary cross-entropy of each kind in each cell, mean over all but the
    answers about patches in cells inside of one, which look as they should. Muon, on the CPU, with a learning rate that
    rises and then falls like a cosine. Pictures smaller than the squares are left out, unless too few would remain.

    Args:
        pictures: Normal ones, (H, W, 3) in uint8; two at least.
        num_steps: Batches of 8 squares and the same 8 with defects.
        seed: Of everything random.
        progress: Called with (done, total) steps.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = DefectNet().to(memory_format=torch.channels_last)
    optimizer = Muon(net.parameters(), MAX_LEARNING_RATE, betas=(0.9, 0.98), weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, num_steps))
    rng = np.random.default_rng(seed)
    large = [picture for picture in pictures if min(picture.shape[:2]) >= SQUARE_SIDE]
    if len(large) >= 2:
        pictures = large
    side = min((SQUARE_SIDE, *(min(each.shape[:2]) for each in pictures)))
    for step in range(num_steps):
        optimizer.zero_grad(set_to_none=True)
        _loss(net, _pairs(pictures, side, rng)).backward()
        optimizer.step()
        schedule.step()
        if progress is not None:
            progress(step + 1, num_steps)
    return net.eval().requires_grad_(False)


def _rate(step: int, num_steps: int) -> float:
    """The learning rate of a step, from 0, as a part of the largest: up in a straight line, down like a cosine."""
    rising = min(1.0, (step + 1) / max(1.0, WARM_UP * num_steps))
    return rising * (1.0 + math.cos(math.pi * step / num_steps)) / 2.0


def _loss(net: DefectNet, squares: Sequence[Painted]) -> Tensor:
    x = to_unit_range(torch.from_numpy(np.stack([square.x for square in squares])).permute(0, 3, 1, 2))
    masks = torch.from_numpy(np.stack([square.masks for square in squares]))
    inside = torch.from_numpy(np.stack([square.inside for square in squares]))
    logits = net(x)
    cells = logits.shape[-2:]
    is_defective = (adaptive_max_pool2d(masks, cells) > COVERED).float()
    weights = torch.ones_like(logits)
    weights[:, KINDS.index("patch")] = (adaptive_avg_pool2d(inside[:, None].float(), cells)[:, 0] < 1.0).float()
    return binary_cross_entropy_with_logits(logits, is_defective, weights, reduction="sum") / weights.sum()


def _pairs(pictures: Sequence[np.ndarray], side: int, rng: Generator) -> list[Painted]:
    """Squares of normal pictures, each followed by itself with defects."""
    found = []
    for _ in range(NUM_PAIRS):
        plain, donor = (_square(pictures, side, rng) for _ in range(2))
        painted = paint(plain, donor, rng)
        found += [Painted(plain, np.zeros_like(painted.masks), np.zeros_like(painted.inside)), painted]
    return found


def _square(pictures: Sequence[np.ndarray], side: int, rng: Generator) -> np.ndarray:
    """A random square of a random picture, mirrored at random."""
    picture = pictures[int(rng.integers(len(pictures)))]
    top, left = (int(rng.integers(0, size - side + 1)) for size in picture.shape[:2])
    return np.ascontiguousarray(picture[top : top + side, left : left + side][:, :: rng.choice((-1, 1))])
