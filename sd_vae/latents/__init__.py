"""Data sets as latents: a store written by any number of processes and read at random. See docs/latent_format.md.

Importing this package is cheap: torch, safetensors and pyarrow are imported when a name that needs them is first used,
and diffusers is not needed at all to read.
"""

from typing import TYPE_CHECKING

from sd_vae._lazy import lazy_exports

__all__ = [
    "Damage",
    "EncodeConfig",
    "Encoded",
    "Item",
    "LatentDataset",
    "LatentStatistics",
    "LatentStore",
    "Manifest",
    "Numerics",
    "Processes",
    "Reject",
    "ShardReader",
    "ShardWriter",
    "StoreDescription",
    "Verification",
    "encoder_fingerprint",
    "joined_processes",
    "measure",
    "numerics_of",
    "reencoder",
    "verify",
]

_HOMES = {
    "Damage": "sd_vae.latents.verification",
    "EncodeConfig": "sd_vae.latents.encode",
    "Encoded": "sd_vae.latents.encode",
    "Item": "sd_vae.latents.format",
    "LatentDataset": "sd_vae.latents.dataset",
    "LatentStatistics": "sd_vae.latents.statistics",
    "LatentStore": "sd_vae.latents.store",
    "Manifest": "sd_vae.latents.records",
    "Numerics": "sd_vae.latents.format",
    "Processes": "sd_vae.latents.processes",
    "Reject": "sd_vae.latents.format",
    "ShardReader": "sd_vae.latents.reader",
    "ShardWriter": "sd_vae.latents.writer",
    "StoreDescription": "sd_vae.latents.format",
    "Verification": "sd_vae.latents.verification",
    "encoder_fingerprint": "sd_vae.latents.fingerprint",
    "joined_processes": "sd_vae.latents.processes",
    "measure": "sd_vae.latents.statistics",
    "numerics_of": "sd_vae.latents.fingerprint",
    "reencoder": "sd_vae.latents.encode",
    "verify": "sd_vae.latents.verification",
}

if TYPE_CHECKING:
    from sd_vae.latents.dataset import LatentDataset
    from sd_vae.latents.encode import EncodeConfig, Encoded, reencoder
    from sd_vae.latents.fingerprint import encoder_fingerprint, numerics_of
    from sd_vae.latents.format import Item, Numerics, Reject, StoreDescription
    from sd_vae.latents.processes import Processes, joined_processes
    from sd_vae.latents.reader import ShardReader
    from sd_vae.latents.records import Manifest
    from sd_vae.latents.statistics import LatentStatistics, measure
    from sd_vae.latents.store import LatentStore
    from sd_vae.latents.verification import Damage, Verification, verify
    from sd_vae.latents.writer import ShardWriter

__getattr__, __dir__ = lazy_exports(__name__, _HOMES)
