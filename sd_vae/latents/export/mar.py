"""MAR: one .npz of moments a picture, raw, in a folder a class.

`CLASS/NAME.npz` with `moments` and `moments_flip`, (2C, h, w) float32, cat(mean, logvar). The reader is torchvision's
`DatasetFolder`, which numbers the classes by the sorted names of their folders.

Source: https://github.com/LTH14/mar/blob/e0cccf8341aa3276069a5bf2eb4bcb83bebafa4e/util/loader.py
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from sd_vae.errors import UserError
from sd_vae.latents.export.arrays import StoredLatent, npz_bytes, read_npz, stored
from sd_vae.latents.export.arrays import write as write_bytes
from sd_vae.latents.export.items import ExportItems

__all__ = ["read", "write"]


def write(items: ExportItems, folder: Path, progress: Callable[[int, int], None] | None) -> None:
    """Write an .npz for each item.

    Raises:
        UserError: A class between others has no item, so that those behind it would get other numbers.
    """
    assert items.labels is not None
    present = sorted(set(items.labels))
    if present != list(range(len(present))):
        absent = next(number for number in range(len(present)) if number != present[number])
        raise UserError(
            f"mar numbers classes by their folders, and {items.folder} has none of class {absent} but some of "
            f"{present[-1]}, which would get another number; renumber column {items.label!r} without gaps."
        )
    digits = len(str(present[-1]))
    for shard in items.by_shard(progress):
        for one in shard:
            assert one.mirrored is not None, f"{one.item} has no mirror image"
            assert one.label is not None
            arrays = {"moments": one.values.numpy(), "moments_flip": one.mirrored.numpy()}
            write_bytes(folder / f"{one.label:0{digits}d}" / f"{one.index:08d}.npz", npz_bytes(arrays))


def read(path: Path) -> Iterator[StoredLatent]:
    """Yield the moments, cat(mean, logvar), of one .npz or of all in and below a folder.

    Raises:
        UserError: A file is damaged or has no `moments`.
    """
    paths = sorted(path.rglob("*.npz")) if path.is_dir() else [path]
    for file in paths:
        arrays = read_npz(file)
        if "moments" not in arrays:
            raise UserError(f"{file} holds {', '.join(arrays)} and no moments; it is not one of MAR's.")
        yield stored(str(file), arrays["moments"])
        if "moments_flip" in arrays:
            yield stored(str(file), arrays["moments_flip"], is_mirrored=True)
