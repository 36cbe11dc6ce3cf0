"""Weight files: told apart by their first bytes, opened without reading the weights, written whole or not at all.

`open_weights` gives names, shapes and dtypes at once and tensors when they are asked for, so that the VAE of a full
checkpoint costs its own size and not the file's. A safetensors file is read slice by slice, a zipped PyTorch file is
mapped into memory; only PyTorch files from before 1.6 have to be read whole.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sd_vae.checkpoints.pickles import load_pickle
from sd_vae.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["DTYPES", "WeightFile", "as_dtype", "open_weights", "sniff", "write_safetensors"]

DTYPES = ("float32", "float16", "bfloat16")
"""Dtypes that weights are loaded and saved in, by name."""

Format = Literal["safetensors", "torch zip", "torch legacy"]

_MAX_HEADER_BYTES = 100_000_000  # what the safetensors library accepts
_SAFETENSORS_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True, kw_only=True)
class WeightFile:
    """What is in a weight file; tensors are read when asked for."""

    path: Path
    """The file."""
    format: Format
    """How it is stored."""
    shapes: Mapping[str, tuple[int, ...]]
    """Shape of every tensor by name."""
    dtypes: Mapping[str, str]
    """Dtype of every tensor by name, such as float16."""
    metadata: Mapping[str, str]
    """Text that safetensors files carry beside the tensors."""
    dropped: tuple[str, ...]
    """Globals of a pickle that were not loaded, such as callbacks in an old Lightning file."""
    read: Callable[[str], Tensor]
    """Tensor of a name, on the CPU; may be a view of the mapped file."""


def sniff(path: Path) -> Format:
    """Return what kind of weight file this is, by its first bytes.

    Raises:
        UserError: Missing, unreadable, or not a weight file.
    """
    try:
        with path.open("rb") as file:
            head = file.read(32)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; check the path and its permissions.") from None
    if head.startswith(b"PK\x03\x04"):
        return "torch zip"
    # Before pickles: the length of a short header, such as 640, begins with the same two bytes.
    if 0 < int.from_bytes(head[:8], "little") <= _MAX_HEADER_BYTES and head[8:9] == b"{":
        return "safetensors"
    if head[:2] in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"):
        return "torch legacy"
    if head.startswith(b"version https://git-lfs"):
        raise UserError(f"{path} is a Git LFS pointer, not the weights; fetch them with git lfs pull.")
    raise UserError(
        f"{path} is not a checkpoint: it starts like neither a safetensors nor a PyTorch file; "
        "check the path, or download it again."
    )


def open_weights(path: Path) -> WeightFile:
    """Return the contents of a weight file, without executing anything in it.

    Raises:
        UserError: Missing, unreadable, damaged, or without tensors.
    """
    kind = sniff(path)
    opened = _open_safetensors(path) if kind == "safetensors" else _open_torch(path, kind)
    if not opened.shapes:
        raise UserError(f"{path} holds no tensors; give a checkpoint with weights.")
    return opened


def _open_safetensors(path: Path) -> WeightFile:
    from safetensors import SafetensorError, safe_open

    try:
        file: Any = safe_open(path, framework="pt")
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise UserError(f"{path} is a damaged safetensors file ({error}); download or copy it again.") from error
    return WeightFile(
        path=path,
        format="safetensors",
        shapes={name: tuple(part.get_shape()) for name, part in slices.items()},
        dtypes={name: _SAFETENSORS_DTYPES.get(part.get_dtype(), part.get_dtype()) for name, part in slices.items()},
        metadata=file.metadata() or {},
        dropped=(),
        read=file.get_tensor,
    )


def _open_torch(path: Path, kind: Format) -> WeightFile:
    if path.suffix == ".safetensors":
        raise UserError(f"{path} is a PyTorch file under the name of a safetensors file; rename it to end in .ckpt.")
    value, dropped = load_pickle(path, is_zip=kind == "torch zip")
    tensors = _state_dict(value)
    return WeightFile(
        path=path,
        format=kind,
        shapes={name: tuple(tensor.shape) for name, tensor in tensors.items()},
        dtypes={name: str(tensor.dtype).removeprefix("torch.") for name, tensor in tensors.items()},
        metadata={},
        dropped=dropped,
        read=lambda name: tensors[name].detach(),
    )


def _state_dict(value: Any) -> dict[str, Tensor]:
    """The named tensors in what a PyTorch file held, out of their `state_dict` wrapper where there is one."""
    import torch

    while isinstance(value, Mapping) and isinstance(value.get("state_dict"), Mapping):
        value = value["state_dict"]
    if not isinstance(value, Mapping):
        return {}
    return {name: item for name, item in value.items() if isinstance(name, str) and isinstance(item, torch.Tensor)}


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors to a safetensors file; the caller gives a temporary path.

    Args:
        path: File.
        tensors: Tensors by name, of any device and memory layout; not changed.
        metadata: Text for the file's `__metadata__`.

    Raises:
        UserError: The metadata is not text, or the file cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    texts = dict(metadata or {})
    wrong = [f"{key!r}: {value!r}" for key, value in texts.items() if not (type(key) is type(value) is str)]
    if wrong:
        raise UserError(f"metadata must map text to text, not {', '.join(wrong)}; convert the values with str or json.")
    row_major = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}  # the format's order
    try:
        save_file(row_major, path, {**texts, "format": "pt"})
    except SafetensorError as error:
        raise UserError(f"cannot write {path} ({error}); check the disk and its free space.") from error


def as_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """Return a torch dtype from itself or its name.

    Raises:
        UserError: Not one of `DTYPES`.
    """
    import torch

    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise UserError(f"dtype {name!r} is not one that weights are kept in; choose one of: {', '.join(DTYPES)}.")
    found: torch.dtype = getattr(torch, name)
    return found
