"""A folder of latents: made shard by shard by any number of processes, killed at will, finished by one of them.

    store = LatentStore.create(folder, description)         # makes it, or goes on with it
    for shard in store.unfinished(num_records)[rank::world_size]:
        with store.writer(shard) as writer:
            ...                                             # writer.add(item, moments), writer.reject(reject)
    store.finish(num_records)                               # one process, when all are done

Shard k covers the source records [k * shard_items, (k + 1) * shard_items) and its bytes follow from them alone, so that
processes share nothing but the folder. docs/latent_format.md is the specification.
"""

from __future__ import annotations

import logging
from pathlib import Path

from sd_vae.errors import UserError
from sd_vae.files import file_errors, make_folder, write_json, write_text
from sd_vae.latents.format import (
    FORMAT,
    MANIFEST,
    REJECTS,
    STORE,
    VERSION,
    Numerics,
    Reject,
    StoreDescription,
    latents_file,
    record_file,
    rows_file,
)
from sd_vae.latents.reader import ShardReader, find_damage
from sd_vae.latents.records import Manifest, ShardRecord, merge, read_envelope, read_manifest, read_record, rejects_text
from sd_vae.latents.writer import ShardWriter, remove_leftovers

__all__ = ["LatentStore"]

logger = logging.getLogger(__name__)


