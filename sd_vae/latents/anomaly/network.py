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

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_max_pool2d, binary_cross_entropy_with_logits, interpolate

from sd_vae.images import to_unit_range

__all__ = ["DefectNet", "Example", "teach"]

WIDTHS = (16, 32, 64)
"""Channels after each halving of the picture."""
BATCH_SIZE = 16
MAX_LEARNING_RATE = 1e-3
WEIGHT_DECAY = 1e-4
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

    def forward(self, x: Tensor, recon: Tensor, mean: Tensor) -> Tensor:
        """Return log-odds (B, h', w').

        Args:
            x: Images (B, 3, H, W) in [-1, 1].
            recon: Their reconstructions (B, 3, H, W).
            mean: Raw z (B, C, h, w).
        """
        seen = torch.cat([x, (x - recon) / self.error_scale], dim=1)
        features = self.stem(seen.contiguous(memory_format=torch.channels_last))  # (B, 64, h', w')
        latents = (mean - self.latent_mean[:, None, None]) / self.latent_std[:, None, None]
        latents = interpolate(self.join(latents), size=features.shape[-2:], mode="bilinear", align_corners=False)
        return self.head(self.body(features + latents))[:, 0]


def teach(
    examples: Sequence[Example], *, num_steps: int, seed: int = 0, progress: Callable[[int, int], None] | None = None
) -> DefectNet:
    """Return a network that was taught on examples of one size, normal and painted, in eval mode.

    Binary cross-entropy of each cell, mean over all; AdamW with one cycle of the learning rate; every example is
    mirrored at random, by rows, by columns, or at the diagonal where it is square.

    Args:
        examples: At least two.
        num_steps: Batches of 16.
        seed: Of everything random.
        progress: Called with (done, total) steps.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = DefectNet(len(examples[0].mean)).to(memory_format=torch.channels_last)
        _set_scales_(net, examples)
        optimizer = torch.optim.AdamW(net.parameters(), MAX_LEARNING_RATE, weight_decay=WEIGHT_DECAY)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, MAX_LEARNING_RATE, total_steps=num_steps)
        order = torch.empty(0, dtype=torch.long)
        for step in range(num_steps):
            while len(order) < BATCH_SIZE:
                order = torch.cat([order, torch.randperm(len(examples))])
            chosen, order = order[:BATCH_SIZE], order[BATCH_SIZE:]
            x, recon, mean, mask = _batch([examples[index] for index in chosen.tolist()])
            logits = net(x, recon, mean)
            wanted = (adaptive_max_pool2d(mask[:, None], logits.shape[-2:])[:, 0] > COVERED).float()
            loss = binary_cross_entropy_with_logits(logits, wanted)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            if progress is not None:
                progress(step + 1, num_steps)
    return net.eval().requires_grad_(False)


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


def _batch(examples: Sequence[Example]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
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
