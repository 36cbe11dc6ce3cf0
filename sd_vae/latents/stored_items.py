"""Single latents by name: `STORE#N` is item N of a latent store."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from sd_vae.errors import UserError
from sd_vae.latents.format import STORE

if TYPE_CHECKING:
    from torch import Tensor

    from sd_vae.autoencoder import AutoencoderKL

__all__ = ["StoredModes", "is_stored_item", "read_stored_item"]


class StoredModes:
    """The most likely raw z of each item of a store, as a sequence that reads one at a time.

    Of a store of samples, what it holds.

    Args:
        folder: The store.

    Raises:
        UserError: No finished store.
    """

    def __init__(self, folder: Path | str) -> None:
        from sd_vae.latents.dataset import LatentDataset
        from sd_vae.latents.store import LatentStore

        self.description = LatentStore.open(Path(folder)).description
        holds_samples = self.description.content == "sample"
        self._dataset = LatentDataset(folder, content="sample" if holds_samples else "mode", columns=())

    def __len__(self) -> int:
        """Return the number of items."""
        return len(self._dataset)

    def __iter__(self) -> Iterator[Tensor]:
        """Yield z of each item in order."""
        return map(self.__getitem__, range(len(self)))

    def __getitem__(self, index: int) -> Tensor:
        """Return z (C, h, w) of an item, float32 on the CPU.

        Raises:
            IndexError: There is no such item.
            UserError: Its shard is missing or damaged.
        """
        return self._dataset.sample(index)


def is_stored_item(name: str) -> bool:
    """Whether a name is STORE#N."""
    folder, mark, _ = name.rpartition("#")
    return bool(mark) and (Path(folder) / STORE).is_file()


def read_stored_item(name: str, vae: AutoencoderKL) -> tuple[Tensor, str]:
    """Return the raw latent (C, h, w) that STORE#N names, and the fingerprint of the encoder that made it.

    Args:
        name: The store and the number of the item, from 0.
        vae: The VAE that is to decode it.

    Raises:
        UserError: N is no number of an item, or the latent has other channels than the VAE's.
    """
    folder, _, number = name.rpartition("#")
    modes = StoredModes(folder)
    if not number.isdecimal() or int(number) >= len(modes):
        raise UserError(f"{name} names no item: {folder} holds {len(modes)}, the first is {folder}#0.")
    z = modes[int(number)]
    if len(z) != vae.config.latent_channels:
        raise UserError(
            f"{name} has {len(z)} channels, the VAE takes {vae.config.latent_channels}; give the VAE that made it."
        )
    return z, modes.description.encoder
