"""What the commands around latent stores share: the VAE that made one, and a bar over its shards."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from sd_vae.errors import UserError

if TYPE_CHECKING:
    from sd_vae.autoencoder import AutoencoderKL
    from sd_vae.latents import LatentStore
    from sd_vae.latents.records import ShardRecord

__all__ = ["load_encoder", "require_encoder", "shard_progress"]


def load_encoder(store: LatentStore, vae: str, config: str | None, device: str = "cpu") -> AutoencoderKL:
    """Return a VAE in the dtype that the store was encoded in.

    Raises:
        UserError: As `sd_vae.load_vae`.
    """
    from sd_vae import load_vae

    return load_vae(vae, config, dtype=store.description.compute_dtype, device=device)


def require_encoder(store: LatentStore, vae: AutoencoderKL, name: str) -> None:
    """Check that a store is of a VAE's encoder; the decoder may be another.

    Args:
        store: The store.
        vae: The VAE, as `load_encoder` gives it.
        name: What to call it.

    Raises:
        UserError: It is of another.
    """
    from sd_vae.latents import encoder_fingerprint

    made_by, given = store.description.encoder, encoder_fingerprint(vae)
    if made_by != given:
        raise UserError(
            f"{store.folder} was made by the encoder {made_by[:12]}, {name} has {given[:12]}; give the VAE that made "
            "it, or one that differs in its decoder alone."
        )


@contextmanager
def shard_progress(store: LatentStore, label: str) -> Iterator[Callable[[ShardRecord], None]]:
    """A bar over the shards on standard error, with rate and time left; yields what to call after each."""
    from tqdm import tqdm

    num_shards = len(list(store.folder.glob("shard-*.json")))  # the manifest may be what is damaged
    with tqdm(desc=label, total=num_shards, unit=" shards", file=sys.stderr) as bar:

        def show(record: ShardRecord) -> None:
            bar.update()

        yield show
