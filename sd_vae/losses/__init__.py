"""What a reconstruction is judged by in training: pixels, a perceptual distance, KL to the prior, a discriminator.

Importing this package is cheap: torch and the perceptual networks are imported when a name that needs them is first
used.
"""

from typing import TYPE_CHECKING

from sd_vae._lazy import lazy_exports

__all__ = [
    "AdversarialConfig",
    "EquivarianceConfig",
    "KLConfig",
    "LeCam",
    "LossConfig",
    "Objective",
    "ObjectiveResult",
    "OutputLogvar",
    "PatchDiscriminator",
    "Perceptual",
    "PerceptualConfig",
    "Similarity",
    "TilingConfig",
    "Window",
    "adaptive_weight",
    "adversarial_weight_at",
    "build_discriminator",
    "build_perceptual",
    "choose_net",
    "discriminator_loss",
    "draw_crop",
    "draw_similarity",
    "draw_tile",
    "equivariance_errors",
    "generator_loss",
    "kl_loss",
    "kl_weight_at",
    "reconstruction_loss",
    "require_cells",
    "tile_loss",
]

_HOMES = {
    "AdversarialConfig": "sd_vae.losses.config",
    "EquivarianceConfig": "sd_vae.losses.config",
    "KLConfig": "sd_vae.losses.config",
    "LeCam": "sd_vae.losses.adversarial",
    "LossConfig": "sd_vae.losses.config",
    "Objective": "sd_vae.losses.objective",
    "ObjectiveResult": "sd_vae.losses.objective",
    "OutputLogvar": "sd_vae.losses.reconstruction",
    "PatchDiscriminator": "sd_vae.losses.adversarial",
    "Perceptual": "sd_vae.losses.perceptual",
    "PerceptualConfig": "sd_vae.losses.config",
    "Similarity": "sd_vae.losses.equivariance",
    "TilingConfig": "sd_vae.losses.config",
    "Window": "sd_vae.losses.windows",
    "adaptive_weight": "sd_vae.losses.adversarial",
    "adversarial_weight_at": "sd_vae.losses.adversarial",
    "build_discriminator": "sd_vae.losses.adversarial",
    "build_perceptual": "sd_vae.losses.perceptual",
    "choose_net": "sd_vae.losses.perceptual",
    "discriminator_loss": "sd_vae.losses.adversarial",
    "draw_crop": "sd_vae.losses.windows",
    "draw_similarity": "sd_vae.losses.equivariance",
    "draw_tile": "sd_vae.losses.windows",
    "equivariance_errors": "sd_vae.losses.equivariance",
    "generator_loss": "sd_vae.losses.adversarial",
    "kl_loss": "sd_vae.losses.kl",
    "kl_weight_at": "sd_vae.losses.kl",
    "reconstruction_loss": "sd_vae.losses.reconstruction",
    "require_cells": "sd_vae.losses.windows",
    "tile_loss": "sd_vae.losses.windows",
}

if TYPE_CHECKING:
    from sd_vae.losses.adversarial import (
        LeCam,
        PatchDiscriminator,
        adaptive_weight,
        adversarial_weight_at,
        build_discriminator,
        discriminator_loss,
        generator_loss,
    )
    from sd_vae.losses.config import (
        AdversarialConfig,
        EquivarianceConfig,
        KLConfig,
        LossConfig,
        PerceptualConfig,
        TilingConfig,
    )
    from sd_vae.losses.equivariance import Similarity, draw_similarity, equivariance_errors
    from sd_vae.losses.kl import kl_loss, kl_weight_at
    from sd_vae.losses.objective import Objective, ObjectiveResult
    from sd_vae.losses.perceptual import Perceptual, build_perceptual, choose_net
    from sd_vae.losses.reconstruction import OutputLogvar, reconstruction_loss
    from sd_vae.losses.windows import Window, draw_crop, draw_tile, require_cells, tile_loss

__getattr__, __dir__ = lazy_exports(__name__, _HOMES)
