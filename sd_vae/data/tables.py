"""Tables with a column of pictures as records: parquet files, and data sets that `datasets` saved, loads or streams.

Parquet files are read by row groups where they lie; `datasets` would first copy them into its cache.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from sd_vae.data.records import FileSpan, Record, choose_columns
from sd_vae.data.sources import hub_dataset, undecoded
from sd_vae.errors import UserError

__all__ = ["DatasetRecords", "ParquetRecords", "open_hub", "open_parquet", "open_saved"]

ROWS_AT_ONCE = 16
"""Rows of a parquet file that are held in memory as pictures' bytes."""


class ParquetRecords:
    """Rows of parquet files in the order of their paths; `file/row` is the id."""

    def __init__(self, spec: str, files: list[Path], counts: list[int], columns: list[str], image_column: str) -> None:
        self.spec = spec
        self._files = files
        self._ends = list(accumulate(counts))
        self._columns = columns
        self._image_column = image_column
        root = Path(spec)
        self._names = [(file.relative_to(root) if file != root else Path(file.name)).as_posix() for file in files]

    @property
    def num_records(self) -> int:
        """Number of rows."""
        return self._ends[-1]

    def read(self, start: int = 0, stop: int | None = None) -> Iterator[Record]:
        """Yield the records from `start` to before `stop`, or to the end; row groups before them are not read.

        Raises:
            UserError: A file is damaged or was changed.
        """
        stop = self.num_records if stop is None else min(stop, self.num_records)
        while start < stop:
            number = bisect_right(self._ends, start)
            first = self._ends[number - 1] if number else 0
            end = min(stop, self._ends[number])
            rows = _parquet_rows(self._files[number], start - first, end - first, [*self._columns, self._image_column])
            for position, row in zip(range(start, end), rows, strict=True):
                content = _content(row[self._image_column])
                place = position - first
                columns = {name: row[name] for name in self._columns}
                name = f"{self._names[number]}/{place}"
                yield Record(position, name, f"{self._files[number]}::{place}", content, columns)
            start = end


class DatasetRecords:
    """Rows of a data set of `datasets`, by number or as a stream; the row's number is the id."""

    def __init__(self, spec: str, dataset: Any, columns: list[str], image_column: str, num_records: int | None) -> None:
        self.spec = spec
        self.num_records = num_records
        self._dataset = dataset
        self._columns = columns
        self._image_column = image_column

    def read(self, start: int = 0, stop: int | None = None) -> Iterator[Record]:
        """Yield the records from `start` to before `stop`, or to the end; a stream skips what lies before them.

        Raises:
            UserError: The hub is out of reach.
        """
        rows = self._rows(start, stop)
        try:
            for position, row in enumerate(rows, start=start):
                columns = {name: row[name] for name in self._columns}
                content = _content(row[self._image_column])
                yield Record(position, str(position), f"{self.spec}::{position}", content, columns)
        except OSError as error:
            raise UserError(
                f"cannot read {self.spec}: {error}; check the network or the disk and run again."
            ) from error

    def _rows(self, start: int, stop: int | None) -> Iterator[Mapping[str, Any]]:
        if self.num_records is not None:
            return (self._dataset[row] for row in range(*slice(start, stop).indices(self.num_records)))
        stream = self._dataset.skip(start) if start else self._dataset
        return iter(stream if stop is None else stream.take(max(stop - start, 0)))


def open_parquet(spec: str, files: list[Path], columns: Sequence[str] | None, image_column: str) -> ParquetRecords:
    """Return the rows of parquet files.

    Raises:
        UserError: A file is damaged or lacks a column, there are no rows, or the column holds no pictures.
    """
    counts: list[int] = []
    kept: list[str] = []
    for file in files:
        num_rows, schema = _parquet_schema(file)
        _require_pictures(str(file), schema, image_column)
        plain = _plain_columns(schema, image_column)
        kept = choose_columns(str(file), plain, columns if columns is not None or not counts else kept)
        counts.append(num_rows)
    if not sum(counts):
        raise UserError(f"{spec} holds no rows; give parquet files that do.")
    return ParquetRecords(spec, files, counts, kept, image_column)


