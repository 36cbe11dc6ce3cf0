"""Pictures in WebDataset tars by number: an index of where each lies, made once for each tar and cached.

A tar is a file, or an address on the web whose server gives parts of it.

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
from typing import IO, TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sd_vae.data.records import FileSpan
from sd_vae.data.remote import RemoteFiles, is_remote, without_secrets
from sd_vae.errors import UnreachableError, UserError
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
        tars: The tars, paths or addresses.
        indices: What is in each.
        files: Reads what is remote.
    """

    def __init__(self, spec: str, tars: Sequence[str], indices: Sequence[TarIndex], files: RemoteFiles) -> None:
        self.spec = spec
        self.is_remote = any(is_remote(tar) for tar in tars)
        self.shard_sizes = [len(index.offsets) for index in indices]
        self.problems = [index.problem for index in indices if index.problem]
        self._files = files
        self._tars = list(tars)
        self._ends = np.cumsum(self.shard_sizes)
        self._offsets = np.concatenate([index.offsets for index in indices])
        self._sizes = np.concatenate([index.sizes for index in indices])

    def __len__(self) -> int:
        """Return the number of pictures, readable or not."""
        return len(self._offsets)

    @property
    def num_retries(self) -> int:
        """Requests for parts of tars that were made again, in this process."""
        return self._files.num_retries

    def name(self, index: int) -> str:
        """Return what to call picture `index` in a report: its tar and the member's name, read from its header."""
        tar, offset, _ = self._place(index)
        try:
            header = _read(self._files, tar, offset - tarfile.BLOCKSIZE, tarfile.BLOCKSIZE)
        except UserError:  # gone; its place still says which it was
            header = b""
        return _member_name(tar, offset, header)

    def load(self, index: int) -> Image.Image:
        """Return picture `index` as RGB, upright.

        Raises:
            UserError: It cannot be read.
        """
        tar, offset, size = self._place(index)
        content = _read(self._files, tar, offset - tarfile.BLOCKSIZE, tarfile.BLOCKSIZE + size)
        name = _member_name(tar, offset, content[: tarfile.BLOCKSIZE])
        return open_image(io.BytesIO(content[tarfile.BLOCKSIZE :]), name)

    def _place(self, index: int) -> tuple[str, int, int]:
        """Tar, offset and size of a picture."""
        tar = int(np.searchsorted(self._ends, index, side="right"))
        return self._tars[tar], int(self._offsets[index]), int(self._sizes[index])


def open_tar_images(
    spec: str, tars: Sequence[str], image_column: str = ANY_PICTURE, files: RemoteFiles | None = None
) -> TarImages:
    """Return the pictures of tars.

    Args:
        spec: What the user called them.
        tars: The tars, paths or addresses, sorted.
        image_column: Ending of the members that count, such as `jpg`; by default all that end like a picture.
        files: Reads what is remote.

    Raises:
        UserError: There is no picture in any of them, or the network does not bring one.
    """
    files = files or RemoteFiles()
    indices = [_cached_index(tar, image_column, files) for tar in tars]
    images = TarImages(spec, tars, indices, files)
    for problem in images.problems:
        logger.warning("%s", problem)
    if not len(images):
        reason = f"; the first: {images.problems[0].rstrip('.')}" if images.problems else ""
        wanted = "pictures" if image_column == ANY_PICTURE else f"members that end in .{image_column}"
        raise UserError(f"the {len(tars)} tars of {_shown(spec)} hold no {wanted}{reason}; give tars that do.")
    return images


def index_tar(tar: str, image_column: str = ANY_PICTURE, files: RemoteFiles | None = None) -> TarIndex:
    """Return where the pictures of a tar lie, up to where it is damaged.

    Raises:
        UnreachableError: The network does not bring it.
    """
    files = files or RemoteFiles()
    suffixes = IMAGE_SUFFIXES if image_column == ANY_PICTURE else {f".{image_column.lower()}"}
    spans: list[tuple[int, int]] = []
    problem = ""
    try:
        with _open(files, tar) as file, tarfile.open(fileobj=file, mode="r:") as archive:
            for member in archive:
                if member.isreg() and Path(member.name).suffix.lower() in suffixes:
                    spans.append((member.offset_data, member.size))
            end = _read(files, tar, archive.offset, tarfile.BLOCKSIZE)
        if any(end):  # Python's tarfile takes a damaged header for the end
            problem = f"{_shown(tar)} is damaged at byte {archive.offset}: what follows is left out."
    except UnreachableError:
        raise
    except (OSError, tarfile.TarError, UserError) as error:
        problem = f"cannot read all of {_shown(tar)}: {str(error).rstrip('.')}: what follows is left out."
    table = np.asarray(spans, dtype=np.int64).reshape(-1, 2)
    return TarIndex(table[:, 0].copy(), table[:, 1].copy(), problem)


def _cached_index(tar: str, image_column: str, files: RemoteFiles) -> TarIndex:
    """The index of a tar, from the cache of `datasets` where the tar has not changed since."""
    import datasets

    try:
        key = f"{_state(files, tar)}\n{image_column}"
    except UnreachableError:
        raise
    except UserError as error:
        none = np.empty(0, dtype=np.int64)
        return TarIndex(none, none, str(error))
    name = hashlib.sha256(key.encode(errors="surrogateescape")).hexdigest()
    cached = Path(datasets.config.HF_DATASETS_CACHE) / "sd-vae-tar-index" / f"{name[:32]}.npz"
    try:
        with cached.open("rb") as file, np.load(file, allow_pickle=False) as found:
            return TarIndex(found["offsets"], found["sizes"], "")
    except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile):  # not there, or not whole: made anew
        index = index_tar(tar, image_column, files)
    if not index.problem:
        try:
            with atomic_file(cached) as temporary, temporary.open("wb") as out:
                np.savez(out, offsets=index.offsets, sizes=index.sizes)
        except UserError as error:
            logger.warning("the index of %s is not kept: %s", _shown(tar), error)
    return index


# ---- a tar here or on the web


def _state(files: RemoteFiles, tar: str) -> str:
    """What changes when a tar does."""
    if is_remote(tar):
        size, version = files.state(tar)
        return f"{without_secrets(tar)}\n{size}\n{version}"
    with file_errors("read", Path(tar)):
        found = Path(tar).stat()
    return f"{Path(tar).resolve()}\n{found.st_size}\n{found.st_mtime_ns}"


def _open(files: RemoteFiles, tar: str) -> IO[bytes]:
    return files.open(tar, files.state(tar).size) if is_remote(tar) else Path(tar).open("rb")


def _read(files: RemoteFiles, tar: str, offset: int, size: int) -> bytes:
    return files.read(tar, offset, size) if is_remote(tar) else FileSpan(tar, offset, size).read()


def _shown(tar: str) -> str:
    return without_secrets(tar) if is_remote(tar) else tar


def _member_name(tar: str, offset: int, header: bytes) -> str:
    try:
        member = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape").name
    except tarfile.HeaderError:  # written over
        member = f"byte {offset}"
    return f"{_shown(tar)}::{member}"