class LatentStore:
    """A folder of latents, finished or in the making; `create` or `open` makes one.

    Args:
        folder: Where it is.
        description: What its `store.json` says.
        numerics: What this process encodes with.
    """

    def __init__(self, folder: Path, description: StoreDescription, numerics: Numerics) -> None:
        self.folder = folder
        self.description = description
        self.numerics = numerics

    @classmethod
    def create(cls, folder: Path, description: StoreDescription, *, allow_numeric_drift: bool = False) -> LatentStore:
        """Return the store at `folder` to write to: a new one, or the one that is there if it is the same.

        Several processes may do this at once with one description.

        Args:
            folder: Where it is or will be.
            description: What it holds.
            allow_numeric_drift: Go on although the CPU, the threads or the libraries are others, which may move the
                last bits; each shard's record says what it was made with.

        Raises:
            UserError: Something else is there, a store with another description is, or the folder cannot be written.
        """
        folder = Path(folder)
        path = folder / STORE
        if not path.exists():
            _require_vacant(folder)
            make_folder(folder)
            write_json(path, {"format": FORMAT, "version": VERSION, **description.to_dict()})
        # Read back what is there now: another process may have been faster.
        store = cls.open(folder)
        found = store.description
        differences = [
            difference
            for difference in description.differences(found)
            if not (difference.is_numeric and allow_numeric_drift)
        ]
        if differences:
            listed = "; ".join(f"{name} is {here!r}, there {there!r}" for name, here, there, _ in differences)
            only_drift = all(difference.is_numeric for difference in differences)
            remedy = "pass --allow-numeric-drift to accept other last bits" if only_drift else "use the same arguments"
            raise UserError(f"{folder} holds latents of another make: {listed}; {remedy}, or choose another --out.")
        return cls(folder, found, description.numerics)

    @classmethod
    def open(cls, folder: Path) -> LatentStore:
        """Return the store at `folder`, finished or not.

        Raises:
            UserError: No store is there, or its description cannot be read.
        """
        folder = Path(folder)
        path = folder / STORE
        if not path.is_file():
            raise UserError(f"{folder} is not a latent store, it has no {STORE}; make one with sd-vae encode.")
        description = StoreDescription.from_dict(read_envelope(path), source=str(path))
        return cls(folder, description, description.numerics)

    @property
    def is_complete(self) -> bool:
        """Whether the manifest is written."""
        return (self.folder / MANIFEST).is_file()

    def num_shards(self, num_records: int) -> int:
        """Return the shards of a source with so many records."""
        return -(-num_records // self.description.shard_items)

    def unfinished(self, num_records: int) -> list[int]:
        """Return the shards that are still to be made, in order: without a record, or with a file lost or cut off.

        Args:
            num_records: Source records.

        Raises:
            UserError: A record on disk cannot be read, or is of another description.
        """
        return [shard for shard in range(self.num_shards(num_records)) if not self.is_finished(shard)]

    def is_finished(self, shard: int) -> bool:
        """Return whether a shard has its record and both files have the size that it says.

        Raises:
            UserError: Its record cannot be read, or is of another description.
        """
        if not record_file(self.folder, shard).exists():
            return False
        record, _ = self._record(shard)
        for path in (latents_file(self.folder, shard), rows_file(self.folder, shard)):
            damage = find_damage(path, record)
            if damage:
                logger.warning("%s %s: shard %d is made anew.", path, damage, shard)
                return False
        return True

    def writer(self, shard: int) -> ShardWriter:
        """Return what takes the latents of one shard and writes them at the end of its `with` block."""
        return ShardWriter(self.folder, self.description, self.numerics, shard)

    def finish(self, num_records: int) -> Manifest:
        """Merge the shards: write `rejects.jsonl`, then the manifest, and remove what killed processes left.

        Called by one process, when all are done; may be called again.

        Args:
            num_records: Source records.

        Raises:
            UserError: Shards are missing or cover other records, or a file cannot be written.
        """
        missing = self.unfinished(num_records)
        if missing:
            raise UserError(
                f"{self.folder} lacks {len(missing)} of {self.num_shards(num_records)} shards, the first is "
                f"{missing[0]}; run sd-vae encode again with the same arguments to finish it."
            )
        records: list[ShardRecord] = []
        rejects: list[Reject] = []
        for shard in range(self.num_shards(num_records)):
            record, found = self._record(shard)
            start = shard * self.description.shard_items
            stop = min(start + self.description.shard_items, num_records)
            if (record.start, record.stop) != (start, stop):
                raise UserError(
                    f"{record_file(self.folder, shard)} covers the records {record.start} to {record.stop}, the source "
                    f"of {num_records} has {start} to {stop} there: it has changed; choose another --out."
                )
            records.append(record)
            rejects += found
        remove_leftovers(self.folder)
        write_text(self.folder / REJECTS, rejects_text(rejects))
        manifest = merge(self.description, records)
        write_json(self.folder / MANIFEST, manifest.to_dict())
        return manifest

    def manifest(self) -> Manifest:
        """Return the manifest of the finished store.

        Raises:
            UserError: The store is not finished, or its manifest is damaged.
        """
        if not self.is_complete:
            num_done = len(list(self.folder.glob("shard-*.json")))
            raise UserError(
                f"{self.folder} is not finished, it has {num_done} shards and no {MANIFEST}; run sd-vae encode again "
                "with the same arguments."
            )
        return read_manifest(self.folder)

    def reader(self, record: ShardRecord) -> ShardReader:
        """Return the latents and rows of one shard of the manifest.

        Raises:
            UserError: Its files are missing or damaged.
        """
        return ShardReader(self.folder, self.description, record)

    def _record(self, shard: int) -> tuple[ShardRecord, list[Reject]]:
        record, rejects = read_record(self.folder, shard)
        if record.description != self.description.digest:
            raise UserError(
                f"{record_file(self.folder, shard)} is of the description {record.description[:12]}, {STORE} of "
                f"{self.description.digest[:12]}: two stores are mixed in one folder; remove the shard or the store."
            )
        return record, rejects


def _require_vacant(folder: Path) -> None:
    """Check that a new store would not be laid over something else.

    Raises:
        UserError: The folder is a file, or holds anything but temporary files of a process that does the same.
    """
    with file_errors("read", folder):
        if folder.exists() and not folder.is_dir():
            raise UserError(f"{folder} is a file, a latent store is a folder; choose another --out.")
        names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    # Nobody writes a shard before store.json is there, which is looked at last.
    others = [name for name in names if not (name.startswith(f".{STORE}.") and name.endswith(".tmp"))]
    if others and not (folder / STORE).exists():
        raise UserError(
            f"{folder} is not a latent store (it holds {others[0]}, no {STORE}), so nothing is written there; "
            "choose another --out."
        )