def open_saved(spec: str, columns: Sequence[str] | None, image_column: str) -> DatasetRecords:
    """Return the rows of a folder that `save_to_disk` of `datasets` wrote.

    Raises:
        UserError: It is damaged, holds several splits, no rows, or no such column.
    """
    from datasets import DatasetDict, load_from_disk

    try:
        dataset = load_from_disk(spec)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load the data set {spec}: {error}; save it anew.") from error
    if isinstance(dataset, DatasetDict):
        raise UserError(f"{spec} holds the splits {', '.join(dataset)}; name the folder of one, below it.")
    return _open_dataset(spec, dataset, columns, image_column, len(dataset))


def open_hub(spec: str, columns: Sequence[str] | None, image_column: str, *, streaming: bool) -> DatasetRecords:
    """Return the rows of hf://DATASET[:SPLIT], downloaded first or streamed.

    Raises:
        UserError: The hub cannot be reached, no such data set or split, no rows, or no such column.
    """
    dataset = hub_dataset(spec, streaming=streaming)
    return _open_dataset(spec, dataset, columns, image_column, None if streaming else len(dataset))


def _open_dataset(
    spec: str, dataset: Any, columns: Sequence[str] | None, image_column: str, num_records: int | None
) -> DatasetRecords:
    if dataset.features is None:
        raise UserError(f"{spec} does not say what its columns are; download it instead of streaming it.")
    if num_records == 0:
        raise UserError(f"{spec} holds no rows; choose another split.")
    schema = dataset.features.arrow_schema
    _require_pictures(spec, schema, image_column)
    kept = choose_columns(spec, _plain_columns(schema, image_column), columns)
    selected = undecoded(spec, dataset.select_columns([*kept, image_column]), image_column)
    return DatasetRecords(spec, selected, kept, image_column, num_records)


def _require_pictures(place: str, schema: Any, column: str) -> None:
    if column not in schema.names:
        raise UserError(f"{place} has no column {column!r}; name the image column, one of: {', '.join(schema.names)}.")
    kind = schema.field(column).type
    if not _holds_pictures(kind):
        raise UserError(f"column {column!r} of {place} holds {kind}, not pictures; choose another image column.")


def _plain_columns(schema: Any, image_column: str) -> list[str]:
    return [item.name for item in schema if item.name != image_column and not _holds_bytes(item.type)]


def _parquet_schema(file: Path) -> tuple[int, Any]:
    """Number of rows and the Arrow schema."""
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(file) as opened:
            return int(opened.metadata.num_rows), opened.schema_arrow
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"cannot read the parquet file {file}: {error}; write it anew.") from None


def _parquet_rows(file: Path, start: int, stop: int, columns: list[str]) -> Iterator[dict[str, Any]]:
    """Rows `start` to before `stop`, from the row groups that hold them."""
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(file, pre_buffer=False) as opened:
            counts = [opened.metadata.row_group(group).num_rows for group in range(opened.num_row_groups)]
            ends = list(accumulate(counts))
            first, last = bisect_right(ends, start), bisect_right(ends, stop - 1)
            position = ends[first] - counts[first]
            groups = list(range(first, last + 1))
            for batch in opened.iter_batches(ROWS_AT_ONCE, row_groups=groups, columns=columns, use_threads=False):
                below, above = max(start - position, 0), min(stop - position, batch.num_rows)
                position += batch.num_rows
                yield from batch.slice(below, max(above - below, 0)).to_pylist()
    except (OSError, IndexError, pyarrow.ArrowException) as error:
        raise UserError(f"cannot read the parquet file {file}: {error}; it is damaged or was changed.") from None


def _holds_bytes(kind: Any) -> bool:
    """Whether an Arrow type is binary or a picture of `datasets`, which no caption is."""
    from pyarrow import types

    if types.is_struct(kind):
        return any(_holds_bytes(item.type) for item in kind)
    return types.is_binary(kind) or types.is_large_binary(kind) or types.is_fixed_size_binary(kind)


def _holds_pictures(kind: Any) -> bool:
    """Whether an Arrow type is bytes, a path, or a struct of both."""
    from pyarrow import types

    if types.is_struct(kind):
        return {"bytes", "path"} <= {item.name for item in kind}
    return _holds_bytes(kind) or types.is_string(kind) or types.is_large_string(kind)


def _content(value: Any) -> bytes | FileSpan:
    """A picture of a table: bytes, a path, a struct of both, or nothing."""
    if isinstance(value, Mapping):
        value = value["bytes"] if value["bytes"] is not None else value["path"]
    return FileSpan(value) if isinstance(value, str) and value else value or b""
