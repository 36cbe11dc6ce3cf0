"""Picture files of a data set by position, undecoded, with their captions: what a data set is turned into latents from.

A source gives its records in one order, the same in every process and every run, so that "records 1000 to 1999" names
the same pictures everywhere. `open_records` knows folders, parquet files, WebDataset tars, data sets saved by
`datasets`, and data sets of the Hugging Face hub, whole or streamed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Protocol

from sd_vae.data.sources import HUB_PREFIX
from sd_vae.errors import UserError
from sd_vae.files import file_errors
from sd_vae.images import IMAGE_SUFFIXES

__all__ = ["FileSpan", "Record", "Records", "choose_columns", "open_records"]

KINDS = (
    "give a folder of pictures, a parquet file or folder, WebDataset tars, a folder saved by datasets, or "
    "hf://DATASET[:SPLIT]"
)


@dataclass(frozen=True)
class FileSpan:
    """Bytes that lie in a file and have not been read."""

    path: str
    """The file, or a url that fsspec opens, as streamed data sets have it."""
    offset: int = 0
    """Where they begin."""
    size: int = -1
    """How many; -1 is the rest of the file."""

    def read(self) -> bytes:
        """Return the bytes.

        Raises:
            UserError: The file is gone, cannot be read, or has become shorter.
        """
        with file_errors("read", Path(self.path)), _open(self.path) as file:
            file.seek(self.offset)
            found = file.read(self.size)
        if len(found) < self.size:
            missing = self.size - len(found)
            raise UserError(f"{self.path} ends {missing} bytes early; it is cut off or was changed, restore it.")
        return found


@dataclass(frozen=True)
class Record:
    """One picture of a data set, undecoded."""

    position: int
    """Number in the source's order."""
    id: str
    """Name, unique in the source and the same wherever the source is stored."""
    source: str
    """File, or `archive::member`, or `table::row`."""
    content: bytes | FileSpan = field(repr=False)
    """The picture's file, or where it lies; a record that goes to another process is small until it is read there."""
    columns: dict[str, Any] = field(default_factory=dict)
    """What else the source says of the picture: caption, label, ..."""

    @property
    def data(self) -> bytes:
        """The bytes of the picture's file, read anew at each use where they lie in a file.

        Raises:
            UserError: The file is gone or cannot be read.
        """
        return self.content.read() if isinstance(self.content, FileSpan) else self.content


class Records(Protocol):
    """A data set in a fixed order."""

    @property
    def spec(self) -> str:
        """What the user called the data set."""

    @property
    def num_records(self) -> int | None:
        """Number of records; None for a stream, whose end is known when it is reached."""

    def read(self, start: int = 0, stop: int | None = None) -> Iterator[Record]:
        """Yield the records from `start` to before `stop`, or to the end; fewer where the source ends earlier."""


def open_records(
    data: str, *, columns: Sequence[str] | None = None, image_column: str | None = None, streaming: bool = False
) -> Records:
    """Return the records of a data set.

    Args:
        data: Folder of pictures (with the folders below it, `metadata.jsonl` and `metadata.csv` beside them), parquet
            file or folder of them, WebDataset tar or folder of them, folder written by `datasets`' `save_to_disk`, or
            hf://DATASET[:SPLIT] (split train by default).
        columns: Columns to keep; all that hold plain values by default.
        image_column: Column of a table, or kind of file in a tar, with the pictures. By default `image` in a table, or
            the only kind of picture in a tar.
        streaming: Read a data set of the hub without downloading it first.

    Raises:
        UserError: Nothing there, nothing in it, no such column, two records of one name, or the hub is out of reach.
    """
    from sd_vae.data.folders import open_folder
    from sd_vae.data.tables import open_hub, open_parquet, open_saved
    from sd_vae.data.tars import open_tars

    if data.startswith(HUB_PREFIX):
        return open_hub(data, columns, image_column or "image", streaming=streaming)
    if streaming:
        raise UserError(f"{data} lies on this machine and is never downloaded; leave streaming to hf://DATASET.")
    path = Path(data)
    if path.is_file() and path.suffix == ".parquet":
        return open_parquet(data, [path], columns, image_column or "image")
    if path.is_file() and path.suffix == ".tar":
        return open_tars(data, [path], columns, image_column)
    if path.is_file():
        raise UserError(f"{data} is neither a folder nor a parquet file nor a tar; {KINDS}.")
    if not path.is_dir():
        raise UserError(f"there is no data at {data}; {KINDS}.")
    if any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
        return open_saved(data, columns, image_column or "image")
    tables, tars = sorted(path.rglob("*.parquet")), sorted(path.rglob("*.tar"))
    num_pictures = sum(file.suffix.lower() in IMAGE_SUFFIXES for file in path.rglob("*")) if tables or tars else 0
    found = {"pictures": num_pictures, "parquet files": len(tables), "tars": len(tars)}
    kinds = [f"{count} {kind}" for kind, count in found.items() if count]
    if len(kinds) > 1:
        raise UserError(
            f"{data} holds {' and '.join(kinds)}, and which to use is a guess; name a folder below it or move one kind "
            "elsewhere."
        )
    if tables:
        return open_parquet(data, tables, columns, image_column or "image")
    if tars:
        return open_tars(data, tars, columns, image_column)
    return open_folder(data, path, columns)


def _open(path: str) -> IO[bytes]:
    """A file or a url, opened; fsspec would take ten times as long for a file."""
    if "://" not in path:
        return open(path, "rb")
    import fsspec

    opened: IO[bytes] = fsspec.open(path, "rb").open()
    return opened


def choose_columns(place: str, there: Sequence[str], wanted: Sequence[str] | None) -> list[str]:
    """Return the wanted columns, or all that are there.

    Raises:
        UserError: One that is wanted is not there.
    """
    missing = [name for name in wanted or () if name not in there]
    if missing:
        known = f"choose from: {', '.join(there)}" if there else "it has none"
        raise UserError(f"{place} has no column {missing[0]!r}; {known}.")
    return list(there if wanted is None else wanted)
