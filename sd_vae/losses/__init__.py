"""What a reconstruction is judged by in training: pixels, a perceptual distance, and KL to the prior.

Importing this package is cheap: torch and the perceptual networks are imported when a name that needs them is first
used.
"""

from typing import TYPE_CHECKING

from sd_vae._lazy import lazy_exports

__all__ = [
    "KLConfig",
    "LossConfig",
    "Objective",
    "ObjectiveResult",
    "Perceptual",
    "PerceptualConfig",
    "build_perceptual",
    "kl_loss",
    "reconstruction_loss",
]

_HOMES = {
    "KLConfig": "sd_vae.losses.config",
    "LossConfig": "sd_vae.losses.config",
    "Objective": "sd_vae.losses.objective",
    "ObjectiveResult": "sd_vae.losses.objective",
    "Perceptual": "sd_vae.losses.perceptual",
    "PerceptualConfig": "sd_vae.losses.config",
    "build_perceptual": "sd_vae.losses.perceptual",
    "kl_loss": "sd_vae.losses.kl",
    "reconstruction_loss": "sd_vae.losses.reconstruction",
}

if TYPE_CHECKING:
    from sd_vae.losses.config import KLConfig, LossConfig, PerceptualConfig
    from sd_vae.losses.kl import kl_loss
    from sd_vae.losses.objective import Objective, ObjectiveResult
    from sd_vae.losses.perceptual import Perceptual, build_perceptual
    from sd_vae.losses.reconstruction import reconstruction_loss

__getattr__, __dir__ = lazy_exports(__name__, _HOMES)
