"""Pictures as small files of quantised latents: `compress(vae, x)`, `decompress(vae, data)`. See docs/compress.md."""

from typing import TYPE_CHECKING

from sd_vae._lazy import lazy_exports

__all__ = ["Compressed", "Container", "Held", "compress", "decompress", "open_srgb", "read"]

_HOMES = {
    "Compressed": "sd_vae.latents.compression.codec",
    "Container": "sd_vae.latents.compression.container",
    "Held": "sd_vae.latents.compression.codec",
    "compress": "sd_vae.latents.compression.codec",
    "decompress": "sd_vae.latents.compression.codec",
    "open_srgb": "sd_vae.latents.compression.colours",
    "read": "sd_vae.latents.compression.codec",
}

if TYPE_CHECKING:
    from sd_vae.latents.compression.codec import Compressed, Held, compress, decompress, read
    from sd_vae.latents.compression.colours import open_srgb
    from sd_vae.latents.compression.container import Container

__getattr__, __dir__ = lazy_exports(__name__, _HOMES)
