"""Views of pictures in the order of their records, decoded by worker processes while the caller encodes.

One thread reads records ahead, worker processes read and decode the picture files, and what arrives is what one process
would have made: the order and the bytes depend neither on the number of workers nor on their speed. A chunk of pictures
travels as one block of bytes, in shared memory, page-locked where a GPU is to take it.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from sd_vae.data.decoding import Reject, Size, decode_picture
from sd_vae.data.geometry import PictureTransform, View, largest_resize, views
from sd_vae.data.loader import ignore_interrupts
from sd_vae.data.records import Record, Records
from sd_vae.errors import UserError

__all__ = ["Picture", "PictureDataset", "picture_loader", "prepare"]


@dataclass(frozen=True)
class Picture:
    """The views of one record."""

    position: int
    """Number of the record."""
    id: str
    """Name of the record."""
    source: str
    """File or url, or `archive::member`, or `table::row`."""
    sha256: str
    """Of the source bytes."""
    original_size: Size
    """Of the whole upright picture."""
    has_more_frames: bool
    """There is more than one frame, of which this is the first."""
    columns: dict[str, Any]
    """What else the source says of the picture."""
    views: tuple[View, ...]
    """At least one; their pixels may share one block of memory with those of other pictures: copy what is kept."""


def prepare(record: Record, transform: PictureTransform) -> Picture | Reject:
    """Return the views of one record, or why there are none.

    Names and columns are made Unicode that can be written: of a file name in another encoding, and of half a surrogate
    pair, as captions have it that were cut off within an emoji, the code stands there with a backslash.

    Raises:
        UserError: The record's file is gone or cannot be read.
    """
    decoded = decode_picture(
        record.data,
        background=transform.background,
        max_pixels=transform.max_pixels,
        shrink_to=(lambda size: largest_resize(size, transform)) if transform.draft else None,
    )
    found = decoded if isinstance(decoded, Reject) else views(decoded, transform)
    name, source = _writable(record.id), _writable(record.source)
    if isinstance(found, Reject):
        return dataclasses.replace(found, position=record.position, id=name, source=source)
    assert not isinstance(decoded, Reject)
    return Picture(
        record.position,
        name,
        source,
        decoded.sha256,
        decoded.original_size,
        decoded.has_more_frames,
        {
            _writable(key): _writable(value) if isinstance(value, str) else value
            for key, value in record.columns.items()
        },
        tuple(found),
    )


def picture_loader(
    records: Records,
    transform: PictureTransform,
    *,
    start: int = 0,
    stop: int | None = None,
    num_workers: int = 2,
    pin_memory: bool = False,
    chunk_size: int = 8,
    prefetch_factor: int = 2,
    multiprocessing_context: str | None = None,
) -> Iterator[Picture | Reject]:
    """Yield the pictures of records `start` to before `stop`, each as `Picture` or `Reject`, in order.

    What waits to be taken is at most `num_workers * prefetch_factor` chunks of pictures.

    Args:
        records: Where the pictures are.
        transform: What is cut from each.
        start: First record.
        stop: Record to stop before; the end by default.
        num_workers: Processes that read and decode; 0 does it in this process.
        pin_memory: Put pixels into page-locked memory, for a GPU.
        chunk_size: Pictures that a worker does at a time.
        prefetch_factor: Chunks that each worker may be ahead.
        multiprocessing_context: How workers start (fork, spawn, forkserver); the system's habit by default.

    Raises:
        UserError: A file is gone or cannot be read, or the records are damaged.
    """
    loader = DataLoader(
        PictureDataset(transform),
        sampler=_Chunks(records, start, stop, chunk_size, depth=2 * max(num_workers, 1)),
        batch_size=None,
        num_workers=num_workers,
        collate_fn=_as_is,
        pin_memory=pin_memory,
        prefetch_factor=prefetch_factor if num_workers else None,
        multiprocessing_context=multiprocessing_context if num_workers else None,
        worker_init_fn=ignore_interrupts,
        generator=torch.Generator(),  # otherwise the loader draws from the global generator
    )
    for packed in loader:
        yield from _unpack(packed)
        if packed.error:
            raise UserError(packed.error)


class PictureDataset(Dataset["_Packed"]):
    """Chunks of prepared pictures; the "index" of a chunk is the list of its records."""

    def __init__(self, transform: PictureTransform) -> None:
        self.transform = transform

    def __getitem__(self, records: list[Record]) -> _Packed:
        """Return the pictures of these records, up to the first whose file is gone."""
        done: list[Picture | Reject] = []
        for record in records:
            try:
                done.append(prepare(record, self.transform))
            except UserError as error:  # as text: an exception that leaves a worker arrives with its traceback in it
                return _pack(done, str(error))
        return _pack(done, None)


class _Chunks(Sampler[list[Record]]):
    """The records in lists, read ahead by a thread."""

    def __init__(self, records: Records, start: int, stop: int | None, chunk_size: int, depth: int) -> None:
        self.records = records
        self.start = start
        self.stop = stop
        self.chunk_size = chunk_size
        self.depth = depth

    def __iter__(self) -> Iterator[list[Record]]:
        rows = self.records.read(self.start, self.stop)
        return _read_ahead(iter(lambda: list(islice(rows, self.chunk_size)), []), self.depth)


def _read_ahead(source: Iterator[list[Record]], depth: int) -> Iterator[list[Record]]:
    """The same items, of which a thread reads up to `depth` before they are asked for."""
    pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="read-ahead")
    try:
        waiting = deque(pool.submit(next, source, None) for _ in range(depth))
        while (item := waiting.popleft().result()) is not None:
            waiting.append(pool.submit(next, source, None))
            yield item
    finally:
        pool.shutdown(cancel_futures=True)


@dataclass(frozen=True)
class _Packed:
    """Prepared pictures whose pixels lie in one tensor: one handle to share, one block to page-lock."""

    pixels: Tensor
    items: list[Picture | Reject]
    shapes: list[list[tuple[int, ...]]]
    error: str | None

    def pin_memory(self) -> _Packed:
        """Return the same in page-locked memory; called by the loader."""
        return dataclasses.replace(self, pixels=self.pixels.pin_memory())


_NO_PIXELS = torch.empty(0, dtype=torch.uint8)


def _pack(items: list[Picture | Reject], error: str | None) -> _Packed:
    blocks, shapes, bare = [_NO_PIXELS], [], []
    for item in items:
        found = item.views if isinstance(item, Picture) else ()
        blocks += [view.x.reshape(-1) for view in found]
        shapes.append([tuple(view.x.shape) for view in found])
        empty = tuple(dataclasses.replace(view, x=_NO_PIXELS) for view in found)
        bare.append(dataclasses.replace(item, views=empty) if isinstance(item, Picture) else item)
    return _Packed(torch.cat(blocks), bare, shapes, error)


def _unpack(packed: _Packed) -> Iterator[Picture | Reject]:
    offset = 0
    for item, shapes in zip(packed.items, packed.shapes, strict=True):
        if isinstance(item, Reject):
            yield item
            continue
        found = []
        for view, shape in zip(item.views, shapes, strict=True):
            size = shape[0] * shape[1] * shape[2]
            found.append(dataclasses.replace(view, x=packed.pixels[offset : offset + size].view(shape)))
            offset += size
        yield dataclasses.replace(item, views=tuple(found))


def _writable(text: str) -> str:
    return text.encode(errors="backslashreplace").decode()


def _as_is(packed: Any) -> Any:
    return packed
