"""Is a store still what was written? Files against records, records against the manifest, latents against pictures.

Shapes: N latents, C latent channels, h w latent cells.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from sd_vae.errors import UserError
from sd_vae.files import read_text
from sd_vae.latents.fingerprint import encoder_fingerprint
from sd_vae.latents.format import (
    MANIFEST,
    REJECTS,
    STORE,
    Item,
    Reject,
    StoreDescription,
    latents_file,
    leaves,
    record_file,
    rows_file,
)
from sd_vae.latents.reader import REMAKE, ShardError, ShardReader, find_damage
from sd_vae.latents.records import FileSum, Manifest, ShardRecord, merge, read_record, rejects_text
from sd_vae.latents.store import LatentStore
from sd_vae.latents.writer import stored_values

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["Damage", "Verification", "verify"]

Kind = Literal[
    "unfinished",
    "missing",
    "truncated",
    "checksum",
    "contents",
    "not finite",
    "manifest",
    "encoder",
    "source",
    "latent",
]


@dataclass(frozen=True, kw_only=True)
class Damage:
    """One thing that is wrong with a store."""

    kind: Kind
    """unfinished (no manifest), missing (file), truncated (file of another length), checksum (of a file), contents
    (rows or tensors that do not fit the record), not finite (latents), manifest (at odds with the shards), encoder
    (the VAE given is another), source (a picture is gone or has changed), latent (at odds with its picture)."""
    file: str
    """Name of the file in the store."""
    message: str
    """What is wrong, with both values."""

    def __str__(self) -> str:
        """Return the damage as one line."""
        return f"{self.file}: {self.kind}: {self.message}"


@dataclass(frozen=True, kw_only=True)
class Verification:
    """What `verify` looked at and found."""

    num_shards: int
    """Shards that were read from end to end."""
    num_items: int
    """Latents in them, mirrored ones among them."""
    num_reencoded: int
    """Latents that were encoded again and compared."""
    largest_difference: float | None
    """Largest difference found there, as a part of the latent's largest magnitude; None where none was compared."""
    damages: tuple[Damage, ...]
    """What is wrong, in the order of the shards."""

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.damages


def verify(
    folder: Path | str,
    vae: torch.nn.Module | None = None,
    reencode: Callable[[Item], Tensor] | None = None,
    *,
    num_samples: int = 16,
    tolerance: float | None = None,
    seed: int = 0,
    progress: Callable[[ShardRecord], None] | None = None,
) -> Verification:
    """Read a store from end to end and return everything that is wrong with it.

    Args:
        folder: The store.
        vae: Check that its encoder made the store.
        reencode: Item to the moments (2C, h, w) that encoding its picture again gives; raises `UserError` where the
            picture is gone or has changed.
        num_samples: Latents, at random, that are encoded again.
        tolerance: Largest difference allowed there, as a part of the latent's largest magnitude; 1e-4, which bounds
            another machine's arithmetic, and one step of the store's dtype by default.
        seed: Which latents are encoded again.
        progress: Called with each shard's record when it was read.

    Raises:
        UserError: There is no store to look at.
    """
    store = LatentStore.open(Path(folder))
    manifest, damages = _open_manifest(store)
    damages += _check_encoder(store, vae)
    readers, records, rejects = [], [], []
    for shard in _shard_numbers(store.folder, manifest):
        try:
            record, found = read_record(store.folder, shard)
        except UserError as error:
            kind: Kind = "contents" if record_file(store.folder, shard).exists() else "missing"
            damages.append(Damage(kind=kind, file=record_file(store.folder, shard).name, message=str(error)))
            continue
        records.append(record)
        rejects += found
        reader, wrong = _check_shard(store, record)
        damages += wrong
        readers += [] if reader is None else [reader]
        if progress is not None:
            progress(record)
    if manifest is not None:
        damages += _check_manifest(store, manifest, records, rejects)
    differences = []
    if reencode is not None:
        for reader, row in _choose(readers, num_samples, seed):
            difference, wrong = _compare(store.description, reader, row, reencode, tolerance)
            differences += [] if difference is None else [difference]
            damages += wrong
    return Verification(
        num_shards=len(readers),
        num_items=sum(map(len, readers)),
        num_reencoded=len(differences),
        largest_difference=max(differences, default=None),
        damages=tuple(damages),
    )


def _open_manifest(store: LatentStore) -> tuple[Manifest | None, list[Damage]]:
    """The manifest, or what is wrong with it."""
    try:
        return store.manifest(), []
    except UserError as error:
        kind: Kind = "manifest" if store.is_complete else "unfinished"
        return None, [Damage(kind=kind, file=MANIFEST, message=str(error))]


def _check_encoder(store: LatentStore, vae: torch.nn.Module | None) -> list[Damage]:
    made_by = store.description.encoder
    given = made_by if vae is None else encoder_fingerprint(vae)
    if given == made_by:
        return []
    message = f"the latents were made by the encoder {made_by[:12]}, the VAE given has {given[:12]}"
    return [Damage(kind="encoder", file=STORE, message=message)]


def _shard_numbers(folder: Path, manifest: Manifest | None) -> list[int]:
    """Shards that the manifest names or the folder has a file of."""
    matches = (re.match(r"shard-(\d+)\.", path.name) for path in folder.iterdir())
    named = set() if manifest is None else {record.shard for record in manifest.shards}
    return sorted(named | {int(match[1]) for match in matches if match})


