"""A folder of small photos, the config of a run that takes seconds, and what may happen to a run."""

import dataclasses
import io
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image
from safetensors.torch import load_file

from sd_vae.autoencoder import AutoencoderKL
from sd_vae.data.config import DataConfig
from sd_vae.losses.config import KLConfig, LossConfig, PerceptualConfig
from training.config import ModelConfig, OptimConfig, TrainConfig, save_recipe
from training.records import read_metrics

ConfigMaker = Callable[..., TrainConfig]

RATES = ("images_per_s", "tflops_per_s", "mfu")
"""What differs between two runs that are the same."""


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


@pytest.fixture
def tars(tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two tars of three photos; their index is kept in the test's own folder, also by processes that it starts."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    place = tmp_path / "tars"
    place.mkdir()
    for number in range(2):
        with tarfile.open(place / f"{number}.tar", "w") as archive:
            for index in range(3 * number, 3 * number + 3):
                content = (photos / f"{index}.png").read_bytes()
                info = tarfile.TarInfo(f"{index}.png")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return place


@pytest.fixture
def run_until_kill_9(tmp_path: Path) -> Callable[[TrainConfig, int], None]:
    """Return a function that runs a config in processes of its own and kills them all after a checkpoint."""

    def run(config: TrainConfig, step: int) -> None:
        save_recipe(config, tmp_path / "recipe.yaml")
        command = [sys.executable, "-m", "training", "--config", str(tmp_path / "recipe.yaml")]
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        checkpoint = Path(config.out) / "checkpoints" / f"step-{step:07d}"
        while not checkpoint.exists() and process.poll() is None:
            time.sleep(0.002)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert checkpoint.exists(), "the run ended early"
        assert not (Path(config.out) / "report.json").exists(), "the run ended before it was killed"

    return run


@pytest.fixture
def assert_same_run() -> Callable[[Path, Path], None]:
    """Return a check that two runs are bit for bit the same: networks, optimizers, schedules, every logged number."""

    def check(one: Path, other: Path) -> None:
        ours, theirs = (_last_checkpoint(folder) for folder in (one, other))
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            assert torch.equal(value, theirs[name]) if torch.is_tensor(value) else value == theirs[name], name
        assert _rows(one) == _rows(other)

    return check


def _last_checkpoint(folder: Path) -> dict[str, Any]:
    """Every tensor and number of the newest checkpoint, by file and name."""
    last = folder / "checkpoints" / "last"
    found: dict[str, Any] = {}
    for file in last.glob("*.safetensors"):
        found |= {f"{file.stem}.{name}": value for name, value in load_file(file).items()}
    return found | dict(_leaves("optimizer", torch.load(last / "optimizer.pt", weights_only=True)))


def _leaves(name: str, value: Any) -> Any:
    """The leaves of nested containers with their names."""
    if isinstance(value, dict | list | tuple):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _leaves(f"{name}.{key}", item)
    else:
        yield name, value


def _rows(folder: Path) -> list[dict[str, float]]:
    """The rows of a run's metrics without what a clock says."""
    rows = read_metrics(folder / "metrics.jsonl")
    return [{key: value for key, value in row.items() if key not in RATES} for row in rows]
