"""ComfyUI: one .latent a picture, raw z.

A safetensors file of `latent_tensor` (1, C, h, w) float32 and an empty `latent_format_version_0`, without which the
loader divides by 0.18215. `NAME_NNNNN_.latent`, numbered as ComfyUI numbers what it saves; goes into its `input`.

Source: https://github.com/comfyanonymous/ComfyUI, nodes.py, classes SaveLatent and LoadLatent
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

from sd_vae.errors import UserError
from sd_vae.files import file_errors
from sd_vae.latents.export.arrays import StoredLatent
from sd_vae.latents.export.arrays import write as write_bytes
from sd_vae.latents.export.items import ExportItems

__all__ = ["LEGACY_SCALE", "MARK", "TENSOR", "read", "write"]

TENSOR, MARK = "latent_tensor", "latent_format_version_0"
LEGACY_SCALE = 0.18215
"""What files without the mark were multiplied by."""


def write(items: ExportItems, folder: Path, progress: Callable[[int, int], None] | None) -> None:
    """Write a .latent for each item."""
    import torch
    from safetensors.torch import save

    for shard in items.by_shard(progress):
        for one in shard:
            stem = PurePosixPath(one.item.id).stem
            content = save({TENSOR: one.values[None], MARK: torch.tensor([])})
            write_bytes(folder / f"{stem}_{one.index:05d}_.latent", content)


def read(path: Path) -> Iterator[StoredLatent]:
    """Yield the latents of one .latent, or of all in a folder; those without the mark are divided by 0.18215.

    Raises:
        UserError: A file is damaged or has no `latent_tensor`.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    paths = sorted(path.glob("*.latent")) if path.is_dir() else [path]
    for file in paths:
        with file_errors("read", file):
            try:
                tensors = load_file(file)
            except SafetensorError as error:
                raise UserError(f"cannot read latents from {file}: {error}; check that the file is whole.") from None
        if TENSOR not in tensors:
            raise UserError(f"{file} holds {', '.join(tensors)} and no {TENSOR}; it is not one of ComfyUI's.")
        batch = tensors[TENSOR].float()
        if MARK not in tensors:
            batch = batch / LEGACY_SCALE
        for index, values in enumerate(batch):
            yield StoredLatent(f"{file} number {index}" if len(batch) > 1 else str(file), values)
