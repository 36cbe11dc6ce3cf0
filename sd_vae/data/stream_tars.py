"""Pictures in WebDataset tars by number: an index of where each lies, made once for each tar and cached.

The index holds offset and size of every member that ends like a picture, so any picture is one read away and the order
of training needs no shuffle buffer. A tar that is damaged gives what comes before the damage; one that disappears while
a run reads costs its own pictures, not the run. Both are listed as unreadable.
"""

from __future__ import annotations

import hashlib
import io
import logging
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sd_vae.data.records import FileSpan
from sd_vae.errors import UserError
from sd_vae.files import atomic_file, file_errors
from sd_vae.images import IMAGE_SUFFIXES, open_image

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["TarImages", "TarIndex", "index_tar", "open_tar_images"]

ANY_PICTURE = "image"
"""The default image column, which no member is named after: every picture counts."""

logger = logging.getLogger(__name__)


class TarIndex(NamedTuple):
    """Where the pictures of one tar lie."""

    offsets: NDArray[np.int64]
    """Byte at which each begins."""
    sizes: NDArray[np.int64]
    """Bytes of each."""
    problem: str
    """Why the rest of the tar cannot be read; empty where all of it can."""


class TarImages:
    """Pictures of tars by number, in the order of the tars and of their members; can be sent to worker processes.

    Args:
        spec: What the user called the source.
        tars: The tars.
        indices: What is in each.
    """

    def __init__(self, spec: str, tars: Sequence[Path], indices: Sequence[TarIndex]) -> None:
        self.spec = spec
        self.shard_sizes = [len(index.offsets) for index in indices]
        self.problems = [index.problem for index in indices if index.problem]
        self._tars = [str(tar) for tar in tars]
        self._ends = np.cumsum(self.shard_sizes)
        self._offsets = np.concatenate([index.offsets for index in indices])
        self._sizes = np.concatenate([index.sizes for index in indices])

    def __len__(self) -> int:
        """Return the number of pictures, readable or not."""
        return len(self._offsets)

    def name(self, index: int) -> str:
        """Return what to call picture `index` in a report: its tar and the member's name, read from its header."""
        span = self._span(index)
        header = FileSpan(span.path, span.offset - tarfile.BLOCKSIZE, tarfile.BLOCKSIZE)
        try:
            member = tarfile.TarInfo.frombuf(header.read(), "utf-8", "surrogateescape").name
        except (UserError, tarfile.HeaderError):  # gone or written over; its place still says which it was
            member = f"byte {span.offset}"
        return f"{span.path}::{member}"

    def load(self, index: int) -> Image.Image:
        """Return picture `index` as RGB, upright.

        Raises:
            UserError: It cannot be read.
        """
        return open_image(io.BytesIO(self._span(index).read()), self.name(index))

    def _span(self, index: int) -> FileSpan:
        tar = int(np.searchsorted(self._ends, index, side="right"))
        return FileSpan(self._tars[tar], int(self._offsets[index]), int(self._sizes[index]))


def open_tar_images(spec: str, tars: Sequence[Path], image_column: str = ANY_PICTURE) -> TarImages:
    """Return the pictures of tars.

    Args:
        spec: What the user called them.
        tars: The tars, sorted.
        image_column: Ending of the members that count, such as `jpg`; by default all that end like a picture.

    Raises:
        UserError: There is no picture in any of them.
    """
    indices = [_cached_index(tar, image_column) for tar in tars]
    images = TarImages(spec, tars, indices)
    for problem in images.problems:
        logger.warning("%s", problem)
    if not len(images):
        reason = f"; the first: {images.problems[0].rstrip('.')}" if images.problems else ""
        wanted = "pictures" if image_column == ANY_PICTURE else f"members that end in .{image_column}"
        raise UserError(f"the {len(tars)} tars of {spec} hold no {wanted}{reason}; give tars that do.")
    return images


def index_tar(tar: Path, image_column: str = ANY_PICTURE) -> TarIndex:
    """Return where the pictures of a tar lie, up to where it is damaged."""
    suffixes = IMAGE_SUFFIXES if image_column == ANY_PICTURE else {f".{image_column.lower()}"}
    spans: list[tuple[int, int]] = []
    problem = ""
    try:
        with tarfile.open(tar, "r:") as archive:
            for member in archive:
                if member.isreg() and Path(member.name).suffix.lower() in suffixes:
                    spans.append((member.offset_data, member.size))
            end = FileSpan(str(tar), archive.offset, tarfile.BLOCKSIZE).read()
        if any(end):  # Python's tarfile takes a damaged header for the end
            problem = f"{tar} is damaged at byte {archive.offset}: what follows is left out."
    except (OSError, tarfile.TarError, UserError) as error:
        problem = f"cannot read all of {tar}: {str(error).rstrip('.')}: what follows is left out."
    table = np.asarray(spans, dtype=np.int64).reshape(-1, 2)
    return TarIndex(table[:, 0].copy(), table[:, 1].copy(), problem)


def _cached_index(tar: Path, image_column: str) -> TarIndex:
    """The index of a tar, from the cache of `datasets` where the tar has not changed since."""
    import datasets

    try:
        with file_errors("read", tar):
            state = tar.stat()
    except UserError as error:
        none = np.empty(0, dtype=np.int64)
        return TarIndex(none, none, str(error))
    key = f"{tar.resolve()}\n{state.st_size}\n{state.st_mtime_ns}\n{image_column}"
    name = hashlib.sha256(key.encode(errors="surrogateescape")).hexdigest()
    cached = Path(datasets.config.HF_DATASETS_CACHE) / "sd-vae-tar-index" / f"{name[:32]}.npz"
    try:
        with cached.open("rb") as file, np.load(file, allow_pickle=False) as found:
            return TarIndex(found["offsets"], found["sizes"], "")
    except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile):  # not there, or not whole: made anew
        index = index_tar(tar, image_column)
    if not index.problem:
        try:
            with atomic_file(cached) as temporary, temporary.open("wb") as out:
                np.savez(out, offsets=index.offsets, sizes=index.sizes)
        except UserError as error:
            logger.warning("the index of %s is not kept: %s", tar, error)
    return index
