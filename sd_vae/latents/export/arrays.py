"""What the layouts share: numpy's files as bytes that do not change from run to run, and reading them without pickle.

Shapes: C latent channels, h w latent cells.
"""

from __future__ import annotations

import io
import struct
import tarfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sd_vae.errors import UserError
from sd_vae.files import file_errors
from sd_vae.latents.format import Item

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

__all__ = [
    "StoredLatent",
    "damage",
    "npy_bytes",
    "npz_bytes",
    "parse_npy",
    "read_npy",
    "read_npz",
    "stored",
    "to_half",
    "write",
]

ARCHIVE_DAMAGE = (zipfile.BadZipFile, tarfile.TarError)


@dataclass(frozen=True)
class StoredLatent:
    """One array of an exported file, as it stands there."""

    name: str
    """What to call it: the file, and the number in it where it holds several."""
    values: Tensor
    """(C, h, w), or (2C, h, w) for moments; float32."""
    is_mirrored: bool = False
    """Whether it is the mirror image of the one before."""


def stored(name: str, array: NDArray[Any], *, is_mirrored: bool = False) -> StoredLatent:
    """Return an array from a file as a latent.

    Args:
        name: What to call it.
        array: (C, h, w), or (1, C, h, w).
        is_mirrored: Whether it is a mirror image.

    Raises:
        UserError: Another shape, or no floats.
    """
    import torch

    if array.ndim == 4 and len(array) == 1:
        array = array[0]
    if array.ndim != 3 or array.dtype.kind != "f" or not array.size:
        raise UserError(
            f"{name} is an array of {array.dtype} of shape {array.shape}, a latent is one of floats of (C, h, w); "
            "check that this file holds latents."
        )
    return StoredLatent(name, torch.from_numpy(array.astype(np.float32)), is_mirrored)


def to_half(values: Tensor, item: Item) -> NDArray[np.float16]:
    """Return values rounded to float16.

    Raises:
        UserError: One is too large.
    """
    half = values.half()
    if not bool(half.isfinite().all()):
        raise UserError(
            f"the latent of {item} reaches {float(values.abs().max()):g}, which float16 cannot hold; export to a "
            "format of float32."
        )
    array: NDArray[np.float16] = half.numpy()
    return array


def npy_bytes(array: NDArray[Any]) -> bytes:
    """Return an array as a .npy file."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def npz_bytes(arrays: Mapping[str, NDArray[Any]]) -> bytes:
    """Return arrays as an uncompressed .npz file."""
    buffer = io.BytesIO()
    np.savez(buffer, **dict(arrays))  # type: ignore[arg-type]  # its last keyword is a bool
    return buffer.getvalue()


def write(path: Path, content: bytes) -> None:
    """Write a file of an export's folder, which gets its name as a whole; makes the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def read_npy(path: Path) -> NDArray[Any]:
    """Return the array of a .npy file.

    Raises:
        UserError: Missing, damaged, or an object that only pickle could read.
    """
    with file_errors("read", path):
        return parse_npy(path.read_bytes(), str(path))


def parse_npy(content: bytes, name: str) -> NDArray[Any]:
    """Return the array of a .npy file's bytes.

    Raises:
        UserError: Damaged, or an object that only pickle could read.
    """
    with damage(name):
        array: NDArray[Any] = np.lib.format.read_array(io.BytesIO(content), allow_pickle=False)
        return array


def read_npz(path: Path) -> dict[str, NDArray[Any]]:
    """Return the arrays of a .npz file.

    Raises:
        UserError: Missing, damaged, or with an object that only pickle could read.
    """
    with file_errors("read", path), damage(str(path)), zipfile.ZipFile(path) as archive:
        return {
            name.removesuffix(".npy"): np.lib.format.read_array(io.BytesIO(archive.read(name)), allow_pickle=False)
            for name in archive.namelist()
        }


@contextmanager
def damage(name: str) -> Iterator[None]:
    """Turn what a damaged file raises into one line that names it.

    Raises:
        UserError: The block raised one of those.
    """
    try:
        yield
    except UserError:
        raise
    except (ValueError, EOFError, KeyError, IndexError, struct.error, *ARCHIVE_DAMAGE) as error:
        raise UserError(f"cannot read latents from {name}: {error}; check that the file is whole.") from None
