"""A KL autoencoder for Stable Diffusion: drop-in for diffusers, trainer, exact tools, honest evaluation.

Importing this package is cheap: torch and diffusers are imported when a name that needs them is first used.
"""

from importlib.metadata import version
from typing import TYPE_CHECKING

from sd_vae._lazy import lazy_exports

__version__ = version("sd-vae")

__all__ = [
    "PRESETS",
    "AutoencoderKL",
    "DiagonalGaussian",
    "UserError",
    "VAEConfig",
    "crop",
    "load_vae",
    "open_image",
    "pad_to_factor",
    "plan_memory",
    "save_vae",
    "set_checks",
    "set_overflow",
    "to_pil",
    "to_tensor",
]

_HOMES = {
    "PRESETS": "sd_vae.config",
    "AutoencoderKL": "sd_vae.autoencoder",
    "DiagonalGaussian": "sd_vae.posterior",
    "UserError": "sd_vae.errors",
    "VAEConfig": "sd_vae.config",
    "crop": "sd_vae.images",
    "load_vae": "sd_vae.checkpoints",
    "open_image": "sd_vae.images",
    "plan_memory": "sd_vae.tiling",
    "pad_to_factor": "sd_vae.images",
    "save_vae": "sd_vae.checkpoints",
    "set_checks": "sd_vae.checks",
    "set_overflow": "sd_vae.checks",
    "to_pil": "sd_vae.images",
    "to_tensor": "sd_vae.images",
}

if TYPE_CHECKING:
    from sd_vae.autoencoder import AutoencoderKL
    from sd_vae.checkpoints import load_vae, save_vae
    from sd_vae.checks import set_checks, set_overflow
    from sd_vae.config import PRESETS, VAEConfig
    from sd_vae.errors import UserError
    from sd_vae.images import crop, open_image, pad_to_factor, to_pil, to_tensor
    from sd_vae.posterior import DiagonalGaussian
    from sd_vae.tiling import plan_memory

__getattr__, __dir__ = lazy_exports(__name__, _HOMES)
