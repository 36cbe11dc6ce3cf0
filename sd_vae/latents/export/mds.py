"""mosaicml-streaming: MDS shards, as mosaicml/diffusion reads them.

Columns `latents_PIXELS`, one for each size, so `latents_512` for 64x64 cells at factor 8: scaled float16 samples of
(C, h, w) as bytes, empty where the item is of another size. Beside them `key`, `width`, `height`, `original_width`,
`original_height`, and `caption` where the store has such a column.

A shard is the number of samples and their offsets (uint32), the columns as JSON, then the samples: the sizes of the
columns without a fixed one (uint32), then the columns, sorted by name. `index.json` is written last. Written here and
not by `streaming.MDSWriter`, because mosaicml-streaming 0.13 asks for older releases of transformers and numpy than
this package does; its reader is what the format was tried with.

Source: https://github.com/mosaicml/diffusion/blob/1c33dbef4a446b9b8d63ebb31b3887f39ae861bd/diffusion/datasets/laion/
laion.py, https://github.com/mosaicml/streaming/blob/v0.13.0/streaming/base/format/mds/writer.py
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from sd_vae.errors import UserError
from sd_vae.files import read_json
from sd_vae.latents.export.arrays import StoredLatent, damage, stored, to_half
from sd_vae.latents.export.arrays import write as write_bytes
from sd_vae.latents.export.items import ExportItem, ExportItems

__all__ = ["INDEX", "is_mds", "read", "write"]

INDEX = "index.json"
FIXED_SIZES = {"int32": 4}
PREFIX = "latents_"
NUM_CHANNELS = 4


def write(items: ExportItems, folder: Path, progress: Callable[[int, int], None] | None) -> None:
    """Write an MDS shard for each shard of the store, then the index.

    Raises:
        UserError: A value is too large for float16, or a caption is no text.
    """
    columns = _columns(items)
    config = {
        "version": 2,
        "format": "mds",
        "compression": None,
        "hashes": [],
        "size_limit": None,
        "column_names": list(columns),
        "column_encodings": list(columns.values()),
        "column_sizes": [FIXED_SIZES.get(encoding) for encoding in columns.values()],
    }
    header = json.dumps(config, sort_keys=True).encode()
    shards = []
    for number, shard in enumerate(items.by_shard(progress)):
        samples = [_encode(_values(items, one, columns), columns) for one in shard]
        offsets = np.cumsum([0, *map(len, samples)]) + 4 + 4 * (len(samples) + 1) + len(header)
        content = np.uint32(len(samples)).tobytes() + offsets.astype("<u4").tobytes() + header + b"".join(samples)
        name = f"shard.{number:05d}.mds"
        write_bytes(folder / name, content)
        raw_data = {"basename": name, "bytes": len(content), "hashes": {}}
        shards.append(config | {"samples": len(samples), "raw_data": raw_data, "zip_data": None})
    write_bytes(folder / INDEX, json.dumps({"version": 2, "shards": shards}, sort_keys=True).encode())


def read(path: Path) -> Iterator[StoredLatent]:
    """Yield the latents of an MDS folder.

    Raises:
        UserError: A file is missing or damaged, compressed, or has no column `latents_PIXELS`.
    """
    index = read_json(path / INDEX)
    with damage(str(path / INDEX)):
        shards = [(shard, shard["raw_data"]["basename"]) for shard in index["shards"]]
    for shard, name in shards:
        file = path / name
        if shard.get("compression"):
            raise UserError(f"{file} is compressed by {shard['compression']}; unpack it with streaming first.")
        names = [column for column in shard["column_names"] if column.startswith(PREFIX)]
        if not names:
            raise UserError(f"{file} has the columns {', '.join(shard['column_names'])}, none {PREFIX}PIXELS.")
        with damage(str(file)):
            for number, sample in enumerate(_samples(file, shard)):
                for column in names:
                    if sample[column]:
                        yield stored(f"{file} number {number}", _latent(sample[column]))


def is_mds(path: Path) -> bool:
    """Return whether a folder has an index of MDS shards."""
    if not (path / INDEX).is_file():
        return False
    index = read_json(path / INDEX)
    shards = index.get("shards") if isinstance(index, dict) else None
    return isinstance(shards, list) and bool(shards) and shards[0].get("format") == "mds"


def _latent(content: bytes) -> np.ndarray:
    """The square latent of (4, h, w) that bytes hold: their shape stands nowhere, readers take it for granted."""
    values = np.frombuffer(content, "<f2")
    side = math.isqrt(len(values) // NUM_CHANNELS)
    return values.reshape(NUM_CHANNELS, side, side)


def _columns(items: ExportItems) -> dict[str, str]:
    """Encoding of each column, sorted by name as the reader wants them."""
    factor = items.description.vae.factor
    columns = {"key": "str"} | dict.fromkeys(("width", "height", "original_width", "original_height"), "int32")
    columns |= {f"{PREFIX}{int(size.split('x')[0]) * factor}": "bytes" for size in items.manifest.sizes}
    if "caption" in items.manifest.columns:
        columns["caption"] = "str"
    return dict(sorted(columns.items()))


def _values(items: ExportItems, one: ExportItem, columns: dict[str, str]) -> dict[str, Any]:
    height, width = one.item.crop[2:]
    original_height, original_width = one.item.original_size
    values: dict[str, Any] = {name: b"" for name in columns if name.startswith(PREFIX)}
    values[f"{PREFIX}{one.values.shape[-1] * items.description.vae.factor}"] = to_half(one.values, one.item).tobytes()
    values |= {"key": one.item.id, "width": width, "height": height}
    values |= {"original_width": original_width, "original_height": original_height}
    if "caption" in columns:
        caption = one.item.columns.get("caption")
        if not isinstance(caption, str):
            raise UserError(f"the caption of {one.item} is {caption!r}, mds keeps text; give every picture a caption.")
        values["caption"] = caption
    return values


def _encode(values: dict[str, Any], columns: dict[str, str]) -> bytes:
    encoders: dict[str, Callable[[Any], bytes]] = {
        "str": lambda value: value.encode(),
        "bytes": lambda value: value,
        "int32": lambda value: np.int32(value).tobytes(),
    }
    encoded = [encoders[encoding](values[name]) for name, encoding in columns.items()]
    sizes = [len(one) for one, encoding in zip(encoded, columns.values(), strict=True) if encoding not in FIXED_SIZES]
    return np.array(sizes, "<u4").tobytes() + b"".join(encoded)


def _samples(file: Path, shard: dict[str, Any]) -> Iterator[dict[str, bytes]]:
    """The columns of each sample, undecoded."""
    content = file.read_bytes()
    num_samples = int(np.frombuffer(content, "<u4", 1)[0])
    offsets = np.frombuffer(content, "<u4", num_samples + 1, 4)
    for start, stop in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        fixed = shard["column_sizes"]
        num_sizes = sum(size is None for size in fixed)
        sizes = iter(np.frombuffer(content, "<u4", num_sizes, start).tolist())
        place = start + 4 * num_sizes
        sample = {}
        for name, size in zip(shard["column_names"], fixed, strict=True):
            length = next(sizes) if size is None else size
            sample[name] = content[place : place + length]
            place += length
        if place != stop:
            raise ValueError(f"a sample ends at byte {place}, the next begins at {stop}")
        yield sample
