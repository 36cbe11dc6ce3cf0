"""WebDataset: tars with an .npy and a .json an item.

`latents-NNNNN.tar`, one a shard of the store, with `NNNNNNNN.npy` (C, h, w) float16 and `NNNNNNNN.json`: the item's id
and source, the user's columns, and by which scale the values were multiplied, since there is no convention for that.

Source: https://github.com/webdataset/webdataset (the format), huggingface.co/datasets/darask0/sana-vae-latents (a use)
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

from sd_vae.errors import UserError
from sd_vae.files import file_errors
from sd_vae.latents.export.arrays import StoredLatent, damage, npy_bytes, parse_npy, stored, to_half
from sd_vae.latents.export.items import ExportItem, ExportItems
from sd_vae.latents.export.note import Scale
from sd_vae.validation import from_plain

__all__ = ["read", "scale_of", "write"]


def write(items: ExportItems, folder: Path, progress: Callable[[int, int], None] | None) -> None:
    """Write a tar for each shard of the store.

    Raises:
        UserError: A value is too large for float16, or a column holds what JSON cannot.
    """
    for number, shard in enumerate(items.by_shard(progress)):
        with tarfile.open(folder / f"latents-{number:05d}.tar", "w", format=tarfile.USTAR_FORMAT) as archive:
            for one in shard:
                _add(archive, f"{one.index:08d}.npy", npy_bytes(to_half(one.values, one.item)))
                _add(archive, f"{one.index:08d}.json", _sidecar(items, one))


def read(path: Path) -> Iterator[StoredLatent]:
    """Yield the latents of one tar, or of all in a folder.

    Raises:
        UserError: A tar or an array in it is damaged, or it holds no .npy.
    """
    paths = sorted(path.glob("*.tar")) if path.is_dir() else [path]
    for file in paths:
        found = False
        with file_errors("read", file), damage(str(file)), tarfile.open(file, "r:") as archive:
            for member in archive:
                if member.isfile() and member.name.endswith(".npy"):
                    found = True
                    name = f"{file}/{member.name}"
                    content = archive.extractfile(member)
                    assert content is not None, "a regular member can be read"
                    yield stored(name, parse_npy(content.read(), name))
        if not found:
            raise UserError(f"{file} holds no .npy; it is no tar of latents as docs/exports.md describes them.")


def scale_of(path: Path) -> Scale | None:
    """Return what the first .json of the first tar says of the scale; None where it says nothing.

    Raises:
        UserError: The tar or that .json is damaged.
    """
    file = sorted(path.glob("*.tar"))[0] if path.is_dir() else path
    with file_errors("read", file), damage(str(file)), tarfile.open(file, "r:") as archive:
        for member in archive:
            if member.isfile() and member.name.endswith(".json"):
                content = archive.extractfile(member)
                assert content is not None, "a regular member can be read"
                values = json.loads(content.read())
                said = values.get("scale") if isinstance(values, dict) else None
                return None if said is None else from_plain(Scale, said, source=f"{file}/{member.name}")
    return None


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    """Add a file whose header is the same in every run: no owner, no date."""
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def _sidecar(items: ExportItems, one: ExportItem) -> bytes:
    values = {
        "id": one.item.id,
        "source": one.item.source,
        "sha256": one.item.sha256,
        "view": one.item.view,
        "scale": asdict(items.scale),
        "columns": one.item.columns,
    }
    try:
        return json.dumps(values, ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise UserError(
            f"the columns of {one.item} cannot be written as JSON ({error}); encode without that column."
        ) from None
