"""Hugging Face datasets: parquet with an `Array3D`.

`latents-NNNNN.parquet`, one a shard of the store, with the features `latent` (`Array3D`, (C, h, w) float32), `id`,
`source`, and the user's columns under their names. The scale stands in the schema's metadata under `sd-vae export`,
since there is no convention for it.

Source: https://huggingface.co/docs/datasets/about_dataset_features, and a use without `Array3D`,
https://huggingface.co/datasets/tglcourse/latent_celebA_256px
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sd_vae.errors import UserError
from sd_vae.files import file_errors
from sd_vae.latents.export.arrays import StoredLatent, stored
from sd_vae.latents.export.items import ExportItem, ExportItems
from sd_vae.latents.export.note import Scale
from sd_vae.validation import from_plain

__all__ = ["COLUMN", "read", "scale_of", "write"]

COLUMN = "latent"
OWN = ("id", "source", COLUMN)
METADATA = "sd-vae export"


def write(items: ExportItems, folder: Path, progress: Callable[[int, int], None] | None) -> None:
    """Write a parquet file for each shard of the store.

    Raises:
        UserError: A column of the user's is called like one of the three.
    """
    import datasets
    import pyarrow.parquet as pq

    taken = [name for name in items.manifest.columns if name in OWN]
    if taken:
        raise UserError(
            f"{items.folder} has a column {taken[0]!r}, as parquet's own is called; encode without it or rename it."
        )
    columns = list(items.manifest.columns)
    types = _column_types(items, columns)
    for number, shard in enumerate(items.by_shard(progress)):
        shape = tuple(shard[0].values.shape)
        features = datasets.Features(
            {name: datasets.Value("string") for name in ("id", "source")}
            | {COLUMN: datasets.Array3D(shape, "float32")}
            | {name: datasets.features.features.generate_from_arrow_type(types[name]) for name in columns}
        )
        rows = [_row(one, columns) for one in shard]
        built = datasets.Dataset.from_dict({name: [row[name] for row in rows] for name in features}, features=features)
        table: Any = built.with_format("arrow")[:]
        metadata = {**(table.schema.metadata or {}), METADATA: json.dumps(asdict(items.scale))}
        pq.write_table(table.replace_schema_metadata(metadata), folder / f"latents-{number:05d}.parquet")


def read(path: Path) -> Iterator[StoredLatent]:
    """Yield the latents of one parquet file, or of all in a folder.

    Raises:
        UserError: A file is damaged or has no column `latent`.
    """
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    paths = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    for file in paths:
        number = 0
        with file_errors("read", file):
            try:
                opened = pq.ParquetFile(file)
            except pa.ArrowException as error:
                raise UserError(f"cannot read latents from {file}: {error}; check that the file is whole.") from None
        with opened:
            if COLUMN not in opened.schema_arrow.names:
                raise UserError(f"{file} has the columns {', '.join(opened.schema_arrow.names)}, none {COLUMN!r}.")
            for batch in opened.iter_batches(columns=[COLUMN]):
                for value in batch.column(COLUMN).to_pylist():
                    yield stored(f"{file} number {number}", np.array(value, np.float32))
                    number += 1


def scale_of(path: Path) -> Scale | None:
    """Return what the first file says of its scale; None where it says nothing.

    Raises:
        UserError: It is damaged.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = sorted(path.glob("*.parquet"))[0] if path.is_dir() else path
    with file_errors("read", file):
        try:
            metadata = pq.read_schema(file).metadata or {}
        except pa.ArrowException as error:
            raise UserError(f"cannot read latents from {file}: {error}; check that the file is whole.") from None
    said = metadata.get(METADATA.encode())
    return None if said is None else from_plain(Scale, json.loads(said), source=str(file))


def _row(one: ExportItem, columns: list[str]) -> dict[str, Any]:
    own = {"id": one.item.id, "source": one.item.source, COLUMN: one.values.numpy()}
    return own | {name: one.item.columns.get(name) for name in columns}


def _column_types(items: ExportItems, columns: list[str]) -> dict[str, Any]:
    """Arrow's type of each of the user's columns, from the first shard that has it."""
    types: dict[str, Any] = {}
    for record in items.manifest.shards:
        if set(columns) <= types.keys():
            break
        table = items.store.reader(record).table
        types |= {name: table.schema.field(f"columns.{name}").type for name in record.columns if name not in types}
    return types
