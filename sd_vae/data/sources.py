"""Where pictures come from: a folder, parquet files, or a data set of the Hugging Face hub, all through `datasets`."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sd_vae.errors import UserError
from sd_vae.images import IMAGE_SUFFIXES, list_images, open_image

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["HUB_PREFIX", "ImageSource", "hub_dataset", "open_source", "undecoded"]

HUB_PREFIX = "hf://"
KINDS = "give a folder of pictures, a parquet file or folder, or hf://DATASET[:SPLIT]"


class ImageSource:
    """Pictures by number, undecoded until they are asked for; can be sent to worker processes.

    Args:
        spec: What the user called the source.
        dataset: `datasets.Dataset` with one column of undecoded images.
        column: Name of that column.
    """

    def __init__(self, spec: str, dataset: Any, column: str) -> None:
        self.spec = spec
        self._dataset = dataset
        self._column = column

    def __len__(self) -> int:
        """Return the number of pictures, readable or not."""
        return len(self._dataset)

    def name(self, index: int) -> str:
        """Return what to call picture `index` in a report: its file, or its row in the source."""
        row = self._row(index)
        return row["path"] if row["bytes"] is None and row["path"] else f"{self.spec} row {index}"

    def load(self, index: int) -> Image.Image:
        """Return picture `index` as RGB, upright.

        Raises:
            UserError: It cannot be read.
        """
        row, name = self._row(index), self.name(index)
        if row["bytes"] is not None:
            return open_image(io.BytesIO(row["bytes"]), name)
        if not row["path"]:
            raise UserError(f"{name} holds no picture in column {self._column!r}; fill it or leave the row out.")
        return open_image(Path(row["path"]), name)

    def _row(self, index: int) -> dict[str, Any]:
        return self._dataset[index][self._column] or {"bytes": None, "path": None}


def open_source(spec: str, image_column: str = "image") -> ImageSource:
    """Return the pictures that `spec` names.

    Args:
        spec: Folder of pictures (with the folders below it), parquet file, folder of parquet files, or
            hf://DATASET[:SPLIT] (split train by default).
        image_column: Column with the pictures in parquet files and hub data sets.

    Raises:
        UserError: Nothing there, nothing in it, no such column, or the hub cannot be reached.
    """
    if spec.startswith(HUB_PREFIX):
        return _open_hub(spec, image_column)
    path = Path(spec)
    if path.is_file() and path.suffix == ".parquet":
        return _open_parquet(spec, [path], image_column)
    if path.is_file():
        raise UserError(f"{spec} is no folder and no parquet file; {KINDS}.")
    if not path.is_dir():
        raise UserError(f"there is no data at {spec}; {KINDS}.")
    tables = sorted(path.rglob("*.parquet"))
    if not tables:
        return _open_folder(spec, path)
    num_pictures = sum(file.suffix.lower() in IMAGE_SUFFIXES for file in path.rglob("*"))
    if num_pictures:
        raise UserError(
            f"{spec} holds {num_pictures} pictures and {len(tables)} parquet files, and which to use is a guess; "
            "move one kind elsewhere or name a folder below it."
        )
    return _open_parquet(spec, tables, image_column)


def _open_folder(spec: str, folder: Path) -> ImageSource:
    from datasets import Dataset

    # Made from a list of paths, not by `load_dataset`: that caches what it once saw, and a folder changes.
    paths = [str(path) for path in list_images(folder)]
    return _as_source(spec, Dataset.from_dict({"image": paths}), "image")


def _open_parquet(spec: str, files: list[Path], column: str) -> ImageSource:
    import pyarrow
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    filled = [str(file) for file in files if _num_rows(file, column)]
    if not filled:
        raise UserError(f"{spec} holds no rows; {KINDS}.")
    try:
        dataset = load_dataset("parquet", data_files=filled, split="train", columns=[column])
    except (OSError, pyarrow.ArrowException, DatasetGenerationError) as error:
        cause = error.__cause__ or error
        raise UserError(f"cannot read the parquet data {spec}: {cause}; write the files anew.") from error
    return _as_source(spec, dataset, column)


def _num_rows(file: Path, column: str) -> int:
    """Rows of a parquet file that has the column."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(file) as opened:
            columns, num_rows = list(opened.schema_arrow.names), int(opened.metadata.num_rows)
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"cannot read the parquet file {file}: {error}; write it anew.") from None
    _require_column(str(file), columns, column)
    return num_rows


def _open_hub(spec: str, column: str) -> ImageSource:
    dataset = hub_dataset(spec)
    _require_column(spec, dataset.column_names, column)
    if not len(dataset):
        raise UserError(f"{spec} holds no rows; choose another split.")
    return _as_source(spec, dataset.select_columns([column]), column)


def hub_dataset(spec: str, *, streaming: bool = False) -> Any:
    """Return the data set that hf://DATASET[:SPLIT] names: `datasets.Dataset`, or `IterableDataset` when streaming.

    Raises:
        UserError: It has no name, does not exist, or cannot be reached.
    """
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    name, _, split = spec.removeprefix(HUB_PREFIX).partition(":")
    if not name:
        raise UserError(f"{spec} names no data set; write hf://DATASET[:SPLIT].")
    try:
        if streaming:
            return load_dataset(name, split=split or "train", streaming=True)
        return load_dataset(name, split=split or "train")
    except (OSError, ValueError, DatasetsError) as error:  # not reachable, no such data set, no such split
        reason = " ".join(str(error).split())
        raise UserError(
            f"cannot load {spec}: {reason}; check its name and split and the network, or download it and name the "
            "folder."
        ) from error


def _require_column(place: str, columns: list[str], column: str) -> None:
    if column not in columns:
        raise UserError(f"{place} has no column {column!r}; set data.image_column to one of: {', '.join(columns)}.")


def _as_source(spec: str, dataset: Any, column: str) -> ImageSource:
    return ImageSource(spec, undecoded(spec, dataset, column), column)


def undecoded(spec: str, dataset: Any, column: str) -> Any:
    """Return a data set whose column of files, encoded pictures, or both gives undecoded pictures.

    Raises:
        UserError: The column holds something else.
    """
    import pyarrow
    from datasets import Image

    try:
        return dataset.cast_column(column, Image(decode=False))
    except (pyarrow.ArrowException, TypeError, ValueError) as error:
        kind = dataset.features[column]
        raise UserError(f"column {column!r} of {spec} holds {kind}, not pictures; choose another column.") from error
