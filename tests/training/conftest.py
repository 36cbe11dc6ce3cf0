"""A folder of small photos and the config of a run that takes seconds."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import skimage.data
from PIL import Image

from sd_vae.autoencoder import AutoencoderKL
from sd_vae.data.config import DataConfig
from sd_vae.losses.config import KLConfig, LossConfig, PerceptualConfig
from training.config import ModelConfig, OptimConfig, TrainConfig

ConfigMaker = Callable[..., TrainConfig]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Six 40x48 cut-outs of the astronaut."""
    folder = tmp_path / "photos"
    folder.mkdir()
    astronaut = skimage.data.astronaut()
    for index in range(6):
        pixels = np.ascontiguousarray(astronaut[60 * index : 60 * index + 40, 100:148])
        Image.fromarray(pixels).save(folder / f"{index}.png")
    return folder


@pytest.fixture
def make_config(tmp_path: Path, photos: Path, tiny_vae: AutoencoderKL) -> ConfigMaker:
    """Return a function that makes a config: four steps from the tiny VAE's weights, with changes by section."""
    start = tmp_path / "start"
    tiny_vae.save_pretrained(start)

    def make(name: str = "run", **changes: Any) -> TrainConfig:
        sections = {key: changes.pop(key, {}) for key in ("model", "data", "loss", "optim", "report", "speed")}
        config = TrainConfig(
            out=str(tmp_path / name),
            steps=4,
            batch_size=2,
            ema_decay=0.9,
            log_every=1,
            validate_every=2,
            checkpoint_every=2,
            num_validation_images=2,
            tensorboard=False,
            model=ModelConfig(pretrained=str(start)),
            data=DataConfig(train=str(photos), validation=str(photos), size=16, num_workers=0),
            loss=LossConfig(perceptual=PerceptualConfig(weight=0.0), kl=KLConfig(weight=1e-6)),
            optim=OptimConfig(lr=1e-3, warmup_steps=1, schedule="cosine"),
        )
        replaced = {key: dataclasses.replace(getattr(config, key), **values) for key, values in sections.items()}
        return dataclasses.replace(config, **replaced, **changes)

    return make
