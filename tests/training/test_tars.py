"""A run on WebDataset tars, killed and resumed, is bit for bit the run that was not."""

import io
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from safetensors.torch import load_file

from training import resume, train
from training.config import save_recipe


@pytest.fixture
def tars(tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two tars of three photos; their index is kept in the test's own folder."""
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


def test_resume_on_tars_after_kill_9_is_bit_identical(make_config: Any, tmp_path: Path, tars: Path) -> None:
    settings: dict[str, Any] = {
        "steps": 8,
        "data": {"train": str(tars), "num_workers": 1, "shuffle_window": 2},
    }
    whole = train(make_config("whole", **settings))
    config = make_config("parts", **settings)
    save_recipe(config, tmp_path / "recipe.yaml")
    command = [sys.executable, "-m", "training", "--config", str(tmp_path / "recipe.yaml")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    first = Path(config.out) / "checkpoints" / "step-0000002"
    while not first.exists() and process.poll() is None:
        time.sleep(0.002)

    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (Path(config.out) / "report.json").exists(), "the run ended before it was killed"
    parts = resume(config.out)

    for name in ("model", "ema"):
        ours, theirs = (
            load_file(run.folder / "checkpoints" / "last" / f"{name}.safetensors") for run in (whole, parts)
        )
        assert all(torch.equal(value, theirs[key]) for key, value in ours.items())
