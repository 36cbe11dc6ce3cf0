"""The items of a store as an export takes them: what the layout needs is checked first, then each is converted.

A draw of an item is the one that a store of samples with the same seed would hold: it depends on (seed, position, view,
mirrored) alone, so exports of one store agree with each other.

Shapes: C latent channels, h w latent cells.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sd_vae.errors import UserError
from sd_vae.latents.export.layouts import Draw, LayoutName, Values, find_layout
from sd_vae.latents.export.note import Scale
from sd_vae.latents.format import Item
from sd_vae.latents.store import LatentStore
from sd_vae.latents.writer import stored_values

if TYPE_CHECKING:
    from torch import Tensor

    from sd_vae.latents.reader import ShardReader
    from sd_vae.latents.records import ShardRecord

__all__ = ["ExportItem", "ExportItems"]


@dataclass(frozen=True, kw_only=True)
class ExportItem:
    """One latent on its way out."""

    index: int
    """Running number, from 0."""
    item: Item
    """Where it comes from."""
    values: Tensor
    """What the layout holds, float32: (C, h, w), or (2C, h, w) for mean and logvar or std."""
    mirrored: Tensor | None
    """The same of its mirror image, where the store has one and the layout takes it."""
    label: int | None
    """Number of its class, where the layout takes one."""


class ExportItems:
    """The items of a finished store, in its order, without mirrored ones, as one layout takes them.

    Args:
        folder: The store.
        layout_name: Who will read them.
        draw: sample (one draw from the posterior; the default) or mode (the mean), where the layout holds one latent.
        seed: Seed of the draws.
        values: raw or scaled, where the layout has no convention.
        label: The user's column with the class: a number, or a name; names are numbered in sorted order.
        unlabelled: Leave out labels, where the layout can do without.

    Raises:
        UserError: The store lacks what the layout needs, or an option contradicts the layout.
    """

    def __init__(
        self,
        folder: Path | str,
        layout_name: LayoutName,
        *,
        draw: Draw | None = None,
        seed: int = 0,
        values: Values | None = None,
        label: str = "label",
        unlabelled: bool = False,
    ) -> None:
        self.layout_name, self.layout = layout_name, find_layout(layout_name)
        self.store = LatentStore.open(Path(folder))
        self.manifest = self.store.manifest()
        self.description = self.store.description
        self.draw = self._choose_draw(draw)
        self.seed = seed if self.draw == "sample" and self.description.content == "moments" else self.description.seed
        """Seed of the draws, whoever made them; None where nothing is drawn."""
        self.values = self._choose_values(values)
        self.label = label
        self._require_shapes()
        self._require_views()
        self.classes: tuple[str, ...] | None = None
        """Names of the classes, where the labels are names."""
        self.labels = self._read_labels(unlabelled)
        """Class of each item; None where none is kept."""

    def __len__(self) -> int:
        """Return the number of items, mirrored ones not counted."""
        return self.manifest.num_items - self.manifest.num_flipped

    @property
    def folder(self) -> Path:
        """The store."""
        return self.store.folder

    @property
    def scale(self) -> Scale:
        """What is written of the values' scale."""
        offset, factor = self.description.affine
        return Scale(values=self.values, offset=tuple(offset), factor=tuple(factor))

    @property
    def keeps_mirrored(self) -> bool:
        """Whether mirrored encodings are exported."""
        return self.layout.mirrored != "left out" and self.manifest.num_flipped > 0

    def by_shard(self, progress: Callable[[int, int], None] | None = None) -> Iterator[list[ExportItem]]:
        """Yield the items of each shard that has any, in order.

        Args:
            progress: Called with (done, total) items after each.

        Raises:
            UserError: A shard is missing or damaged.
        """
        index = 0
        for record in self.manifest.shards:
            if record.num_items:
                found = []
                for one in self._items(record, index):
                    found.append(one)
                    index += 1
                    if progress:
                        progress(index, len(self))
                yield found

    def _items(self, record: ShardRecord, index: int) -> Iterator[ExportItem]:
        reader = self.store.reader(record)
        for row in range(len(reader)):
            if reader.is_flipped[row]:
                continue
            has_mirrored = self.keeps_mirrored and row + 1 < len(reader) and bool(reader.is_flipped[row + 1])
            item = reader.item(row)
            mirror = dataclasses.replace(item, flipped=True)
            yield ExportItem(
                index=index,
                item=item,
                values=self._convert(reader, row, item),
                mirrored=self._convert(reader, row + 1, mirror) if has_mirrored else None,
                label=self.labels[index] if self.labels else None,
            )
            index += 1

    def _convert(self, reader: ShardReader, row: int, item: Item) -> Tensor:
        """What the layout holds of one row."""
        import torch

        stored = [tensor.to(torch.float32, copy=True) for tensor in reader.latents(row)]
        match self.layout.holds:
            case "mean and logvar":
                return torch.cat(stored)
            case "mean and std":
                mean, logvar = stored
                return torch.cat([mean, torch.exp(0.5 * logvar)])
        z = stored[0]
        if self.draw == "sample" and self.description.content == "moments":
            sampled = dataclasses.replace(self.description, content="sample", seed=self.seed)
            z = stored_values(sampled, item, torch.cat(stored))["z"]
        if self.values == "raw":
            return z
        offset, factor = (torch.tensor(numbers).view(-1, 1, 1) for numbers in self.description.affine)
        return (z - offset) * factor

    def _choose_draw(self, draw: Draw | None) -> Draw | None:
        content, holds = self.description.content, self.layout.holds
        if holds != "one latent":
            if content != "moments":
                raise UserError(
                    f"{self.layout_name} holds {holds} of each posterior, {self.folder} holds content {content}; "
                    "encode with --content moments."
                )
            if draw:
                raise UserError(
                    f"--draw is {draw} and {self.layout_name} holds {holds}, nothing is drawn; leave out --draw."
                )
            return None
        draw = draw or "sample"
        if content not in ("moments", draw):
            raise UserError(
                f"{self.layout_name} is written with --draw {draw}, {self.folder} holds content {content}; "
                f"pass --draw {content}, or encode with --content moments."
            )
        return draw

    def _choose_values(self, values: Values | None) -> Values:
        fixed = self.layout.values
        if fixed is None and values is None:
            raise UserError(
                f"{self.layout_name} has no convention for the scale of latents; pass --values scaled (as a diffusion "
                "model takes them) or --values raw (as the encoder gives them)."
            )
        if fixed and values not in (None, fixed):
            raise UserError(
                f"--values is {values} and {self.layout_name} holds {fixed} latents by convention; leave out --values."
            )
        chosen = fixed or values
        assert chosen is not None
        return chosen

    def _require_shapes(self) -> None:
        sizes = self.manifest.sizes
        listed = ", ".join(f"{count} of {size}" for size, count in sizes.items())
        if not sizes:
            raise UserError(f"{self.folder} holds no latents; its rejects.jsonl says why.")
        if self.layout.one_size and len(sizes) > 1:
            raise UserError(
                f"{self.layout_name} takes latents of one size, {self.folder} holds {listed}; encode with --size."
            )
        oblong = [size for size in sizes if len(set(size.split("x"))) > 1]
        if self.layout.square and oblong:
            raise UserError(
                f"{self.layout_name} takes square latents, {self.folder} holds some of {oblong[0]}; encode with --size."
            )
        num_channels = self.description.vae.latent_channels
        if num_channels != (self.layout.num_channels or num_channels):
            raise UserError(
                f"{self.layout_name} is read as latents of {self.layout.num_channels} channels, {self.folder} holds "
                f"some of {num_channels}; export to another format."
            )
        if self.layout.mirrored == "required" and not self.manifest.num_flipped:
            raise UserError(
                f"{self.layout_name} needs the mirror image of each picture, {self.folder} holds none; "
                "encode with --flip."
            )

    def _require_views(self) -> None:
        if self.layout.several_views:
            return
        for record in self.manifest.shards:
            reader = self.store.reader(record)
            if any(reader.table["view"].to_pylist()):
                raise UserError(
                    f"{self.layout_name} keeps one latent a picture, {self.folder} holds several crops of some; "
                    "encode without --random-crops."
                )

    def _read_labels(self, unlabelled: bool) -> list[int] | None:
        """Number of each item's class, or None where the layout keeps none."""
        need = self.layout.label
        if unlabelled and need == "required":
            raise UserError(f"{self.layout_name} cannot be read without a label; leave out --unlabelled.")
        if unlabelled or need == "unused":
            return None
        if self.label not in self.manifest.columns:
            there = ", ".join(self.manifest.columns) or "none"
            waiver = ", or pass --unlabelled" if need == "optional" else ""
            raise UserError(
                f"{self.layout_name} needs a class for each latent and {self.folder} has no column {self.label!r} (its "
                f"columns: {there}); name the column with --label, encode pictures in folders of classes{waiver}."
            )
        found: list[Any] = []
        for record in self.manifest.shards:
            reader = self.store.reader(record)
            found += [reader.column(self.label, row) for row in range(len(reader)) if not reader.is_flipped[row]]
        are_names = isinstance(found[0], str)
        odd = [value for value in found if not _is_class(value, are_names)]
        if odd:
            raise UserError(
                f"column {self.label!r} of {self.folder} holds {odd[0]!r}, a class is a number from 0 or a name, the "
                "same for all items; mend the column, or name another with --label."
            )
        if not are_names:
            return found
        self.classes = tuple(sorted(set(found)))
        numbers = {name: number for number, name in enumerate(self.classes)}
        return [numbers[name] for name in found]


def _is_class(value: Any, is_name: bool) -> bool:
    """Whether a label is one: a name, or a number from 0."""
    return isinstance(value, str) if is_name else type(value) is int and value >= 0
