"""Writing one shard: latents are gathered in memory, then three files appear, the completion record last.

A shard's bytes follow from the store's description and the shard's own records. It does not matter which process made
it, when, or how often it was begun.

Shapes: C latent channels, h w latent cells.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from sd_vae.errors import UserError
from sd_vae.files import atomic_file, file_errors, write_json
from sd_vae.latents.format import (
    FORMAT,
    LOGVAR_RANGE,
    MANIFEST,
    TENSORS,
    VERSION,
    Item,
    Numerics,
    Reject,
    StoreDescription,
    latents_file,
    record_file,
    rows_file,
    size_name,
)
from sd_vae.latents.records import FileSum, Rounding, ShardRecord

if TYPE_CHECKING:
    import pyarrow
    import torch
    from torch import Tensor

__all__ = ["ITEM_FIELDS", "USER_PREFIX", "ShardWriter", "stored_values"]

ITEM_FIELDS = tuple(field.name for field in dataclasses.fields(Item) if field.name != "columns")
"""Columns of the rows that every store has, beside `latent_size` and `latent_index`."""

USER_PREFIX = "columns."
"""Stands before the user's columns, so that theirs may be called id or source too."""


class ShardWriter:
    """Gathers one shard's latents; as a context manager, writes them when its block ends without an exception.

    Made by `LatentStore.writer`. Records come in the order of their positions, without gaps: each has items or is
    rejected.

    Args:
        folder: The store's.
        description: The store's.
        numerics: What this process runs with.
        shard: Number of the shard.
    """

    def __init__(self, folder: Path, description: StoreDescription, numerics: Numerics, shard: int) -> None:
        self.folder = folder
        self.description = description
        self.numerics = numerics
        self.shard = shard
        self.start = shard * description.shard_items
        self._next = self.start
        self._items: list[Item] = []
        self._sizes: list[str] = []
        self._rejects: list[Reject] = []
        self._latents: dict[str, list[Tensor]] = {}
        self._rounding: dict[str, list[Rounding]] = {name: [] for name in TENSORS[description.content]}

    def __enter__(self) -> ShardWriter:
        """Remove what a killed attempt at this shard left behind."""
        remove_leftovers(self.folder, f".{latents_file(self.folder, self.shard).stem}.")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Write the shard, unless the block raised."""
        if kind is None:
            self._commit()

    def add(self, item: Item, moments: Tensor) -> None:
        """Take one latent.

        Args:
            item: Where it comes from. A mirrored item comes right after the one that it mirrors.
            moments: cat(mean, logvar) of its posterior over raw z, (2C, h, w), finite.

        Raises:
            UserError: A value is too large for the store's dtype.
        """
        channels = self.description.vae.latent_channels
        assert moments.shape[:-2] == (2 * channels,), f"moments of shape {tuple(moments.shape)} for C={channels}"
        assert bool(moments.isfinite().all()), f"latent of {item} is not finite"
        size = size_name(*moments.shape[-2:])
        self._advance(item.position)
        if item.flipped:
            mirrors = self._items[-1:] == [dataclasses.replace(item, flipped=False)] and self._sizes[-1] == size
            assert mirrors, f"{item} does not stand behind the item that it mirrors"
        for name, exact in stored_values(self.description, item, moments).items():
            stored = exact.to(_torch_dtype(self.description))
            if not bool(stored.isfinite().all()):
                raise UserError(
                    f"the latent of {item} reaches {float(exact.abs().max()):g}, which {self.description.dtype} "
                    "cannot hold; store bfloat16 or float32."
                )
            self._latents.setdefault(f"{name}/{size}", []).append(stored)
            self._rounding[name].append(_rounding(stored, exact))
        self._items.append(item)
        self._sizes.append(size)

    def reject(self, reject: Reject) -> None:
        """Note that a source record has no latent."""
        self._advance(reject.position)
        assert not self._items or self._items[-1].position != reject.position, f"{reject.id} has a latent already"
        self._rejects.append(reject)

    def _advance(self, position: int) -> None:
        """Check that the records come in order, without gaps, and are this shard's."""
        assert position in (self._next - 1, self._next), f"record {position} came where {self._next} was due"
        assert self.start <= position < self.start + self.description.shard_items, f"{position} is another shard's"
        self._next = position + 1

    def _commit(self) -> None:
        from safetensors.torch import save

        assert self._next > self.start, f"shard {self.shard} has no records"
        rows, columns = _rows(self._items, self._sizes)
        latents = {name: _stack(tensors) for name, tensors in sorted(self._latents.items())}
        contents = {
            # One entry of metadata: safetensors writes several in random order.
            latents_file(self.folder, self.shard): save(latents, {FORMAT: json.dumps(self._metadata())}),
            rows_file(self.folder, self.shard): rows,
        }
        record = ShardRecord(
            shard=self.shard,
            start=self.start,
            stop=self._next,
            num_items=len(self._items),
            num_flipped=sum(item.flipped for item in self._items),
            num_rejects=len(self._rejects),
            sizes={size: self._sizes.count(size) for size in sorted(set(self._sizes))},
            columns=columns,
            files={path.name: FileSum.of(content) for path, content in contents.items()},
            rounding={name: Rounding.merge(parts) for name, parts in self._rounding.items()},
            description=self.description.digest,
            numerics=self.numerics,
        )
        path = record_file(self.folder, self.shard)
        # What says "finished" goes before anything it vouches for changes.
        with file_errors("write", path):
            (self.folder / MANIFEST).unlink(missing_ok=True)
            path.unlink(missing_ok=True)
        for file, content in contents.items():
            with atomic_file(file) as temporary:
                temporary.write_bytes(content)
        rejects = [dataclasses.asdict(reject) for reject in self._rejects]
        write_json(path, {"format": FORMAT, "version": VERSION, **dataclasses.asdict(record), "rejects": rejects})

    def _metadata(self) -> dict[str, Any]:
        """What a shard's tensors say of themselves when they are alone."""
        description = self.description
        return {
            "version": VERSION,
            "values": "raw z, not scaled",
            "content": description.content,
            "encoder": description.encoder,
            "description": description.digest,
            "shard": self.shard,
        }


