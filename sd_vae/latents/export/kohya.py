"""kohya-ss/sd-scripts: one .npz beside each picture, raw z.

Read by its `LatentsCachingStrategy`: `latents` (C, h, w) float32, `original_size` (width, height), `crop_ltrb` as that
program computes it from picture and bucket, `latents_flipped` where there are mirror images. Files are called
NAME_WWWWxHHHH_sd.npz by the size of the picture, `_sdxl` for SDXL.

Source: https://github.com/kohya-ss/sd-scripts/blob/040c04f17e70ff12474ffc0704f183e154d90d71/library/strategy_sd.py
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

import numpy as np

from sd_vae.errors import UserError
from sd_vae.latents.export.arrays import StoredLatent, npz_bytes, read_npz, stored
from sd_vae.latents.export.arrays import write as write_bytes
from sd_vae.latents.export.items import ExportItem, ExportItems
from sd_vae.latents.format import StoreDescription

__all__ = ["read", "write"]

SUFFIXES = {0.18215: "_sd.npz", 0.13025: "_sdxl.npz"}
"""Ending of the name by the scaling factor of the VAE: Stable Diffusion 1 and 2, SDXL."""


def write(items: ExportItems, folder: Path, progress: Callable[[int, int], None] | None) -> None:
    """Write one .npz a picture, in the folders that the pictures lie in.

    Raises:
        UserError: The VAE is of neither family, or two pictures differ in their suffix alone.
    """
    suffix = _suffix(items.description)
    for shard in items.by_shard(progress):
        for one in shard:
            height, width = one.item.original_size
            name = _relative(one.item.id)
            path = folder / name.with_name(f"{name.stem}_{width:04d}x{height:04d}{suffix}")
            if path.exists():
                raise UserError(
                    f"two pictures of {items.folder} would have their latent in {path.relative_to(folder)}, the second "
                    f"is {one.item.id}; kohya leaves out suffixes, so rename one of them."
                )
            write_bytes(path, npz_bytes(_arrays(one)))


def read(path: Path) -> Iterator[StoredLatent]:
    """Yield the latents of one .npz, or of all in and below a folder.

    Raises:
        UserError: A file is damaged or has no `latents`.
    """
    paths = sorted(path.rglob("*.npz")) if path.is_dir() else [path]
    for file in paths:
        arrays = read_npz(file)
        if "latents" not in arrays:
            raise UserError(
                f"{file} holds {', '.join(arrays)} and no latents; it is not one of kohya's for SD or SDXL."
            )
        yield stored(str(file), arrays["latents"])
        if "latents_flipped" in arrays:
            yield stored(str(file), arrays["latents_flipped"], is_mirrored=True)


def _arrays(one: ExportItem) -> dict[str, np.ndarray]:
    height, width = one.item.original_size
    arrays = {
        "latents": one.values.numpy(),
        "original_size": np.array((width, height)),
        "crop_ltrb": np.array(_crop_ltrb(one.item.crop[2:], (height, width))),
    }
    if one.mirrored is not None:
        arrays["latents_flipped"] = one.mirrored.numpy()
    return arrays


def _crop_ltrb(bucket: tuple[int, ...], original: tuple[int, int]) -> tuple[float, float, float, float]:
    """Left, top, right, bottom of the whole picture fitted into its bucket, centred: what SDXL is conditioned on there.

    Args:
        bucket: Height and width of what was encoded, in pixels.
        original: Height and width of the picture.
    """
    height, width = bucket
    aspect = original[1] / original[0]
    resized_width, resized_height = (height * aspect, height) if width / height > aspect else (width, width / aspect)
    left, top = (width - resized_width) // 2, (height - resized_height) // 2
    return left, top, left + resized_width, top + resized_height


def _suffix(description: StoreDescription) -> str:
    config = description.vae
    for scaling_factor, suffix in SUFFIXES.items():
        if math.isclose(config.scaling_factor, scaling_factor) and config.latent_channels == 4:
            return suffix
    raise UserError(
        f"kohya's .npz is for Stable Diffusion 1, 2 and SDXL (4 channels, scaling factor 0.18215 or 0.13025), this VAE "
        f"has {config.latent_channels} channels and {config.scaling_factor:g}; export to another format."
    )


def _relative(name: str) -> PurePosixPath:
    """An item's id as a path that stays in the folder."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not path.name:
        raise UserError(f"the picture {name!r} has no place in the output folder; encode a folder of pictures.")
    return path
