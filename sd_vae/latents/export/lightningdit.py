"""LightningDiT: safetensors of many raw samples each, and the statistics that it normalises them by.

`latents_rank00_shardNNN.safetensors` with `latents` and `latents_flip`, (N, C, h, w) float32, and `labels`, (N,) int64;
`latents_stats.pt` with `mean` and `std`, (1, C, 1, 1) float32: of the latents that are not mirrored, over all of them
and not over 10,000 drawn at random as there.

Source: https://github.com/hustvl/LightningDiT, datasets/img_latent_dataset.py
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from sd_vae.errors import UserError
from sd_vae.files import file_errors
from sd_vae.latents.export.arrays import StoredLatent
from sd_vae.latents.export.arrays import write as write_bytes
from sd_vae.latents.export.items import ExportItems

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["PATTERN", "STATISTICS", "read", "write"]

PATTERN, STATISTICS = "latents_rank*_shard*.safetensors", "latents_stats.pt"


def write(items: ExportItems, folder: Path, progress: Callable[[int, int], None] | None) -> None:
    """Write a file for each shard of the store, then the statistics."""
    import torch
    from safetensors.torch import save

    digits = max(3, len(str(len(items.manifest.shards) - 1)))
    sums = _Sums(items.description.vae.latent_channels)
    for number, shard in enumerate(items.by_shard(progress)):
        latents = torch.stack([one.values for one in shard])
        sums.add(latents)
        tensors = {
            "latents": latents,
            "latents_flip": torch.stack([one.mirrored for one in shard if one.mirrored is not None]),
            "labels": torch.tensor([one.label for one in shard], dtype=torch.int64),
        }
        assert len(tensors["latents_flip"]) == len(shard), "a mirror image is missing"
        write_bytes(folder / f"latents_rank00_shard{number:0{digits}d}.safetensors", save(tensors))
    buffer = io.BytesIO()  # a file's name would stand in its bytes
    torch.save({"mean": sums.mean, "std": sums.std}, buffer)
    write_bytes(folder / STATISTICS, buffer.getvalue())


def read(path: Path) -> Iterator[StoredLatent]:
    """Yield the latents of one file, or of all in a folder.

    Raises:
        UserError: A file is damaged or has no `latents`.
    """
    from safetensors import SafetensorError, safe_open

    paths = sorted(path.glob(PATTERN)) if path.is_dir() else [path]
    for file in paths:
        with file_errors("read", file):
            try:
                opened = safe_open(file, "pt")
            except SafetensorError as error:
                raise UserError(f"cannot read latents from {file}: {error}; check that the file is whole.") from None
        with opened as tensors:
            names = list(tensors.keys())
            if "latents" not in names:
                raise UserError(f"{file} holds {', '.join(names)} and no latents; it is not one of LightningDiT's.")
            kinds = [name for name in ("latents", "latents_flip") if name in names]
            slices = {name: tensors.get_slice(name) for name in kinds}
            for index in range(slices["latents"].get_shape()[0]):
                for name in kinds:
                    yield StoredLatent(f"{file} number {index}", slices[name][index].float(), name == "latents_flip")


class _Sums:
    """Mean and standard deviation of each channel, summed in double precision."""

    def __init__(self, num_channels: int) -> None:
        import torch

        self._count = 0
        self._mean = torch.zeros(num_channels, dtype=torch.float64)
        self._square = torch.zeros(num_channels, dtype=torch.float64)

    def add(self, latents: Tensor) -> None:
        """Take latents (N, C, h, w); merged as Chan, Golub and LeVeque do, so that nothing cancels."""
        values = latents.double().transpose(0, 1).flatten(1)  # (C, N h w)
        count, mean = values.shape[1], values.mean(1)
        total = self._count + count
        delta = mean - self._mean
        self._square += (values - mean[:, None]).square().sum(1) + delta.square() * self._count * count / total
        self._mean += delta * count / total
        self._count = total

    @property
    def mean(self) -> Tensor:
        """(1, C, 1, 1) float32."""
        return self._mean.float().view(1, -1, 1, 1)

    @property
    def std(self) -> Tensor:
        """(1, C, 1, 1) float32, of a sample, as `torch.std`."""
        return (self._square / max(self._count - 1, 1)).sqrt().float().view(1, -1, 1, 1)
