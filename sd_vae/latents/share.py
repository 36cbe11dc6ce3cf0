"""What one process does of a store: its records, read in one pass, encoded, written shard by shard."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from itertools import groupby
from typing import NamedTuple

from sd_vae.data import Picture, PictureTransform, Record, Records, picture_loader
from sd_vae.data import Reject as Unusable
from sd_vae.errors import UserError
from sd_vae.latents.encoder import Moments, ViewEncoder, encode_pictures, picture_position
from sd_vae.latents.format import Item, Reject
from sd_vae.latents.processes import Processes
from sd_vae.latents.records import read_record
from sd_vae.latents.store import LatentStore
from sd_vae.latents.writer import ShardWriter

__all__ = ["NOT_FINITE", "Progress", "Share", "Step", "StreamShare", "encode_share"]

NOT_FINITE = "not-finite"
"""Why a picture is rejected whose latent has NaN or infinity, in float32 too."""


class Step(NamedTuple):
    """How far one process has come."""

    num_done: int
    """Records that it has encoded or rejected."""
    num_records: int | None
    """Records that are its share; None in a stream."""
    num_rejects: int
    """Records that it has rejected."""


Progress = Callable[[Step], None]


class Share:
    """The records of some shards, as `Records`.

    Args:
        records: The whole data set, of known length.
        shards: Numbers of the shards, in order.
        shard_items: Records a shard.
    """

    def __init__(self, records: Records, shards: Sequence[int], shard_items: int) -> None:
        assert records.num_records is not None, f"{records.spec} is a stream"
        self.spec = records.spec
        self._records = records
        self._spans = [
            (first * shard_items, min((last + 1) * shard_items, records.num_records)) for first, last in _runs(shards)
        ]

    @property
    def num_records(self) -> int:
        """Number of records in the shards."""
        return sum(stop - start for start, stop in self._spans)

    def read(self, start: int = 0, stop: int | None = None) -> Iterator[Record]:
        """Yield all of them; there is no other start or stop."""
        assert (start, stop) == (0, None), "a share is read whole"
        for first, end in self._spans:
            yield from self._records.read(first, end)


class StreamShare:
    """The records of a stream that one process encodes, as `Records`: those of every n-th shard that is not finished.

    Every process reads the whole stream, because only its end tells how long it is.

    Args:
        records: The stream.
        store: Where the shards go.
        processes: Among whom they are shared.
    """

    num_records = None

    def __init__(self, records: Records, store: LatentStore, processes: Processes) -> None:
        self.spec = records.spec
        self._records = records
        self._store = store
        self._processes = processes
        self.end = 0
        """Records in the stream, known when it has been read."""

    def read(self, start: int = 0, stop: int | None = None) -> Iterator[Record]:
        """Yield those that are to be encoded, in one pass from the first shard that is not finished."""
        assert (start, stop) == (0, None), "a share is read whole"
        shard_items = self._store.description.shard_items
        num_finished = 0
        while self._store.is_finished(num_finished):
            num_finished += 1
        if num_finished:
            self.end = read_record(self._store.folder, num_finished - 1)[0].stop
        for shard, records in groupby(
            self._records.read(num_finished * shard_items), lambda it: it.position // shard_items
        ):
            is_ours = shard % self._processes.count == self._processes.rank and not self._store.is_finished(shard)
            for record in records:
                self.end = record.position + 1
                if is_ours:
                    yield record


def encode_share(
    encoder: ViewEncoder,
    share: Share | StreamShare,
    store: LatentStore,
    transform: PictureTransform,
    *,
    num_parallel: int,
    num_workers: int,
    strict: bool,
    progress: Progress,
) -> int:
    """Encode the records of a share into their shards and return how many there were.

    Args:
        encoder: What encodes.
        share: Records of whole shards.
        store: Where they go.
        transform: What is cut from each picture.
        num_parallel: Pictures that are encoded at once on the CPU.
        num_workers: Processes that read and decode pictures.
        strict: Stop at a record that cannot be used.
        progress: Called at the beginning and after each record.

    Raises:
        UserError: A file has vanished, the disk is full, or, where `strict`, a record cannot be used. The shards that
            are finished stay.
    """
    num_done = num_rejects = 0
    progress(Step(0, share.num_records, 0))
    shard_items = store.description.shard_items
    pictures = picture_loader(share, transform, num_workers=num_workers, pin_memory=encoder.vae.device.type == "cuda")
    encoded = encode_pictures(encoder, pictures, shard_items=shard_items, num_parallel=num_parallel)
    with closing(encoded):
        for shard, group in groupby(encoded, lambda pair: picture_position(pair[0]) // shard_items):
            with store.writer(shard) as writer:
                for picture, moments in group:
                    reject = _write(writer, picture, moments)
                    if reject is not None and strict:
                        raise UserError(
                            f"{reject.source} is {reject.reason}: {reject.detail.rstrip('.')}; mend or remove it, or "
                            "leave --strict out to have it listed in rejects.jsonl."
                        )
                    num_done += 1
                    num_rejects += reject is not None
                    progress(Step(num_done, share.num_records, num_rejects))
    return num_done


def _write(writer: ShardWriter, picture: Picture | Unusable, moments: Moments) -> Reject | None:
    """Give one record to the writer; return why there is no latent, if so."""
    if isinstance(picture, Unusable):
        reject = Reject(**picture.to_dict())
        writer.reject(reject)
        return reject
    finite = [one for one in moments if one is not None]
    if len(finite) < len(moments):
        reject = Reject(
            position=picture.position,
            id=picture.id,
            source=picture.source,
            sha256=picture.sha256,
            reason=NOT_FINITE,
            detail=f"{len(moments) - len(finite)} of {len(moments)} latents hold NaN or infinity, in float32 too",
        )
        writer.reject(reject)
        return reject
    for view, one in zip(picture.views, finite, strict=True):
        item = Item(
            position=picture.position,
            id=picture.id,
            source=picture.source,
            sha256=picture.sha256,
            original_size=picture.original_size,
            resized_size=view.resized_size,
            crop=view.crop,
            view=view.index,
            flipped=view.flipped,
            columns=picture.columns,
        )
        writer.add(item, one)
    return None


def _runs(numbers: Iterable[int]) -> Iterator[tuple[int, int]]:
    """First and last of each row of consecutive numbers."""
    for _, run in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0]):
        found = [number for _, number in run]
        yield found[0], found[-1]
