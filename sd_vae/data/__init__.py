"""Pictures for training: where they come from, the crop of each, and an order that can be resumed anywhere.

Importing this package is cheap: torch and datasets are imported when a name that needs them is first used.
"""

from typing import TYPE_CHECKING

from sd_vae._lazy import lazy_exports

__all__ = [
    "Batch",
    "DataConfig",
    "ImageSource",
    "center_crop",
    "epoch_permutation",
    "open_source",
    "posterior_noise",
    "random_resized_crop",
    "sample_rng",
    "training_loader",
]

_HOMES = {
    "Batch": "sd_vae.data.loader",
    "DataConfig": "sd_vae.data.config",
    "ImageSource": "sd_vae.data.sources",
    "center_crop": "sd_vae.data.transforms",
    "epoch_permutation": "sd_vae.data.randomness",
    "open_source": "sd_vae.data.sources",
    "posterior_noise": "sd_vae.data.randomness",
    "random_resized_crop": "sd_vae.data.transforms",
    "sample_rng": "sd_vae.data.randomness",
    "training_loader": "sd_vae.data.loader",
}

if TYPE_CHECKING:
    from sd_vae.data.config import DataConfig
    from sd_vae.data.loader import Batch, training_loader
    from sd_vae.data.randomness import epoch_permutation, posterior_noise, sample_rng
    from sd_vae.data.sources import ImageSource, open_source
    from sd_vae.data.transforms import center_crop, random_resized_crop

__getattr__, __dir__ = lazy_exports(__name__, _HOMES)
