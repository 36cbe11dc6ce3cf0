"""Batches of training crops from a stream that has no state: sample p of a run is a pure function of (seed, p).

Of one source, position p stands for epoch p // n and place p % n in that epoch's permutation of the n pictures;
`stream_order` has the rest. The stream is dealt out to processes in rows: of every world_size * batch_size consecutive
samples, process r takes the r-th batch_size. So the union over processes is what one process with the bigger batch
sees, and a run resumes from one number, also with another number of processes.

Shapes: B batch, S side of the crops in pixels.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from sd_vae.data.config import DataConfig
from sd_vae.data.randomness import sample_rng
from sd_vae.data.records import Record
from sd_vae.data.stream import Images, TrainingSource
from sd_vae.data.transforms import random_resized_crop
from sd_vae.errors import UnreachableError, UserError
from sd_vae.images import open_image

if TYPE_CHECKING:
    from PIL import Image

Address = tuple[int, int, Record | None]
"""Epoch, number of the picture, and the picture itself where it comes from a stream."""

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
    num_retries: int = 0
    """Requests over the network that were made again."""


def training_loader(
    source: TrainingSource | Images,
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
        config: Crops, number of workers, and how long to wait for a batch of theirs.
        batch_size: Samples a batch and process.
        seed: Seed of order and crops.
        start: Samples that all processes together have consumed before; the stream goes on from there.
        rank: Number of this process.
        world_size: Number of processes.
        pin_memory: Put batches into page-locked memory, for a GPU.
    """
    if not isinstance(source, TrainingSource):
        source = TrainingSource([source], [], [], seed, config.shuffle_window)
    return TrainingLoader(
        DataLoader(
            _Crops(source, config, seed),
            batch_sampler=_Stream(source, start, batch_size, rank, world_size),
            timeout=config.timeout_s if config.num_workers else 0.0,
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
        UserError: While iterating: no picture of the source can be read, the network does not bring one, or no batch
            comes in time.
    """

    def __init__(self, batches: DataLoader[Any]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Batch]:
        """Yield batches without end."""
        try:
            for batch in self.batches:
                if isinstance(batch, str):
                    raise UserError(batch)
                yield batch
        except RuntimeError as error:
            if "timed out" not in str(error):
                raise
            raise UserError(
                f"the workers gave no batch for {self.batches.timeout:g} s; check the disk or the network, raise "
                "data.timeout_s, or set data.num_workers to 0, then go on with --resume."
            ) from error


@dataclass(frozen=True)
class _Sample:
    """One crop with its address; None where no picture of the source can be read."""

    x: Tensor | None
    epoch: int
    index: int
    unreadable: list[str]
    num_retries: int = 0
    unreachable: str = ""
    """Why the run cannot go on."""


class _Stream(Sampler[list[Address]]):
    """Addresses of one process's batches, without end."""

    def __init__(self, source: TrainingSource, start: int, batch_size: int, rank: int, world_size: int) -> None:
        self.source = source
        self.first = start + rank * batch_size
        self.batch_size = batch_size
        self.stride = world_size * batch_size

    def __iter__(self) -> Iterator[list[Address]]:
        position = self.first
        while True:
            yield [self.source.address(p) for p in range(position, position + self.batch_size)]
            position += self.stride


class _Crops(Dataset[_Sample]):
    """Crops by address."""

    def __init__(self, source: TrainingSource, config: DataConfig, seed: int) -> None:
        self.source = source
        self.config = config
        self.seed = seed

    def __getitem__(self, address: Address) -> _Sample:
        epoch, index, record = address
        before = self.source.num_retries
        unreadable: dict[str, None] = {}
        for candidate in [index] if record is not None else self.source.candidates(epoch, index):
            try:
                image = self.source.load(candidate) if record is None else _open(record)
            except UnreachableError as error:
                return _Sample(None, epoch, index, list(unreadable), unreachable=str(error))
            except UserError as error:
                unreadable[str(error)] = None
                continue
            config, rng = self.config, sample_rng(self.seed, epoch, index, "crop")
            x = random_resized_crop(image, config.size, config.crop_scale, config.flip, rng)
            return _Sample(x, epoch, index, list(unreadable), self.source.num_retries - before)
        return _Sample(None, epoch, index, list(unreadable))


def _open(record: Record) -> Image.Image:
    return open_image(io.BytesIO(record.data), record.source)


def _collate(samples: list[_Sample]) -> Batch | str:
    """The batch, or the user's error as text: an exception that leaves a worker arrives with its traceback in it."""
    for sample in samples:
        if sample.unreachable:
            return sample.unreachable
    unreadable = [line for sample in samples for line in sample.unreadable]
    crops = [sample.x for sample in samples if sample.x is not None]
    if not crops:
        return f"none of the {len(set(unreadable))} pictures can be read; the first: {unreadable[0]}"
    # Of a stream only this batch is at hand, so a crop of it stands in for one that cannot be read.
    return Batch(
        torch.stack(
            [crops[number % len(crops)] if sample.x is None else sample.x for number, sample in enumerate(samples)]
        ),
        torch.tensor([sample.epoch for sample in samples]),
        torch.tensor([sample.index for sample in samples]),
        unreadable,
        sum(sample.num_retries for sample in samples),
    )


def ignore_interrupts(worker: int) -> None:
    """Leave Ctrl-C and SIGTERM to the main process; for the workers of a loader."""
    # Ctrl-C, torchrun and Slurm reach the whole process group; the training process decides what it means, and still
    # needs its data. What the main process itself sends ends a worker.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with_main_process, name="signals", daemon=True).start()


def _end_with_main_process() -> None:
    main = multiprocessing.parent_process()
    assert main is not None, "only workers of a loader ignore interrupts"
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != main.pid:
        pass
    os._exit(0)
