"""Folders of picture files as records, by the conventions of `datasets`' imagefolder.

Captions and other columns stand in `metadata.jsonl` or `metadata.csv` in the folder itself or in folders below it, each
row naming a picture by `file_name`, relative to the metadata's own folder. Without metadata, pictures that are sorted
into folders have the name of their folder as column `label`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from sd_vae.data.records import FileSpan, Record, choose_columns
from sd_vae.errors import UserError
from sd_vae.files import read_text
from sd_vae.images import list_images

__all__ = ["FolderRecords", "open_folder"]

METADATA_NAMES = ("metadata.jsonl", "metadata.csv")
FILE_NAME = "file_name"


class FolderRecords:
    """Picture files in the order of their paths; the path below the folder is the id."""

    def __init__(self, spec: str, folder: Path, paths: list[Path], columns: dict[Path, dict[str, Any]]) -> None:
        self.spec = spec
        self._folder = folder
        self._paths = paths
        self._columns = columns

    @property
    def num_records(self) -> int:
        """Number of picture files."""
        return len(self._paths)

    def read(self, start: int = 0, stop: int | None = None) -> Iterator[Record]:
        """Yield the records from `start` to before `stop`, or to the end."""
        for position in range(*slice(start, stop).indices(len(self._paths))):
            path = self._paths[position]
            name = path.relative_to(self._folder).as_posix()
            yield Record(position, name, str(path), FileSpan(str(path)), self._columns.get(path, {}))


def open_folder(spec: str, folder: Path, columns: Sequence[str] | None) -> FolderRecords:
    """Return the pictures in a folder and the folders below it.

    Raises:
        UserError: No pictures, or metadata that is damaged, names a picture twice, or one that is not there.
    """
    paths = list_images(folder)
    files = sorted(path for name in METADATA_NAMES for path in folder.rglob(name))
    rows = _read_metadata(files, set(paths)) if files else _labels(folder, paths)
    there = list(dict.fromkeys(name for row in rows.values() for name in row))
    kept = choose_columns(spec, there, columns)
    return FolderRecords(
        spec, folder, paths, {path: {name: rows.get(path, {}).get(name) for name in kept} for path in paths}
    )


def _labels(folder: Path, paths: list[Path]) -> dict[Path, dict[str, Any]]:
    """Name of each picture's folder, where all are sorted into at least two."""
    parents = {path.parent for path in paths}
    if folder in parents or len(parents) < 2:
        return {}
    return {path: {"label": path.parent.name} for path in paths}


def _read_metadata(files: list[Path], paths: set[Path]) -> dict[Path, dict[str, Any]]:
    rows: dict[Path, dict[str, Any]] = {}
    places: dict[Path, str] = {}
    for file in files:
        lines = _read_jsonl(file) if file.suffix == ".jsonl" else _read_csv(file)
        for place, row in lines:
            name = row.pop(FILE_NAME, None)
            if not isinstance(name, str) or not name:
                raise UserError(f"{place} has no {FILE_NAME!r}; give each row the path of its picture.")
            path = file.parent / name
            if path not in paths:
                raise UserError(f"{place} names {name}, which is not among the pictures; mend or remove the row.")
            if path in rows:
                raise UserError(f"{place} names {name} and so does {places[path]}; keep one row a picture.")
            rows[path], places[path] = row, place
    return rows


def _read_jsonl(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(read_text(file).split("\n"), start=1):
        if not line.strip():
            continue
        place = f"{file} line {number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{place} is not JSON ({error}); mend the line.") from None
        if not isinstance(row, dict):
            raise UserError(f"{place} is {line.strip()[:40]}, it must be an object with {FILE_NAME!r}; mend the line.")
        yield place, row


def _read_csv(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    import pyarrow
    from pyarrow import csv

    try:
        table = csv.read_csv(file, convert_options=csv.ConvertOptions(column_types={FILE_NAME: pyarrow.string()}))
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"cannot read {file}: {error}; mend it.") from None
    for number, row in enumerate(table.to_pylist(), start=1):
        yield f"{file} row {number}", row
