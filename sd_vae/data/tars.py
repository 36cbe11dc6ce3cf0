"""WebDataset tars as records, read by position without unpacking.

Members that share the part of their path before the first dot of the file's name are one sample: the picture, its
caption (`.txt`), its class (`.cls`), its fields (`.json`). A tar's headers are read once to count its samples and again
when it is read, so that what is held in memory does not grow with the data set.

Source: https://github.com/webdataset/webdataset (the naming convention).
"""

from __future__ import annotations

import functools
import json
import tarfile
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from sd_vae.data.records import FileSpan, Record, choose_columns
from sd_vae.errors import UserError
from sd_vae.files import file_errors
from sd_vae.images import IMAGE_SUFFIXES

__all__ = ["TarRecords", "open_tars"]

COLUMN_KINDS = ("txt", "cls", "json")
"""Members that become columns: a text, a whole number, and the fields of an object under their own names."""

Sample = dict[str, FileSpan]
"""Kind of member, such as `jpg`, to where it lies."""


class TarRecords:
    """Samples in the order of the tars' paths and of their members; `tar/key` is the id."""

    def __init__(
        self, spec: str, tars: list[Path], counts: list[int], columns: Sequence[str] | None, kind: str | None
    ) -> None:
        self.spec = spec
        self._tars = tars
        self._ends = list(accumulate(counts))
        self._columns = columns
        self._kind = kind
        root = Path(spec)
        self._names = [(tar.relative_to(root) if tar != root else Path(tar.name)).as_posix() for tar in tars]

    @property
    def num_records(self) -> int:
        """Number of samples."""
        return self._ends[-1]

    def read(self, start: int = 0, stop: int | None = None) -> Iterator[Record]:
        """Yield the records from `start` to before `stop`, or to the end.

        Raises:
            UserError: A tar is damaged or was changed, a sample has several pictures, or its columns are not usable.
        """
        stop = self.num_records if stop is None else min(stop, self.num_records)
        while start < stop:
            number = bisect_right(self._ends, start)
            first = self._ends[number - 1] if number else 0
            samples = list(_samples(self._tars[number]).items())
            if len(samples) != self._ends[number] - first:
                raise UserError(f"{self._tars[number]} was changed while it was read; run again.")
            for position in range(start, min(stop, self._ends[number])):
                yield self._record(position, number, *samples[position - first])
            start = self._ends[number]

    def _record(self, position: int, number: int, key: str, sample: Sample) -> Record:
        tar = self._tars[number]
        kind = self._kind or _picture_kind(tar, key, sample)
        picture = sample.get(kind) if kind else None
        found = _read_columns(tar, key, sample)
        wanted = found if self._columns is None else self._columns
        return Record(
            position,
            f"{self._names[number]}/{key}",
            f"{tar}::{key}.{kind}" if picture else f"{tar}::{key}",
            picture or b"",
            {name: found.get(name) for name in wanted},
        )


def open_tars(spec: str, tars: list[Path], columns: Sequence[str] | None, kind: str | None) -> TarRecords:
    """Return the samples of WebDataset tars.

    A sample without a picture is a record of no bytes. A column that is asked for must be in the first sample.

    Args:
        spec: What the user called the data set: one tar, or the folder of all of them.
        tars: The tars, sorted.
        columns: Columns to keep; all by default.
        kind: Suffix of the pictures; needed where samples hold several.

    Raises:
        UserError: A tar is damaged or names a sample twice, there are no samples, no such column, or no such kind.
    """
    counts = [len(_samples(tar)) for tar in tars]
    if not sum(counts):
        raise UserError(f"{spec} holds no samples; give tars with pictures in them.")
    records = TarRecords(spec, tars, counts, None, kind)
    first = next(records.read(0, 1))
    if kind is not None and not first.content:
        raise UserError(f"{first.source} has no {kind!r}; name the kind of file that is the picture.")
    choose_columns(first.source, list(first.columns), columns)
    return TarRecords(spec, tars, counts, columns, kind)


def _samples(tar: Path) -> dict[str, Sample]:
    """Where the members of each sample lie, by the sample's key; not to be changed."""
    with file_errors("read", tar):
        found = tar.stat()
    return _scan(tar, found.st_size, found.st_mtime_ns)


@functools.lru_cache(maxsize=1)  # a tar is read in several ranges, and headers pass at 15,000 a second
def _scan(tar: Path, size: int, mtime_ns: int) -> dict[str, Sample]:
    """The samples of a tar in the state that has this size and time."""
    samples: dict[str, Sample] = {}
    last = None
    try:
        with tarfile.open(tar, "r:") as archive:
            for member in archive:
                folder, slash, name = member.name.removeprefix("./").rpartition("/")
                stem, dot, kind = name.partition(".")
                if not member.isreg() or not stem or not dot:
                    continue  # folders, hidden files, and files that belong to no sample
                key = folder + slash + stem
                if key in samples and (key != last or kind.lower() in samples[key]):
                    raise UserError(f"{tar} holds two samples named {key}, the second with {name}; rename one.")
                samples.setdefault(key, {})[kind.lower()] = FileSpan(str(tar), member.offset_data, member.size)
                last = key
            end = FileSpan(str(tar), archive.offset, tarfile.BLOCKSIZE).read()
    except (OSError, tarfile.TarError) as error:
        raise UserError(f"cannot read the tar {tar}: {error}; write it anew, not compressed.") from None
    if any(end):  # Python's tarfile takes a damaged header for the end
        raise UserError(f"{tar} is damaged at byte {archive.offset}, where it should end or go on; write it anew.")
    return samples


def _picture_kind(tar: Path, key: str, sample: Sample) -> str | None:
    kinds = [kind for kind in sample if f".{kind.rpartition('.')[2]}" in IMAGE_SUFFIXES]
    if len(kinds) > 1:
        raise UserError(f"sample {key} of {tar} holds several pictures ({', '.join(kinds)}); name one as image column.")
    return kinds[0] if kinds else None


def _read_columns(tar: Path, key: str, sample: Sample) -> dict[str, Any]:
    texts = {kind: sample[kind].read() for kind in COLUMN_KINDS if kind in sample}
    columns: dict[str, Any] = {}
    kind = ""
    try:
        if (kind := "json") in texts:
            columns |= json.loads(texts["json"])
        if (kind := "txt") in texts:
            columns["txt"] = texts["txt"].decode()
        if (kind := "cls") in texts:
            columns["cls"] = int(texts["cls"])
    except (ValueError, TypeError) as error:  # no JSON, no object, no UTF-8, no number
        raise UserError(f"{kind} of sample {key} in {tar} cannot be read: {error}; mend it or leave it out.") from None
    return columns
