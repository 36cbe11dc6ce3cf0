"""A latent store as training reads it: latents by number, drawn from the posterior, mapped into memory.

The draw of item i is a pure function of (seed, epoch, i), so that neither workers nor their number can change it, and
every epoch sees other samples of the same posterior. Only the rows and tensors that are asked for are read.

Shapes: C latent channels, h w latent cells.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import numpy as np

from sd_vae.errors import UserError
from sd_vae.latents.format import REJECTS, Content, Item, rows_file
from sd_vae.latents.reader import ShardReader
from sd_vae.latents.store import LatentStore
from sd_vae.latents.writer import USER_PREFIX

if TYPE_CHECKING:
    import datasets
    import torch
    from numpy.typing import NDArray
    from torch import Tensor

__all__ = ["LatentDataset"]


class LatentDataset:
    """The items of a finished store by number, in the order of the source; works in a `DataLoader` with workers.

    `dataset[i]` is a dictionary: the values under `z`, `latents` where they are scaled, or `moments`, and the user's
    columns by name. Mirrored encodings are no items of their own: with `flips`, one is drawn in half of the cases.

    Args:
        folder: The store.
        content: sample (mean + std * noise, or what a store of samples holds), mode (the mean) or moments
            (cat(mean, logvar)).
        scaled: Give latents as the diffusion model takes them, by the store's scaling and shift factors, instead of
            raw z. Not for moments, which are raw.
        flips: Draw the mirrored encoding half of the time; the store must hold them.
        columns: The user's columns that `dataset[i]` carries; all by default.
        seed: Seed of the draws in `dataset[i]`.

    Raises:
        UserError: No finished store, or one that does not hold what is asked for.
    """

    def __init__(
        self,
        folder: Path | str,
        *,
        content: Content = "sample",
        scaled: bool = False,
        flips: bool = False,
        columns: Sequence[str] | None = None,
        seed: int = 0,
    ) -> None:
        import torch

        self.folder = Path(folder)
        self.manifest = LatentStore.open(self.folder).manifest()
        self.description = self.manifest.description
        self.content = content
        self.scaled = scaled
        self.flips = flips
        self.columns = tuple(self.manifest.columns if columns is None else columns)
        self.seed = seed
        self.key: Literal["z", "latents", "moments"] = (
            "moments" if content == "moments" else "latents" if scaled else "z"
        )
        """What `dataset[i]` calls its values."""
        self._require_held()
        # Shared, so that workers that outlive an epoch see the next one.
        self._epoch = torch.zeros(1, dtype=torch.int64).share_memory_()
        self._ends = list(accumulate(record.num_items - record.num_flipped for record in self.manifest.shards))
        self._shards: dict[int, _Shard] = {}
        offset, factor = (torch.tensor(values).view(-1, 1, 1) for values in self.description.affine)
        self._offset, self._factor = offset, factor

    def __len__(self) -> int:
        """Return the number of items, mirrored ones not counted."""
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return item `index` with its columns, drawn by (seed, epoch, index).

        Raises:
            IndexError: There is no such item.
            UserError: Its shard is missing or damaged.
        """
        import torch

        index = self._positive(index)
        draw = hashlib.blake2b(f"{self.seed} {int(self._epoch)} {index}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(draw, "little"))
        shard, place = self._find(index)
        row = shard.rows[place]
        columns = {name: shard.reader.column(name, row) for name in self.columns}
        return {self.key: self.sample(index, generator), **columns}

    def set_epoch(self, epoch: int) -> None:
        """Make the draws of `dataset[i]` those of another epoch, also in workers that are running."""
        self._epoch.fill_(epoch)

    def sample(self, index: int, generator: torch.Generator | None = None) -> Tensor:
        """Return the values of item `index`, float32 on the CPU.

        Args:
            index: Number of the item.
            generator: Source of the draws: which of the two mirror images first, then the noise. torch's own by
                default.

        Returns:
            z or latents (C, h, w), or moments (2C, h, w); their own memory.

        Raises:
            IndexError: There is no such item.
            UserError: Its shard is missing or damaged.
        """
        import torch

        shard, place = self._find(self._positive(index))
        row = shard.rows[place]
        if self.flips and bool(torch.rand((), generator=generator) < 0.5):
            row += 1  # its mirror image stands right behind it
        # Copies, because the stored tensors are the file's own memory.
        stored = [tensor.to(torch.float32, copy=True) for tensor in shard.reader.latents(row)]
        if self.content == "moments":
            return torch.cat(stored)
        z = stored[0]
        if self.content == "sample" and self.description.content == "moments":
            std = stored[1].mul_(0.5).exp_()
            z.addcmul_(std, torch.empty_like(std).normal_(generator=generator))
        return z.sub_(self._offset).mul_(self._factor) if self.scaled else z

    def item(self, index: int, *, flipped: bool = False) -> Item:
        """Return where item `index`, or its mirror image, comes from.

        Raises:
            IndexError: There is no such item.
            UserError: Its shard is missing or damaged, or the store holds no mirror images.
        """
        if flipped and not self.manifest.num_flipped:
            raise UserError(f"{self.folder} holds no mirror images; encode with --flip.")
        shard, place = self._find(self._positive(index))
        return shard.reader.item(shard.rows[place] + flipped)

    def index_of(self, position: int, view: int = 0) -> int:
        """Return the number of the item that is view `view` of source record `position`.

        Raises:
            KeyError: The record was rejected, or there is no such view.
            UserError: Its shard is missing or damaged.
        """
        number = position // self.description.shard_items
        before = self._ends[number - 1] if number else 0
        return before + self._shard(number).places[position, view]

    def column(self, name: str) -> list[Any]:
        """Return the user's values of all items in one column; None where a record had none.

        Raises:
            UserError: The store has no such column, or a shard is missing or damaged.
        """
        self._require_columns([name])
        return [shard.reader.column(name, row) for shard in self._all_shards() for row in shard.rows]

    @property
    def sizes(self) -> NDArray[np.int32]:
        """Latent size (h, w) of each item, (items, 2): what a sampler needs that puts equal sizes into a batch."""
        sizes = [shard.reader.latent_sizes[shard.rows] for shard in self._all_shards()]
        return np.concatenate([np.zeros((0, 2), np.int32), *sizes])

    def as_hf_dataset(self) -> datasets.Dataset:
        """Return the items as a `datasets.Dataset` whose rows are those of this dataset; nothing is copied.

        Rows are drawn as `dataset[i]` draws them, when they are read. Columns are mapped from the store's files, under
        their names; `item.position` and `item.view` tell which item a row is, also after a filter or a shuffle.

        Raises:
            UserError: The store is empty, or a column has types in two shards that do not go together.
        """
        import datasets

        if not len(self):
            raise UserError(f"{self.folder} holds no items; see {REJECTS} for why.")
        parts = []
        for shard in self._all_shards():
            record = shard.reader.record
            names = {name: f"item.{name}" for name in ("position", "view")}
            names |= {USER_PREFIX + name: name for name in self.columns if name in record.columns}
            rows = datasets.Dataset.from_file(str(rows_file(self.folder, record.shard)))
            rows = rows.select_columns(list(names)).rename_columns(names)
            parts.append(rows.select(shard.rows) if record.num_flipped else rows)
        try:
            return datasets.concatenate_datasets(parts).with_transform(_Rows(self))
        except ValueError as error:
            raise UserError(f"the shards of {self.folder} do not go together: {error}; leave out columns.") from error

    def __getstate__(self) -> dict[str, Any]:
        """Return what a worker process needs; it maps the files itself."""
        return self.__dict__ | {"_shards": {}}

    def _require_held(self) -> None:
        """Check that the store holds what is asked for.

        Raises:
            UserError: It does not.
        """
        held = self.description.content
        if self.content not in get_args(Content):
            raise UserError(f"content is {self.content!r}, choose one of: {', '.join(get_args(Content))}.")
        if held not in ("moments", self.content):
            raise UserError(
                f"{self.folder} holds content {held}, {self.content} is asked for; ask for {held}, or encode moments."
            )
        if self.scaled and self.content == "moments":
            raise UserError(
                "content is moments with scaled, and moments are raw; ask for sample or mode, or scale what you draw "
                "by description.affine."
            )
        if self.flips and not self.manifest.num_flipped:
            raise UserError(f"flips are asked for and {self.folder} holds no mirror images; encode with --flip.")
        self._require_columns(self.columns)

    def _require_columns(self, columns: Sequence[str]) -> None:
        unknown = [name for name in columns if name not in self.manifest.columns]
        if unknown:
            there = ", ".join(self.manifest.columns) or "none"
            raise UserError(f"{self.folder} has no column {unknown[0]!r}; its columns: {there}.")
        if self.key in columns:
            raise UserError(
                f"{self.folder} has a column named {self.key!r} like the values; name the columns you want without it."
            )

    def _positive(self, index: int) -> int:
        if not -len(self) <= index < len(self):
            raise IndexError(f"item {index} of {len(self)} in {self.folder}")
        return index % len(self)

    def _find(self, index: int) -> tuple[_Shard, int]:
        """The shard of an item, and its place among the shard's items."""
        number = bisect_right(self._ends, index)
        return self._shard(number), index - (self._ends[number - 1] if number else 0)

    def _shard(self, number: int) -> _Shard:
        if number not in self._shards:
            reader = ShardReader(self.folder, self.description, self.manifest.shards[number])
            rows = np.flatnonzero(~reader.is_flipped)
            addresses = zip(
                *(reader.table[name].to_numpy()[rows].tolist() for name in ("position", "view")), strict=True
            )
            places = {address: place for place, address in enumerate(addresses)}
            self._shards[number] = _Shard(reader, rows.tolist(), places)
        return self._shards[number]

    def _all_shards(self) -> list[_Shard]:
        return [self._shard(number) for number in range(len(self.manifest.shards))]


class _Shard(NamedTuple):
    """An open shard."""

    reader: ShardReader
    rows: list[int]
    """Rows of its items, without the mirrored ones."""
    places: dict[tuple[int, int], int]
    """(position, view) of an item to its place in `rows`."""


class _Rows:
    """Rows of a `datasets.Dataset` to items of a `LatentDataset`."""

    def __init__(self, dataset: LatentDataset) -> None:
        self.dataset = dataset

    def __call__(self, rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """Return a batch of items: a list each of values and columns."""
        addresses = zip(rows["item.position"], rows["item.view"], strict=True)
        items = [self.dataset[self.dataset.index_of(*address)] for address in addresses]
        return {name: [item[name] for item in items] for name in items[0]}
