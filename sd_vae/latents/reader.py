"""Reading one shard: tensors and rows are mapped into memory, so that opening costs little and processes share.

Shapes: N latents of one size, C latent channels, h w latent cells.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sd_vae.errors import UserError
from sd_vae.latents.format import TENSORS, Item, StoreDescription, latents_file, rows_file, size_name
from sd_vae.latents.records import ShardRecord
from sd_vae.latents.writer import ITEM_FIELDS, USER_PREFIX

if TYPE_CHECKING:
    import pyarrow
    from torch import Tensor

__all__ = ["REMAKE", "ShardError", "ShardReader", "find_damage"]

REMAKE = "run sd-vae encode again with the same arguments and only that shard is made anew"
"""The remedy for a damaged shard."""


class ShardError(UserError):
    """A file of a shard is missing or damaged.

    Args:
        message: One line that begins with the file.
        path: The file.
    """

    def __init__(self, message: str, path: Path | None = None) -> None:
        super().__init__(message)
        self.path = path


class ShardReader:
    """The latents and rows of one finished shard, by row number.

    Args:
        folder: The store's.
        description: The store's.
        record: The shard's.

    Raises:
        ShardError: A file is missing, cut off or damaged, or holds other counts than the record says.
    """

    def __init__(self, folder: Path, description: StoreDescription, record: ShardRecord) -> None:
        self.latents_path, self.rows_path = latents_file(folder, record.shard), rows_file(folder, record.shard)
        for path in (self.latents_path, self.rows_path):
            damage = find_damage(path, record)
            if damage:
                raise ShardError(f"{path} {damage}; {REMAKE}.", path)
        self.record = record
        self.names = TENSORS[description.content]
        self.table = _map_rows(self.rows_path, record)
        self._latents = _map_latents(self.latents_path, description, record)
        # The rows are one batch, so a column is one array, which is faster to index than the table.
        self._columns = {name: self.table[USER_PREFIX + name].chunk(0) for name in record.columns}
        sizes = self.table["latent_size"].combine_chunks().flatten().to_numpy().reshape(-1, 2)
        self.latent_sizes: np.ndarray[Any, np.dtype[np.int32]] = sizes
        """(h, w) of each row, (rows, 2)."""
        self.is_flipped: np.ndarray[Any, np.dtype[np.bool_]] = self.table["flipped"].to_numpy()
        """Which rows are mirrored, (rows,)."""
        self._places = list(zip(map(size_name, *sizes.T.tolist()), self.table["latent_index"].to_pylist(), strict=True))

    def __len__(self) -> int:
        """Return the number of rows."""
        return self.record.num_items

    def place(self, row: int) -> tuple[str, int]:
        """Return the size of a row's latent, such as 64x64, and its index among those of that size."""
        return self._places[row]

    def latents(self, row: int) -> tuple[Tensor, ...]:
        """Return the tensors of a row as they are stored, (C, h, w) each: mean and logvar, mean, or z.

        They are the file's own memory: to be read, not written.
        """
        size, index = self._places[row]
        return tuple(stack[index] for stack in self._latents[size])

    def item(self, row: int) -> Item:
        """Return where the latent of a row comes from."""
        values = {name: self.table[name][row].as_py() for name in ITEM_FIELDS}
        values |= {name: tuple(values[name]) for name in ("original_size", "resized_size", "crop")}
        return Item(**values, columns={name: self.column(name, row) for name in self.record.columns})

    def column(self, name: str, row: int) -> Any:
        """Return the user's value of a row; None in a shard that has no such column."""
        return self._columns[name][row].as_py() if name in self._columns else None


def find_damage(path: Path, record: ShardRecord) -> str | None:
    """Return what is wrong with the presence and size of a shard's file, or None."""
    expected = record.files[path.name].num_bytes
    try:
        num_bytes = path.stat().st_size
    except FileNotFoundError:
        return "is missing"
    return None if num_bytes == expected else f"has {num_bytes} bytes instead of {expected}"


def _map_rows(path: Path, record: ShardRecord) -> pyarrow.Table:
    import pyarrow as pa

    try:
        with pa.memory_map(str(path)) as source, pa.ipc.open_stream(source) as stream:
            table = stream.read_all()
    except (pa.ArrowException, OSError) as error:
        raise ShardError(f"{path} is damaged ({error}); remove it, {REMAKE}.", path) from None
    expected = {*ITEM_FIELDS, "latent_size", "latent_index", *(USER_PREFIX + name for name in record.columns)}
    if set(table.column_names) != expected or len(table) != record.num_items:
        raise ShardError(
            f"{path} holds {len(table)} rows with columns {', '.join(table.column_names)}, its record says "
            f"{record.num_items} with {', '.join(sorted(expected))}; remove it, {REMAKE}.",
            path,
        )
    return table


def _map_latents(path: Path, description: StoreDescription, record: ShardRecord) -> dict[str, list[Tensor]]:
    """Size to the stacks (N, C, h, w) of that size."""
    from safetensors import SafetensorError, safe_open

    names = TENSORS[description.content]
    try:
        with safe_open(path, "pt") as file:
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except (SafetensorError, OSError) as error:
        raise ShardError(f"{path} is damaged ({error}); remove it, {REMAKE}.", path) from None
    channels = description.vae.latent_channels
    expected = {
        f"{name}/{size}": (count, channels, *map(int, size.split("x")))
        for size, count in record.sizes.items()
        for name in names
    }
    shapes = {name: tuple(tensor.shape) for name, tensor in found.items()}
    dtypes = {str(tensor.dtype).removeprefix("torch.") for tensor in found.values()} - {description.dtype}
    if shapes != expected or dtypes:
        raise ShardError(
            f"{path} holds {shapes} in {', '.join(sorted(dtypes)) or description.dtype}, its record says {expected} in "
            f"{description.dtype}; remove it, {REMAKE}.",
            path,
        )
    return {size: [found[f"{name}/{size}"] for name in names] for size in record.sizes}
