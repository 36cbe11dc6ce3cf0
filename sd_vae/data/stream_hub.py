"""Pictures of a data set that is streamed: no index, so they are taken in the stream's order, window by window.

A window of consecutive records is held undecoded and shuffled by (seed, epoch, window), so that no shuffle buffer has
to be saved. To go on in the middle, the stream is read again up to the window; where it gives other records than
before, some pictures come twice and some not at all. A stream that stalls or breaks off is opened again where it stood.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Iterator
from itertools import islice

from sd_vae.data.randomness import stream_rng
from sd_vae.data.records import Record, Records
from sd_vae.data.remote import pause
from sd_vae.errors import UserError

__all__ = ["StreamImages"]

READ_AHEAD = 64
"""Records that are read before they are asked for."""

logger = logging.getLogger(__name__)


class StreamImages:
    """A stream's records in the order of training.

    Args:
        records: The stream.
        seed: Seed of the run.
        number: Number of the source in its mixture.
        window: Records that are held and shuffled at a time.
        timeout_s: Seconds without a record after which the stream is opened again.
        retries: Times in a row that it is opened again before the run ends.
        pause_s: Seconds to wait before it is opened again, doubled each time, half a minute at most.
    """

    def __init__(
        self,
        records: Records,
        *,
        seed: int,
        number: int,
        window: int,
        timeout_s: float,
        retries: int,
        pause_s: float = 1.0,
    ) -> None:
        self.spec = records.spec
        self.num_reopened = 0
        self._records = records
        self._seed = seed
        self._number = number
        self._window = window
        self._timeout_s = timeout_s
        self._retries = retries
        self._pause_s = pause_s
        self._length: int | None = None  # records of an epoch, once the end has been seen
        self._rows: Iterator[Record] | None = None
        self._epoch, self._first = 0, 0  # the epoch being read, and the position of its first sample
        self._held: list[Record] = []
        self._next = 0  # position after those held

    def at(self, position: int) -> tuple[int, Record]:
        """Return epoch and record of the source's sample number `position`; positions never fall.

        Raises:
            UserError: The stream is empty, or stays out of reach.
        """
        while self._rows is None or position >= self._next:
            if self._rows is None:
                self._seek(position)
            elif not self._read_window():
                self._length, self._rows = self._next - self._first, None
        return self._epoch, self._held[position - (self._next - len(self._held))]

    def _seek(self, position: int) -> None:
        """Open the stream at the window of a position."""
        if self._length is None:
            if self._open(0, position):
                return
            self._length = sum(1 for _ in self._read(0)) if position >= self._window else 0
        if not self._length:
            raise UserError(f"{self.spec} holds no records; choose another split.")
        epoch, place = divmod(position, self._length)
        if not self._open(epoch, place):
            raise UserError(f"{self.spec} held {self._length} records before and has fewer now; start anew.")

    def _open(self, epoch: int, place: int) -> bool:
        """Read the window of a place; False where the stream ends before it."""
        start = place // self._window * self._window
        self._epoch, self._first = epoch, epoch * (self._length or 0)
        self._rows, self._next = self._read(start), self._first + start
        return self._read_window()

    def _read_window(self) -> bool:
        """Hold the next records in their order; False at the end of the stream."""
        assert self._rows is not None
        held = list(islice(self._rows, self._window))
        window = (self._next - self._first) // self._window
        order = stream_rng(self._seed, "window", self._epoch, window, self._number).permutation(len(held))
        if held:
            self._held = [held[index] for index in order]
            self._next += len(held)
        return bool(held)

    def _read(self, start: int) -> Iterator[Record]:
        """Records from `start` to the end, opening the stream again where it breaks off or stalls."""
        tries = 0
        while True:
            try:
                for record in _read_ahead(self._records, start, self._timeout_s):
                    start, tries = start + 1, 0
                    yield record
                return
            except (UserError, TimeoutError) as error:
                tries += 1
                self.num_reopened += 1
                reason = str(error).rstrip(".")
                if tries > self._retries:
                    raise UserError(
                        f"{self.spec} was opened {tries} times in vain at picture {start}: {reason}; check the "
                        "network, then go on from the last checkpoint with --resume."
                    ) from error
                logger.warning("%s is opened again at picture %d: %s", self.spec, start, reason)
                pause(self._pause_s, tries)


def _read_ahead(records: Records, start: int, timeout_s: float) -> Iterator[Record]:
    """Records from `start`, read by a thread that is left behind where it hangs.

    Raises:
        TimeoutError: None came in time.
    """
    waiting: queue.Queue[Record | BaseException | None] = queue.Queue(READ_AHEAD)
    is_over = threading.Event()

    def put(item: Record | BaseException | None) -> None:
        while not is_over.is_set():
            try:
                waiting.put(item, timeout=0.1)
            except queue.Full:
                continue
            return

    def read() -> None:
        try:
            for record in records.read(start):
                put(record)
                if is_over.is_set():
                    return
            put(None)
        except BaseException as error:  # raised again where the records are taken
            put(error)

    threading.Thread(target=read, name="stream", daemon=True).start()
    try:
        while True:
            try:
                item = waiting.get(timeout=timeout_s)
            except queue.Empty:
                raise TimeoutError(f"no picture for {timeout_s:g} s") from None
            if isinstance(item, BaseException):
                raise item
            if item is None:
                return
            yield item
    finally:
        is_over.set()
