"""A small network that is taught, on painted defects, to say where a picture does not belong together.

It sees the picture, what the VAE failed to reconstruct, and the latents, and answers once in 8x8 pixels. 160 k
parameters: teaching it takes minutes on a CPU, most of them spent by the VAE.

Source: the arrangement of Zavrtanik, Kristan and Skocaj, "DRAEM", arXiv 2108.07610: a network that discriminates
between a picture and its reconstruction, taught on simulated defects.

Shapes: B pictures, C latent channels, H W pixels, h w latent cells, h' w' cells of 8x8 pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.random import Generator
from torch import Tensor, nn
from torch.nn.functional import adaptive_max_pool2d, binary_cross_entropy_with_logits, interpolate

from sd_vae.images import to_unit_range
from sd_vae.latents.anomaly.painting import paint

__all__ = ["DefectNet", "Example", "teach"]

WIDTHS = (16, 32, 64)
"""Channels after each halving of the picture."""
BATCH_SIZE = 16
MAX_LEARNING_RATE = 1e-3
WEIGHT_DECAY = 1e-4
SQUARE_SIDE = 128
"""Pixels of the squares of the first part, at most."""
NORMAL_EVERY = 4
"""One square in so many of the first part stays normal."""
COVERED = 0.4
"""A cell counts as defective where the mask somewhere in it is above this."""


class Example(NamedTuple):
    """A picture to learn from, as small as it can be kept."""

    x: Tensor
    """(3, H, W), uint8."""
    recon: Tensor
    """(3, H, W), uint8."""
    mean: Tensor
    """(C, h, w), raw z."""
    mask: Tensor
    """(H, W), float16, 0 to 1; all 0 for a normal picture."""


_Batch = tuple[Tensor, Tensor | None, Tensor | None, Tensor]
"""Images, reconstructions and latents or None, masks."""


class DefectNet(nn.Module):
    """Pictures, reconstructions and latents to the log-odds of a defect in each cell of 8x8 pixels.

    Args:
        latent_channels: C.
    """

    error_scale: Tensor
    latent_mean: Tensor
    latent_std: Tensor

    def __init__(self, latent_channels: int) -> None:
        super().__init__()
        first, second, last = WIDTHS
        self.stem = nn.Sequential(_block(6, first, 2), _block(first, second, 2), _block(second, last, 2))
        self.join = nn.Conv2d(latent_channels, last, 1)
        self.body = nn.Sequential(_block(last, last), _block(last, last), _block(last, last))
        self.head = nn.Conv2d(last, 1, 1)
        self.register_buffer("error_scale", torch.ones(()))
        self.register_buffer("latent_mean", torch.zeros(latent_channels))
        self.register_buffer("latent_std", torch.ones(latent_channels))

    def forward(self, x: Tensor, recon: Tensor | None = None, mean: Tensor | None = None) -> Tensor:
        """Return log-odds (B, h', w').

        Args:
            x: Images (B, 3, H, W) in [-1, 1].
            recon: Their reconstructions (B, 3, H, W); None where the VAE was not asked.
            mean: Raw z (B, C, h, w); None together with `recon`.
        """
        error = torch.zeros_like(x) if recon is None else (x - recon) / self.error_scale
        seen = torch.cat([x, error], dim=1).contiguous(memory_format=torch.channels_last)
        features = self.stem(seen)  # (B, 64, h', w')
        if mean is None:
            return self.head(self.body(features))[:, 0]
        latents = (mean - self.latent_mean[:, None, None]) / self.latent_std[:, None, None]
        latents = interpolate(self.join(latents), size=features.shape[-2:], mode="bilinear", align_corners=False)
        return self.head(self.body(features + latents))[:, 0]


def teach(
    examples: Sequence[Example],
    pictures: Sequence[np.ndarray] = (),
    *,
    num_steps: int,
    num_first_steps: int = 0,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> DefectNet:
    """Return a network that was taught on normal and on painted pictures, in eval mode.

    First on pictures alone, in which new defects are painted at every step: the VAE is not asked, so there may be many.
    Then on examples with what the VAE made of them, each mirrored at random, by rows, by columns, or at the diagonal
    where it is square. Binary cross-entropy of each cell, mean over all; AdamW, one cycle of the learning rate a part.

    Args:
        examples: At least two, of one size, with both normal and painted ones.
        pictures: Normal ones, (H, W, 3) in uint8, for the first part.
        num_steps: Batches of 16 examples.
        num_first_steps: Batches of 16 squares of pictures; needs two pictures at least.
        seed: Of everything random.
        progress: Called with (done, total) steps.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = DefectNet(len(examples[0].mean)).to(memory_format=torch.channels_last)
        _set_scales_(net, examples)
        total = num_first_steps + num_steps
        painter = _PaintedSquares(pictures, np.random.default_rng(seed))
        _train_(net, num_first_steps, painter, lambda done: progress and progress(done, total))
        _train_(net, num_steps, _Shuffled(examples), lambda done: progress and progress(num_first_steps + done, total))
    return net.eval().requires_grad_(False)


