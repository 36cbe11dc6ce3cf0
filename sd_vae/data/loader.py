"""Batches of training crops from a stream that has no state: sample p of a run is a pure function of (seed, p).

Position p stands for epoch p // n and place p % n in that epoch's permutation of the n pictures. The stream is dealt
out to processes in rows: of every world_size * batch_size consecutive samples, process r takes the r-th batch_size. So
the union over processes is what one process with the bigger batch sees, and a run resumes from one number.

Shapes: B batch, S side of the crops in pixels.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from sd_vae.data.config import DataConfig
from sd_vae.data.randomness import epoch_permutation, sample_rng
from sd_vae.data.sources import ImageSource
from sd_vae.data.transforms import random_resized_crop
from sd_vae.errors import UserError

__all__ = ["Batch", "TrainingLoader", "ignore_interrupts", "training_loader"]


class Batch(NamedTuple):
    """Training crops with their addresses."""

    x: Tensor
    """Crops (B, 3, S, S), float32 in [-1, 1]."""
    epochs: Tensor
    """Epoch of each sample, (B,), int64."""
    indices: Tensor
    """Picture of each sample, (B,), int64; where it was not readable, still the one that was asked for."""
    unreadable: list[str]
    """One line for each attempt to read a picture that failed: its name and why."""


def training_loader(
    source: ImageSource,
    config: DataConfig,
    *,
    batch_size: int,
    seed: int,
    start: int = 0,
    rank: int = 0,
    world_size: int = 1,
    pin_memory: bool = False,
) -> TrainingLoader:
    """Return an endless iterable of batches, bit for bit the same for every number of workers.

    Args:
        source: Pictures.
        config: Crops and number of workers.
        batch_size: Samples a batch and process.
        seed: Seed of order and crops.
        start: Samples that all processes together have consumed before; the stream goes on from there.
        rank: Number of this process.
        world_size: Number of processes.
        pin_memory: Put batches into page-locked memory, for a GPU.
    """
    return TrainingLoader(
        DataLoader(
            _Crops(source, config, seed),
            batch_sampler=_Stream(len(source), seed, start, batch_size, rank, world_size),
            num_workers=config.num_workers,
            collate_fn=_collate,
            pin_memory=pin_memory,
            worker_init_fn=ignore_interrupts,
            generator=torch.Generator(),  # otherwise the loader draws from the global generator
        )
    )


class TrainingLoader:
    """An endless iterable of `Batch`; every iteration begins at the same start.

    Raises:
        UserError: While iterating: no picture of the source can be read.
    """

    def __init__(self, batches: DataLoader[Any]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Batch]:
        """Yield batches without end."""
        for batch in self.batches:
            if isinstance(batch, str):
                raise UserError(batch)
            yield batch


@dataclass(frozen=True)
class _Sample:
    """One crop with its address; None where no picture of the source can be read."""

    x: Tensor | None
    epoch: int
    index: int
    unreadable: list[str]


class _Stream(Sampler[list[tuple[int, int]]]):
    """Addresses (epoch, index) of one process's batches, without end."""

    def __init__(self, num_samples: int, seed: int, start: int, batch_size: int, rank: int, world_size: int) -> None:
        self.num_samples = num_samples
        self.seed = seed
        self.first = start + rank * batch_size
        self.batch_size = batch_size
        self.stride = world_size * batch_size

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        orders: dict[int, list[int]] = {}
        position = self.first
        while True:
            addresses = []
            for p in range(position, position + self.batch_size):
                epoch, place = divmod(p, self.num_samples)
                if epoch not in orders:
                    orders = {epoch: epoch_permutation(self.seed, epoch, self.num_samples).tolist()}
                addresses.append((epoch, orders[epoch][place]))
            yield addresses
            position += self.stride


class _Crops(Dataset[_Sample]):
    """Crops by address."""

    def __init__(self, source: ImageSource, config: DataConfig, seed: int) -> None:
        self.source = source
        self.config = config
        self.seed = seed

    def __getitem__(self, address: tuple[int, int]) -> _Sample:
        epoch, index = address
        config, num_samples = self.config, len(self.source)
        unreadable: list[str] = []
        for offset in range(num_samples):
            try:
                image = self.source.load((index + offset) % num_samples)
            except UserError as error:
                unreadable.append(str(error))
                continue
            rng = sample_rng(self.seed, epoch, index, "crop")
            x = random_resized_crop(image, config.size, config.crop_scale, config.flip, rng)
            return _Sample(x, epoch, index, unreadable)
        return _Sample(None, epoch, index, unreadable)


def _collate(samples: list[_Sample]) -> Batch | str:
    """The batch, or the user's error as text: an exception that leaves a worker arrives with its traceback in it."""
    unreadable = [line for sample in samples for line in sample.unreadable]
    crops = [sample.x for sample in samples if sample.x is not None]
    if len(crops) < len(samples):
        return f"none of the {len(set(unreadable))} pictures can be read; the first: {unreadable[0]}"
    return Batch(
        torch.stack(crops),
        torch.tensor([sample.epoch for sample in samples]),
        torch.tensor([sample.index for sample in samples]),
        unreadable,
    )


def ignore_interrupts(worker: int) -> None:
    """Leave Ctrl-C to the main process; for the workers of a loader."""
    # Ctrl-C reaches the whole process group; the training process decides what it means, and still needs its data.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
