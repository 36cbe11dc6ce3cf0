"""A latent store in the layouts that other trainers read, one file a family, each with its way out and back.

Importing this package is cheap: torch, safetensors and datasets are imported when a name that needs them is first used.
"""

from typing import TYPE_CHECKING

from sd_vae._lazy import lazy_exports

__all__ = [
    "LAYOUTS",
    "NOTE",
    "ExportItem",
    "ExportItems",
    "Layout",
    "Note",
    "StoredLatent",
    "export_store",
    "find_layout",
    "find_note",
]

_HOMES = {
    "LAYOUTS": "sd_vae.latents.export.layouts",
    "NOTE": "sd_vae.latents.export.note",
    "ExportItem": "sd_vae.latents.export.items",
    "ExportItems": "sd_vae.latents.export.items",
    "Layout": "sd_vae.latents.export.layouts",
    "Note": "sd_vae.latents.export.note",
    "StoredLatent": "sd_vae.latents.export.arrays",
    "export_store": "sd_vae.latents.export.exporting",
    "find_layout": "sd_vae.latents.export.layouts",
    "find_note": "sd_vae.latents.export.note",
}

if TYPE_CHECKING:
    from sd_vae.latents.export.arrays import StoredLatent
    from sd_vae.latents.export.exporting import export_store
    from sd_vae.latents.export.items import ExportItem, ExportItems
    from sd_vae.latents.export.layouts import LAYOUTS, Layout, find_layout
    from sd_vae.latents.export.note import NOTE, Note, find_note

__getattr__, __dir__ = lazy_exports(__name__, _HOMES)