def _train_(net: DefectNet, num_steps: int, batches: Callable[[], _Batch], tell: Callable[[int], object]) -> None:
    """Take so many steps of one cycle of the learning rate."""
    if not num_steps:
        return
    optimizer = torch.optim.AdamW(net.parameters(), MAX_LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, MAX_LEARNING_RATE, total_steps=num_steps)
    for step in range(num_steps):
        x, recon, mean, mask = batches()
        logits = net(x, recon, mean)
        wanted = (adaptive_max_pool2d(mask[:, None], logits.shape[-2:])[:, 0] > COVERED).float()
        loss = binary_cross_entropy_with_logits(logits, wanted)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        tell(step + 1)


class _PaintedSquares:
    """Batches of random squares of pictures, three of four with new defects."""

    def __init__(self, pictures: Sequence[np.ndarray], rng: Generator) -> None:
        self._pictures = pictures
        self._side = min((SQUARE_SIDE, *(min(each.shape[:2]) for each in pictures)))
        self._rng = rng

    def __call__(self) -> _Batch:
        pixels, masks = [], []
        for index in range(BATCH_SIZE):
            square, donor = self._square(), self._square()
            mask = np.zeros(square.shape[:2], np.float32)
            if index % NORMAL_EVERY:
                square, mask = paint(square, donor, self._rng)
            pixels.append(square)
            masks.append(mask)
        x = to_unit_range(torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2))
        return x, None, None, torch.from_numpy(np.stack(masks))

    def _square(self) -> np.ndarray:
        """A random square of a random picture, mirrored at random."""
        picture = self._pictures[int(self._rng.integers(len(self._pictures)))]
        top, left = (int(self._rng.integers(0, size - self._side + 1)) for size in picture.shape[:2])
        square = picture[top : top + self._side, left : left + self._side]
        return np.ascontiguousarray(square[:, :: self._rng.choice((-1, 1))])


class _Shuffled:
    """Batches of examples; all of them are seen before one is seen again."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self._examples = examples
        self._order: list[int] = []

    def __call__(self) -> _Batch:
        while len(self._order) < BATCH_SIZE:
            self._order += torch.randperm(len(self._examples)).tolist()
        chosen, self._order = self._order[:BATCH_SIZE], self._order[BATCH_SIZE:]
        return _batch([self._examples[index] for index in chosen])


def _block(before: int, after: int, stride: int = 1) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(before, after, 3, stride=stride, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()
    )


@torch.no_grad()
def _set_scales_(net: DefectNet, examples: Sequence[Example]) -> None:
    """Bring what the network sees to unit variance, by the normal examples among those that are given."""
    normal = [example for example in examples if not example.mask.any()] or list(examples)
    errors = [(to_unit_range(each.x) - to_unit_range(each.recon)).square().mean() for each in normal]
    net.error_scale.copy_(torch.stack(errors).mean().sqrt().clamp_min(1e-3))
    cells = torch.cat([each.mean.flatten(1) for each in normal], dim=1).float()
    net.latent_mean.copy_(cells.mean(dim=1))
    net.latent_std.copy_(cells.std(dim=1).clamp_min(1e-3))


def _batch(examples: Sequence[Example]) -> _Batch:
    """Examples as one batch, each mirrored at random."""
    columns: list[list[Tensor]] = [[], [], [], []]
    for example in examples:
        flips = [dim for dim in (-1, -2) if torch.rand(()) < 0.5]
        is_turned = example.x.shape[-1] == example.x.shape[-2] and bool(torch.rand(()) < 0.5)
        for column, values in zip(columns, example, strict=True):
            mirrored = values.flip(flips)
            column.append(mirrored.transpose(-1, -2) if is_turned else mirrored)
    x, recon, mean, mask = (torch.stack(column) for column in columns)
    return to_unit_range(x), to_unit_range(recon), mean.float(), mask.float()
