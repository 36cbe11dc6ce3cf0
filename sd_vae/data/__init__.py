"""Pictures for training and for encoding: where they come from, what is cut from each, and in which order.

Importing this package is cheap: torch and datasets are imported when a name that needs them is first used.
"""

from typing import TYPE_CHECKING

from sd_vae._lazy import lazy_exports

__all__ = [
    "Batch",
    "DataConfig",
    "Decoded",
    "ImageSource",
    "Images",
    "Picture",
    "PictureTransform",
    "Record",
    "Records",
    "Reject",
    "TrainingSource",
    "View",
    "center_crop",
    "decode_picture",
    "decoder_versions",
    "epoch_permutation",
    "open_images",
    "open_records",
    "open_source",
    "open_training_source",
    "picture_loader",
    "posterior_noise",
    "prepare",
    "random_resized_crop",
    "sample_rng",
    "training_loader",
    "views",
]

_HOMES = {
    "Batch": "sd_vae.data.loader",
    "DataConfig": "sd_vae.data.config",
    "Decoded": "sd_vae.data.decoding",
    "ImageSource": "sd_vae.data.sources",
    "Images": "sd_vae.data.stream",
    "Picture": "sd_vae.data.pictures",
    "PictureTransform": "sd_vae.data.geometry",
    "Record": "sd_vae.data.records",
    "Records": "sd_vae.data.records",
    "Reject": "sd_vae.data.decoding",
    "TrainingSource": "sd_vae.data.stream",
    "View": "sd_vae.data.geometry",
    "center_crop": "sd_vae.data.transforms",
    "decode_picture": "sd_vae.data.decoding",
    "decoder_versions": "sd_vae.data.decoding",
    "epoch_permutation": "sd_vae.data.randomness",
    "open_images": "sd_vae.data.stream",
    "open_records": "sd_vae.data.records",
    "open_source": "sd_vae.data.sources",
    "open_training_source": "sd_vae.data.stream",
    "picture_loader": "sd_vae.data.pictures",
    "posterior_noise": "sd_vae.data.randomness",
    "prepare": "sd_vae.data.pictures",
    "random_resized_crop": "sd_vae.data.transforms",
    "sample_rng": "sd_vae.data.randomness",
    "training_loader": "sd_vae.data.loader",
    "views": "sd_vae.data.geometry",
}

if TYPE_CHECKING:
    from sd_vae.data.config import DataConfig
    from sd_vae.data.decoding import Decoded, Reject, decode_picture, decoder_versions
    from sd_vae.data.geometry import PictureTransform, View, views
    from sd_vae.data.loader import Batch, training_loader
    from sd_vae.data.pictures import Picture, picture_loader, prepare
    from sd_vae.data.randomness import epoch_permutation, posterior_noise, sample_rng
    from sd_vae.data.records import Record, Records, open_records
    from sd_vae.data.sources import ImageSource, open_source
    from sd_vae.data.stream import Images, TrainingSource, open_images, open_training_source
    from sd_vae.data.transforms import center_crop, random_resized_crop

__getattr__, __dir__ = lazy_exports(__name__, _HOMES)
