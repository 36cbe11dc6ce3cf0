"""What a finished shard and a finished store say of themselves: counts, checksums, what rounding cost.

A `ShardRecord` is written when a shard's files are on disk, so its presence is the shard's completion. The `Manifest`
is written when every shard has one, and follows from them alone: whoever merges, the bytes are the same.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sd_vae.errors import UserError
from sd_vae.files import file_errors, read_json
from sd_vae.latents.format import (
    FORMAT,
    MANIFEST,
    VERSION,
    Numerics,
    Reject,
    StoreDescription,
    latents_file,
    record_file,
    rows_file,
)
from sd_vae.validation import STRICT, from_plain

__all__ = [
    "FileSum",
    "Manifest",
    "Rounding",
    "ShardRecord",
    "merge",
    "read_envelope",
    "read_manifest",
    "read_record",
    "rejects_text",
]


@dataclass(frozen=True, kw_only=True)
class FileSum:
    """Size and checksum of a file."""

    __pydantic_config__ = STRICT

    num_bytes: int
    sha256: str

    @classmethod
    def of(cls, content: bytes) -> "FileSum":
        """Return the sum of a file with this content."""
        return cls(num_bytes=len(content), sha256=hashlib.sha256(content).hexdigest())

    @classmethod
    def of_file(cls, path: Path) -> "FileSum":
        """Return the sum of a file on disk.

        Raises:
            UserError: The file is missing or unreadable.
        """
        with file_errors("read", path), path.open("rb") as file:
            digest = hashlib.sha256()
            while block := file.read(1 << 20):
                digest.update(block)
            return cls(num_bytes=file.tell(), sha256=digest.hexdigest())


@dataclass(frozen=True, kw_only=True)
class Rounding:
    """What storing cost: stored minus float32, over `count` values."""

    __pydantic_config__ = STRICT

    max: float
    """Largest magnitude of the difference."""
    rms: float
    """Root of its mean square."""
    count: int

    @classmethod
    def merge(cls, parts: Iterable["Rounding"]) -> "Rounding":
        """Return the rounding over the values of all parts."""
        parts = list(parts)
        count = sum(part.count for part in parts)
        square = math.fsum(part.rms**2 * part.count for part in parts)
        return cls(
            max=max((part.max for part in parts), default=0.0), rms=math.sqrt(square / max(count, 1)), count=count
        )


@dataclass(frozen=True, kw_only=True)
class ShardRecord:
    """One finished shard."""

    __pydantic_config__ = STRICT

    shard: int
    """Its number."""
    start: int
    """First source record."""
    stop: int
    """One past the last source record."""
    num_items: int
    """Latents, mirrored ones among them."""
    num_flipped: int
    """Mirrored latents."""
    num_rejects: int
    """Source records without a latent."""
    sizes: dict[str, int]
    """Latents of each size, such as 64x64."""
    columns: tuple[str, ...]
    """The user's columns."""
    files: dict[str, FileSum]
    """The shard's other two files, by name."""
    rounding: dict[str, Rounding]
    """What storing cost, by tensor."""
    description: str
    """Digest of the store's description."""
    numerics: Numerics
    """What the shard was really made with."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A finished store."""

    __pydantic_config__ = STRICT

    description: StoreDescription
    num_records: int
    """Source records."""
    num_items: int
    """Latents, mirrored ones among them."""
    num_flipped: int
    """Mirrored latents."""
    num_rejects: int
    """Source records without a latent; rejects.jsonl lists them."""
    sizes: dict[str, int]
    """Latents of each size."""
    columns: tuple[str, ...]
    """The user's columns."""
    rounding: dict[str, Rounding]
    """What storing cost, by tensor."""
    shards: tuple[ShardRecord, ...]
    """Every shard, in order."""

    def to_dict(self) -> dict[str, Any]:
        """Return the content of `manifest.json`."""
        return {"format": FORMAT, "version": VERSION, **dataclasses.asdict(self)}


def merge(description: StoreDescription, records: Sequence[ShardRecord]) -> Manifest:
    """Return the manifest of a store with these shards, which are all there are, in order."""
    sizes: dict[str, int] = {}
    for record in records:
        for size, count in record.sizes.items():
            sizes[size] = sizes.get(size, 0) + count
    names = dict.fromkeys(name for record in records for name in record.rounding)
    return Manifest(
        description=description,
        num_records=records[-1].stop if records else 0,
        num_items=sum(record.num_items for record in records),
        num_flipped=sum(record.num_flipped for record in records),
        num_rejects=sum(record.num_rejects for record in records),
        sizes=dict(sorted(sizes.items())),
        columns=tuple(sorted({name for record in records for name in record.columns})),
        rounding={name: Rounding.merge(record.rounding[name] for record in records) for name in names},
        shards=tuple(records),
    )


def rejects_text(rejects: Iterable[Reject]) -> str:
    """Return the content of `rejects.jsonl`: one JSON object a line."""
    return "".join(json.dumps(dataclasses.asdict(reject), ensure_ascii=False) + "\n" for reject in rejects)


def read_record(folder: Path, shard: int) -> tuple[ShardRecord, list[Reject]]:
    """Return a shard's completion record and its rejects.

    Raises:
        UserError: Missing, unreadable or not such a record.
    """
    path = record_file(folder, shard)
    values = read_envelope(path)
    rejects = values.pop("rejects", [])
    record = from_plain(ShardRecord, values, source=str(path))
    expected = {latents_file(folder, shard).name, rows_file(folder, shard).name}
    if record.shard != shard or record.files.keys() != expected:
        raise UserError(f"{path} describes shard {record.shard} with files {', '.join(record.files)}; remove it.")
    return record, [from_plain(Reject, reject, source=str(path)) for reject in rejects]


def read_manifest(folder: Path) -> Manifest:
    """Return a store's manifest.

    Raises:
        UserError: Missing, unreadable or not a manifest that this version knows.
    """
    path = folder / MANIFEST
    return from_plain(Manifest, read_envelope(path), source=str(path))


def read_envelope(path: Path) -> dict[str, Any]:
    """Return the fields of one of the format's JSON files without its name and version, which are checked.

    Raises:
        UserError: Missing, unreadable, another format, or a newer version.
    """
    values = read_json(path)
    if not isinstance(values, dict) or values.pop("format", None) != FORMAT:
        raise UserError(f"{path} does not say that it is of the format {FORMAT!r}; name the folder of a latent store.")
    version = values.pop("version", None)
    if version != VERSION:
        raise UserError(f"{path} is of version {version}, this program reads {VERSION}; update sd-vae.")
    return values
