"""REPA and EDM2: .npy of mean and standard deviation, raw, redrawn when they are read.

`NNNNN/img-mean-std-NNNNNNNN.npy` (2C, h, w) float32, cat(mean, std), the folder being the first five digits; and
`dataset.json` with `{"labels": [[file, class], ...]}`, null without classes. EDM2 takes a folder or an uncompressed
zip, REPA a folder called `vae-sd` beside its `images`.

Source: https://github.com/NVlabs/edm2/blob/d8299d3c6a037da7e97a3feb013c679d4cde07ba/dataset_tool.py
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

from sd_vae.files import file_errors
from sd_vae.latents.export.arrays import StoredLatent, damage, npy_bytes, parse_npy, read_npy, stored
from sd_vae.latents.export.arrays import write as write_bytes
from sd_vae.latents.export.items import ExportItems

__all__ = ["ARCHIVE", "DATASET", "FOLDER", "PATTERN", "read", "write"]

ARCHIVE, DATASET, FOLDER, PATTERN = "latents.zip", "dataset.json", "vae-sd", "img-mean-std-*.npy"


def write(items: ExportItems, folder: Path, progress: Callable[[int, int], None] | None) -> None:
    """Write each item's mean and standard deviation, and the classes."""
    if items.layout_name == "edm2-zip":
        with zipfile.ZipFile(folder / ARCHIVE, "w", zipfile.ZIP_STORED) as archive:
            for name, content in _files(items, progress):
                archive.writestr(zipfile.ZipInfo(name), content)  # its date is 1980, whatever the clock says
        return
    root = folder / FOLDER if items.layout_name == "repa" else folder
    for name, content in _files(items, progress):
        write_bytes(root / name, content)


def read(path: Path) -> Iterator[StoredLatent]:
    """Yield the moments, cat(mean, std), of one .npy, of a zip, or of a folder.

    Raises:
        UserError: A file is damaged.
    """
    if path.is_file() and path.suffix == ".npy":
        yield stored(str(path), read_npy(path))
        return
    archive_path = path if path.is_file() else path / ARCHIVE
    if archive_path.is_file():
        with file_errors("read", archive_path), damage(str(archive_path)), zipfile.ZipFile(archive_path) as archive:
            for name in sorted(name for name in archive.namelist() if name.endswith(".npy")):
                yield stored(f"{archive_path}/{name}", parse_npy(archive.read(name), f"{archive_path}/{name}"))
        return
    for file in sorted(path.rglob(PATTERN)):
        yield stored(str(file), read_npy(file))


def _files(items: ExportItems, progress: Callable[[int, int], None] | None) -> Iterator[tuple[str, bytes]]:
    """Name and content of each file, `dataset.json` last."""
    labels: list[list[str | int]] = []
    for shard in items.by_shard(progress):
        for one in shard:
            number = f"{one.index:08d}"
            name = f"{number[:5]}/img-mean-std-{number}.npy"
            if one.label is not None:
                labels.append([name, one.label])
            yield name, npy_bytes(one.values.numpy())
    yield DATASET, json.dumps({"labels": labels or None}).encode()