def _check_shard(store: LatentStore, record: ShardRecord) -> tuple[ShardReader | None, list[Damage]]:
    """The shard, where its files are whole, and what is wrong with it."""
    damages = []
    for path in (latents_file(store.folder, record.shard), rows_file(store.folder, record.shard)):
        damage = find_damage(path, record)
        expected = record.files[path.name]
        if damage is not None:
            kind: Kind = "truncated" if path.exists() else "missing"
            damages.append(Damage(kind=kind, file=path.name, message=f"{damage}; {REMAKE}"))
        elif (found := FileSum.of_file(path)) != expected:
            message = f"has sha256 {found.sha256[:12]} instead of {expected.sha256[:12]}; remove it, {REMAKE}"
            damages.append(Damage(kind="checksum", file=path.name, message=message))
    if record.description != store.description.digest:
        message = f"is of the description {record.description[:12]}, {STORE} is {store.description.digest[:12]}"
        damages.append(Damage(kind="contents", file=record_file(store.folder, record.shard).name, message=message))
    if damages:
        return None, damages
    try:
        reader = store.reader(record)
    except ShardError as error:
        return None, [Damage(kind="contents", file=Path(error.path or store.folder).name, message=str(error))]
    return reader, [*_check_rows(reader), *_check_finite(reader)]


def _check_rows(reader: ShardReader) -> Iterator[Damage]:
    """Whether the rows are those that the record counts."""
    record, name = reader.record, reader.rows_path.name
    positions = reader.table["position"].to_numpy()
    if len(positions) and not (record.start <= positions.min() and positions.max() < record.stop):
        message = (
            f"has records {positions.min()} to {positions.max()}, the shard covers {record.start} to {record.stop}"
        )
        yield Damage(kind="contents", file=name, message=message)
    counts = {
        "mirrored items": (int(reader.is_flipped.sum()), record.num_flipped),
        "records with items or rejected": (
            len(np.unique(positions)) + record.num_rejects,
            record.stop - record.start,
        ),
        "latent places": (len({reader.place(row) for row in range(len(reader))}), record.num_items),
    }
    for what, (found, expected) in counts.items():
        if found != expected:
            yield Damage(kind="contents", file=name, message=f"has {found} {what} instead of {expected}")


def _check_finite(reader: ShardReader) -> Iterator[Damage]:
    for row in range(len(reader)):
        if not all(bool(tensor.isfinite().all()) for tensor in reader.latents(row)):
            message = f"the latent of {reader.item(row)} holds NaN or infinity"
            yield Damage(kind="not finite", file=reader.latents_path.name, message=message)


def _check_manifest(
    store: LatentStore, manifest: Manifest, records: list[ShardRecord], rejects: list[Reject]
) -> Iterator[Damage]:
    """Whether manifest and rejects.jsonl are what the shards' records make them."""
    says, expected = (
        dict(leaves(plain | {"shards": {str(shard["shard"]): shard for shard in plain["shards"]}}))
        for plain in (manifest.to_dict(), merge(store.description, records).to_dict())
    )
    for name in {**expected, **says}:
        there, here = says.get(name, "absent"), expected.get(name, "absent")
        if there != here:
            message = f"{name} is {there!r}, by {STORE} and the shards' records {here!r}; run sd-vae encode again"
            yield Damage(kind="manifest", file=MANIFEST, message=message)
    path = store.folder / REJECTS
    if not path.exists():
        yield Damage(kind="missing", file=REJECTS, message="is missing; run sd-vae encode again")
    elif read_text(path) != rejects_text(rejects):
        yield Damage(kind="contents", file=REJECTS, message="is not what the shards' records say")


def _choose(readers: list[ShardReader], num_samples: int, seed: int) -> list[tuple[ShardReader, int]]:
    """Rows at random, in the order of the store."""
    rows = [(reader, row) for reader in readers for row in range(len(reader))]
    chosen = np.random.default_rng(seed).permutation(len(rows))[:num_samples]
    return [rows[number] for number in sorted(chosen.tolist())]


def _compare(
    description: StoreDescription,
    reader: ShardReader,
    row: int,
    reencode: Callable[[Item], Tensor],
    tolerance: float | None,
) -> tuple[float | None, list[Damage]]:
    """The difference of a latent to its picture encoded again, and what is wrong with it."""
    import torch

    item = reader.item(row)
    try:
        moments = reencode(item)
    except UserError as error:
        return None, [Damage(kind="source", file=reader.rows_path.name, message=str(error))]
    allowed = 1e-4 + torch.finfo(getattr(torch, description.dtype)).eps if tolerance is None else tolerance
    largest = 0.0
    for stored, exact in zip(reader.latents(row), stored_values(description, item, moments).values(), strict=True):
        if stored.shape != exact.shape:
            message = f"the latent of {item} is {tuple(stored.shape)}, encoded again {tuple(exact.shape)}"
            return None, [Damage(kind="latent", file=reader.latents_path.name, message=message)]
        distance = float((stored.double() - exact.to(stored.dtype).double()).abs().max())
        largest = max(largest, distance / max(float(exact.abs().max()), torch.finfo(torch.float32).tiny))
    if largest <= allowed:
        return largest, []
    message = f"the latent of {item} differs by {largest:.2g} of its magnitude from its picture encoded again"
    message += f", {allowed:.2g} is allowed"
    return largest, [Damage(kind="latent", file=reader.latents_path.name, message=message)]
