"""DiT and fast-DiT: numbered .npy of scaled samples, and of labels beside them.

`imagenet256_features/N.npy` (1, C, h, w) float32, `imagenet256_labels/N.npy` (1,) int64; the folders are called so at
every size. The scripts there multiply by 0.18215, so what they read is scaled.

Source: https://github.com/chuanyangjin/fast-DiT/blob/34b318020afd91029844c04d88a4187b2db82694/extract_features.py
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from sd_vae.errors import UserError
from sd_vae.latents.export.arrays import StoredLatent, npy_bytes, read_npy, stored
from sd_vae.latents.export.arrays import write as write_bytes
from sd_vae.latents.export.items import ExportItems

__all__ = ["FEATURES", "LABELS", "read", "write"]

FEATURES, LABELS = "imagenet256_features", "imagenet256_labels"


def write(items: ExportItems, folder: Path, progress: Callable[[int, int], None] | None) -> None:
    """Write a latent and a label for each item."""
    for shard in items.by_shard(progress):
        for one in shard:
            write_bytes(folder / FEATURES / f"{one.index}.npy", npy_bytes(one.values[None].numpy()))
            write_bytes(folder / LABELS / f"{one.index}.npy", npy_bytes(np.array([one.label], np.int64)))


def read(path: Path) -> Iterator[StoredLatent]:
    """Yield the latents of one .npy, or of all in a folder or in the folder of features in it, by number.

    Raises:
        UserError: A file is damaged, or its name is no number.
    """
    folder = path / FEATURES if (path / FEATURES).is_dir() else path
    files = sorted(folder.glob("*.npy"), key=_number) if path.is_dir() else [path]
    for file in files:
        array = read_npy(file)
        if array.ndim == 4:  # earlier versions wrote a batch a file
            for index, one in enumerate(array):
                yield stored(f"{file} number {index}" if len(array) > 1 else str(file), one)
        else:
            yield stored(str(file), array)


def _number(path: Path) -> int:
    if not path.stem.isdecimal():
        raise UserError(f"{path} is not called by a number as DiT's are; name the file itself, or leave it out.")
    return int(path.stem)
