"""Checkpoints in every layout that people have: read, write, convert, look into. See docs/checkpoints.md.

Importing this package is cheap: torch and safetensors are imported by the functions that need them.
"""

from sd_vae.checkpoints.convert import Conversion, convert_vae
from sd_vae.checkpoints.families import FAMILIES, family_of
from sd_vae.checkpoints.inspection import Inspection, inspect_checkpoint
from sd_vae.checkpoints.load import load_vae
from sd_vae.checkpoints.save import Layout, save_vae

__all__ = [
    "FAMILIES",
    "Conversion",
    "Inspection",
    "Layout",
    "convert_vae",
    "family_of",
    "inspect_checkpoint",
    "load_vae",
    "save_vae",
]