def stored_values(description: StoreDescription, item: Item, moments: Tensor) -> dict[str, Tensor]:
    """Return what a store keeps of a posterior, in float32 before rounding, by tensor name, (C, h, w) each.

    Args:
        description: The store's; its content and seed count.
        item: Whose posterior; a sample's noise depends on (seed, position, view, flipped) alone.
        moments: (2C, h, w).
    """
    import torch

    mean, logvar = moments.detach().float().cpu().chunk(2)
    logvar = logvar.clamp(*LOGVAR_RANGE)
    match description.content:
        case "moments":
            return {"mean": mean, "logvar": logvar}
        case "mode":
            return {"mean": mean}
        case "sample":
            key = (item.position, item.view, int(item.flipped))
            rng = np.random.default_rng(np.random.SeedSequence(description.seed, spawn_key=key))
            noise = torch.from_numpy(rng.standard_normal(tuple(mean.shape), dtype=np.float32))
            return {"z": mean + torch.exp(0.5 * logvar) * noise}


def remove_leftovers(folder: Path, prefix: str = ".") -> None:
    """Remove temporary files that a killed process left in a store.

    Args:
        folder: The store's.
        prefix: What their names begin with.
    """
    with file_errors("write", folder):
        for path in folder.glob(f"{prefix}*.tmp"):
            path.unlink(missing_ok=True)


def _torch_dtype(description: StoreDescription) -> torch.dtype:
    import torch

    return cast("torch.dtype", getattr(torch, description.dtype))


def _rounding(stored: Tensor, exact: Tensor) -> Rounding:
    """What storing one tensor cost; by numpy, whose sums do not depend on a number of threads."""
    error = (stored.float() - exact).numpy()
    mean_square = float(np.square(error, dtype=np.float64).mean())
    return Rounding(max=float(np.abs(error).max()), rms=math.sqrt(mean_square), count=error.size)


def _stack(tensors: list[Tensor]) -> Tensor:
    """(N, C, h, w) of its own memory; the parts are let go."""
    import torch

    stacked = torch.stack(tensors)
    tensors.clear()
    return stacked


def _rows(items: list[Item], sizes: list[str]) -> tuple[bytes, tuple[str, ...]]:
    """The rows as an Arrow stream, and the names of the user's columns.

    Raises:
        UserError: A column holds what Arrow has no common type for, or text that is no Unicode.
    """
    import pyarrow as pa

    pair, quad = pa.list_(pa.int32(), 2), pa.list_(pa.int32(), 4)
    types = {
        "position": pa.int64(),
        "view": pa.int32(),
        "flipped": pa.bool_(),
        "original_size": pair,
        "resized_size": pair,
        "crop": quad,
    }
    arrays = {
        name: pa.array([getattr(item, name) for item in items], types.get(name, pa.string())) for name in ITEM_FIELDS
    }
    arrays["latent_size"] = pa.array([[int(side) for side in size.split("x")] for size in sizes], pair)
    seen = dict.fromkeys(sizes, 0)
    indices = []
    for size in sizes:
        indices.append(seen[size])
        seen[size] += 1
    arrays["latent_index"] = pa.array(indices, pa.int32())
    columns = tuple(sorted({name for item in items for name in item.columns}))
    for name in columns:
        arrays[USER_PREFIX + name] = _user_column(name, items)
    table: pyarrow.Table = pa.table(arrays)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    return sink.getvalue().to_pybytes(), columns


def _user_column(name: str, items: list[Item]) -> Any:
    import pyarrow as pa

    try:
        return pa.array([item.columns.get(name) for item in items])
    except pa.ArrowException as error:
        raise UserError(
            f"column {name!r} of the records {items[0].id} to {items[-1].id} mixes types ({error}); "
            "make its values one type or leave the column out."
        ) from None
    except UnicodeEncodeError as error:  # in a list or a structure; other texts were mended when they were read
        raise UserError(
            f"column {name!r} of the records {items[0].id} to {items[-1].id} holds text that is no Unicode ({error}); "
            "mend it or leave the column out."
        ) from None
