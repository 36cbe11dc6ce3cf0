"""From views of pictures to moments: several at once, in the order of the records, the same numbers every time.

On the CPU each view is encoded alone, by one of several threads. On an accelerator views of one size go in batches,
which never reach over the border of a shard, so that what is computed together does not depend on where a run began or
on how many processes share the work.

Shapes: B views, C latent channels, H W pixels, h w latent cells.
"""

from __future__ import annotations

import copy
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sd_vae.autoencoder import AutoencoderKL
from sd_vae.data import Picture, Reject
from sd_vae.errors import UserError
from sd_vae.images import to_unit_range

__all__ = ["Moments", "ViewEncoder", "encode_pictures", "threads_of_torch"]

BATCH_PIXELS = 2**21
"""Pixels of a batch on an accelerator: 8 views of 512x512."""

ACCELERATOR_THREADS = 2
"""On an accelerator one thread launches the next batch while another waits for the numbers of the last."""

Moments = list["Tensor | None"]
"""cat(mean, logvar) of each view, (2C, h, w) in float32 on the CPU; None where it is not finite."""


class ViewEncoder:
    """Pixels to the moments of their posterior; may be called by several threads at once.

    Args:
        vae: The model, on any device, in any dtype.
    """

    def __init__(self, vae: AutoencoderKL) -> None:
        self.vae = vae
        self._float32: AutoencoderKL | None = None if vae.dtype != torch.float32 else vae
        self._lock = threading.Lock()

    @torch.no_grad()
    def __call__(self, views: Sequence[Tensor]) -> Moments:
        """Return the moments of views of one size.

        A view whose moments overflow half precision is encoded once more in float32.

        Args:
            views: (3, H, W) each, uint8.

        Raises:
            UserError: The device is out of memory.
        """
        try:
            return self._encode(views)
        except torch.OutOfMemoryError as error:
            size = "x".join(map(str, views[0].shape[1:]))
            raise UserError(
                f"{self.vae.device} is out of memory at {len(views)} views of {size} pixels "
                f"({str(error).splitlines()[0].rstrip('.')}); make them smaller with --size, or use --compute-dtype "
                "bfloat16 or --device cpu."
            ) from error

    def _encode(self, views: Sequence[Tensor]) -> Moments:
        # One by one: they lie in page-locked memory, a stack of them would not.
        pixels = torch.stack([view.to(self.vae.device, non_blocking=True) for view in views])
        x = to_unit_range(pixels)  # (B, 3, H, W)
        # Past `encode`, which would raise for the whole batch where one view is not finite.
        moments = self.vae._encode(x.to(self.vae.dtype)).float().cpu()
        found: Moments = [one if _is_finite(one) else None for one in moments]
        if self.vae.dtype != torch.float32:
            for index, one in enumerate(found):
                if one is None:
                    (again,) = self._in_float32()._encode(x[index : index + 1]).cpu()
                    found[index] = again if _is_finite(again) else None
        return found

    def _in_float32(self) -> AutoencoderKL:
        """The model with its weights in float32, made when it is first needed."""
        with self._lock:
            if self._float32 is None:
                self._float32 = copy.deepcopy(self.vae).float()
            return self._float32


def encode_pictures(
    encoder: ViewEncoder, pictures: Iterable[Picture | Reject], *, shard_items: int, num_parallel: int
) -> Generator[tuple[Picture | Reject, Moments]]:
    """Yield what comes in, in its order, with the moments of each view; a reject has none.

    Args:
        encoder: What encodes.
        pictures: In the order of their records.
        shard_items: Records a shard.
        num_parallel: Views that are encoded at once on the CPU.
    """
    is_cpu = encoder.vae.device.type == "cpu"
    num_threads = num_parallel if is_cpu else ACCELERATOR_THREADS
    threads_of_each = torch.get_num_threads()
    pool = ThreadPoolExecutor(num_threads, "encode", initializer=torch.set_num_threads, initargs=(threads_of_each,))
    queue = _Queue(pool, encoder, num_ahead=2 * num_threads, batch_pixels=1 if is_cpu else BATCH_PIXELS)
    try:
        for picture in pictures:
            queue.put(picture, shard=picture_position(picture) // shard_items)
            yield from queue.take()
        queue.flush()
        yield from queue.take(all_of_them=True)
    finally:
        pool.shutdown(cancel_futures=True)


def picture_position(picture: Picture | Reject) -> int:
    """Return the number of a record that has its place in a source."""
    assert picture.position is not None, f"{picture} has no place in a source"
    return picture.position


@contextmanager
def threads_of_torch(count: int) -> Iterator[None]:
    """Let torch compute with so many threads an operation until the block ends."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass
class _Batch:
    """Views that are encoded together."""

    shard: int
    size: tuple[int, ...]
    views: list[Tensor] = field(default_factory=list)
    moments: Future[Moments] | None = None


class _Queue:
    """Pictures whose views wait for their batch to fill, are being encoded, or wait for an earlier picture."""

    def __init__(self, pool: ThreadPoolExecutor, encoder: ViewEncoder, *, num_ahead: int, batch_pixels: int) -> None:
        self._pool = pool
        self._encoder = encoder
        self._num_ahead = num_ahead
        self._batch_pixels = batch_pixels
        self._pictures: deque[tuple[Picture | Reject, list[tuple[_Batch, int]]]] = deque()
        self._running: deque[_Batch] = deque()
        self._open: _Batch | None = None

    def put(self, picture: Picture | Reject, shard: int) -> None:
        """Add a picture; what is full goes to the encoder."""
        if self._open is not None and self._open.shard != shard:
            self.flush()
        places = []
        for view in picture.views if isinstance(picture, Picture) else ():
            size = tuple(view.x.shape[1:])
            if self._open is not None and self._open.size != size:
                self.flush()
            if self._open is None:
                self._open = _Batch(shard, size)
            places.append((self._open, len(self._open.views)))
            self._open.views.append(view.x)
            if (len(self._open.views) + 1) * size[0] * size[1] > self._batch_pixels:
                self.flush()
        self._pictures.append((picture, places))

    def flush(self) -> None:
        """Send the views that wait for others to the encoder."""
        if self._open is not None:
            self._open.moments = self._pool.submit(self._encoder, self._open.views)
            self._running.append(self._open)
            self._open = None

    def take(self, *, all_of_them: bool = False) -> Iterator[tuple[Picture | Reject, Moments]]:
        """Yield the pictures at the front that are done, after a wait where too many batches are on their way."""
        while len(self._running) > (0 if all_of_them else self._num_ahead):
            _result(self._running.popleft())
        while self._pictures and all(_is_done(batch) for batch, _ in self._pictures[0][1]):
            picture, places = self._pictures.popleft()
            yield picture, [_result(batch)[index] for batch, index in places]


def _is_done(batch: _Batch) -> bool:
    return batch.moments is not None and batch.moments.done()


def _result(batch: _Batch) -> Moments:
    assert batch.moments is not None
    return batch.moments.result()


def _is_finite(moments: Tensor) -> bool:
    return bool(moments.isfinite().all())
