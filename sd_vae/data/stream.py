"""The pictures that a run trains on: one source or several by weight, each a folder, parquet, tars, or a stream.

`TrainingSource` gives the address of sample p and loads the picture of an address. Pictures of several sources share
one number line: source s begins at s * 2^40, so that an address stays a pair (epoch, index) and one source alone has
the numbers it always had.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol
from urllib.parse import urlsplit

from sd_vae.data.config import DataConfig
from sd_vae.data.randomness import sample_rng
from sd_vae.data.records import Record, open_records
from sd_vae.data.remote import RemoteFiles, is_remote, without_secrets
from sd_vae.data.sources import HUB_PREFIX, open_source
from sd_vae.data.stream_hub import StreamImages
from sd_vae.data.stream_order import MixtureOrder, ShardOrder
from sd_vae.data.stream_tars import open_tar_images
from sd_vae.errors import UserError
from sd_vae.images import IMAGE_SUFFIXES

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["Images", "TrainingSource", "open_images", "open_training_source"]

NUMBERS = 2**40
"""Distance between the first pictures of two sources on the number line."""

NUM_NEXT, NUM_ANY = 8, 32
"""How many of the pictures after an unreadable one, and then of all, may stand in for it before all are tried."""

MAX_TARS = 1_000_000
"""Tars that a range may stand for."""

DEFAULT_STREAM_WINDOW = 1000
"""Records of a stream that are held where `shuffle_window` is 0: all would not end."""


class Images(Protocol):
    """Pictures by number."""

    @property
    def spec(self) -> str:
        """What the user called them."""

    def __len__(self) -> int:
        """Return the number of pictures, readable or not."""

    def load(self, index: int) -> Image.Image:
        """Return picture `index` as RGB, upright."""

    def name(self, index: int) -> str:
        """Return what to call picture `index` in a report."""


class TrainingSource:
    """Everything a run trains on.

    Args:
        images: The sources with an index.
        streams: The sources without one, which come after them.
        weights: Share of each source, indexed ones first; by the number of pictures where there are none.
        seed: Seed of the run.
        window: See `ShardOrder`.

    Raises:
        UserError: Not one weight for each source, or one that is not above 0.
    """

    def __init__(
        self,
        images: Sequence[Images],
        streams: Sequence[StreamImages],
        weights: Sequence[float],
        seed: int,
        window: int,
    ) -> None:
        if weights and len(weights) != len(images) + len(streams):
            raise UserError(
                f"data.train names {len(images) + len(streams)} sources and data.weights {len(weights)}; give one each."
            )
        if streams and not weights and len(images) + len(streams) > 1:
            raise UserError("a stream has no known size; say what share of the samples each source is: data.weights.")
        self.seed = seed
        self.images = list(images)
        self.streams = list(streams)
        self.spec = ", ".join([*(source.spec for source in images), *(source.spec for source in streams)])
        sizes = [getattr(source, "shard_sizes", None) or [len(source)] for source in images]
        self._orders = [ShardOrder(seed, number, part, window) for number, part in enumerate(sizes)]
        self._mixture = MixtureOrder(seed, weights or [len(source) for source in images] or [1.0])

    def __len__(self) -> int:
        """Return the number of pictures that have an index, readable or not."""
        return sum(len(source) for source in self.images)

    @property
    def problems(self) -> list[str]:
        """What of the sources cannot be read at all: damaged tars."""
        return [problem for source in self.images for problem in getattr(source, "problems", [])]

    def address(self, sample: int) -> tuple[int, int, Record | None]:
        """Return epoch and number of the picture that is sample number `sample` of the run; of a stream, its record."""
        number, position = self._mixture.at(sample)
        if number < len(self.images):
            epoch, index = self._orders[number].at(position)
            return epoch, number * NUMBERS + index, None
        epoch, record = self.streams[number - len(self.images)].at(position)
        return epoch, number * NUMBERS + record.position, record

    @property
    def num_retries(self) -> int:
        """Requests that were made again, in this process, for pictures of sources with an index."""
        return sum(getattr(source, "num_retries", 0) for source in self.images)

    def load(self, index: int) -> Image.Image:
        """Return the picture of a number as RGB, upright.

        Raises:
            UserError: It cannot be read.
        """
        source, local = divmod(index, NUMBERS)
        return self.images[source].load(local)

    def candidates(self, epoch: int, index: int) -> Iterator[int]:
        """Yield a picture's number and what takes its place where it cannot be read: the next, then any, then all.

        A whole tar may be missing, and then the pictures after it should not stand in for all of its own. Of a source
        on the web not all are tried: that would be as many requests, and none might be answered.
        """
        source, local = divmod(index, NUMBERS)
        size = len(self.images[source])
        num_last = 0 if size <= NUM_NEXT or getattr(self.images[source], "is_remote", False) else size
        yield from (source * NUMBERS + (local + offset) % size for offset in range(min(NUM_NEXT, size)))
        rng = sample_rng(self.seed, epoch, index, "replacement")
        yield from (source * NUMBERS + int(other) for other in rng.integers(0, size, NUM_ANY if size > NUM_NEXT else 0))
        yield from (source * NUMBERS + other for other in range(num_last))


def open_training_source(config: DataConfig, seed: int) -> TrainingSource:
    """Return what `config.train` names.

    Raises:
        UserError: As `open_images` and `open_records`, or the weights do not fit the sources.
    """
    streamed = [spec for spec in config.sources if config.streaming and spec.startswith(HUB_PREFIX)]
    indexed = [spec for spec in config.sources if spec not in streamed]
    weights = dict(zip(config.sources, config.weights, strict=True)) if config.weights else {}
    images = [
        open_images(spec, config.image_column, RemoteFiles(timeout_s=config.request_timeout_s, retries=config.retries))
        for spec in indexed
    ]
    streams = [
        StreamImages(
            open_records(spec, columns=[], image_column=config.image_column, streaming=True),
            seed=seed,
            number=len(images) + number,
            window=config.shuffle_window or DEFAULT_STREAM_WINDOW,
            timeout_s=config.timeout_s,
            retries=config.retries,
        )
        for number, spec in enumerate(streamed)
    ]
    shares = [weights[spec] for spec in [*indexed, *streamed]] if weights else []
    return TrainingSource(images, streams, shares, seed=seed, window=config.shuffle_window)


def open_images(spec: str, image_column: str = "image", files: RemoteFiles | None = None) -> Images:
    """Return the pictures that `spec` names, by number.

    Args:
        spec: As `open_source`, or a tar, a folder of tars, or many tars as `shards/{0000..0099}.tar`; a tar may be an
            address on the web.
        image_column: Column with the pictures in tables, ending of the pictures in tars.
        files: Reads what is remote.

    Raises:
        UserError: As `open_source`; tars without pictures; a folder with tars and something else; an address of
            anything but tars.
    """
    if is_remote(spec):
        if not urlsplit(spec).path.endswith(".tar"):
            raise UserError(f"{without_secrets(spec)} is no tar; of the web, name tars, or download it.")
        return open_tar_images(spec, _expand(spec), image_column, files)
    path = Path(spec)
    if spec.endswith(".tar"):
        return open_tar_images(spec, _expand(spec), image_column)
    tars = sorted(path.rglob("*.tar")) if path.is_dir() else []
    if not tars:
        return open_source(spec, image_column=image_column)
    num_others = sum(file.suffix.lower() in {*IMAGE_SUFFIXES, ".parquet"} for file in path.rglob("*"))
    if num_others:
        raise UserError(
            f"{spec} holds {len(tars)} tars and {num_others} pictures or parquet files, and which to use is a guess; "
            "move one kind elsewhere or name a folder below it."
        )
    return open_tar_images(spec, [str(tar) for tar in tars], image_column)


def _expand(spec: str) -> list[str]:
    """The tars that a name with `{first..last}` stands for, numbers padded as they are written."""
    ranges = re.findall(r"\{(\d+)\.\.(\d+)\}", spec)
    pieces = re.split(r"\{\d+\.\.\d+\}", spec)
    names = [pieces[0]]
    for (first, last), piece in zip(ranges, pieces[1:], strict=True):
        if int(last) < int(first) or int(last) - int(first) >= MAX_TARS:
            raise UserError(
                f"{spec} counts from {first} to {last}; write the smaller number first, {MAX_TARS} at most."
            )
        numbers = [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
        names = [name + number + piece for name in names for number in numbers]
    return names
