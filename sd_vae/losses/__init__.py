"""What a reconstruction is judged by in training: pixels, a perceptual distance, and KL to the prior.

Importing this package is cheap: torch and the perceptual networks are imported when a name that needs them is first
used.
"""

import importlib
from typing import TYPE_CHECKING, Any

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


def __getattr__(name: str) -> Any:
    """Import a public name on first use."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
