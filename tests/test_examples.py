"""The examples run."""

import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sd_vae.autoencoder import AutoencoderKL
from sd_vae.cli import main

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_train_on_latents_draws_a_row_of_pictures_a_class(
    tmp_path: Path, tiny_vae: AutoencoderKL, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_vae.save_pretrained("vae")
    for label, level in (("dark", 40), ("light", 200)):
        Path("photos", label).mkdir(parents=True)
        for number in range(3):
            Image.fromarray(np.full((16, 16, 3), level + number, np.uint8)).save(f"photos/{label}/{number}.png")
    assert main(["encode", "vae", "photos", "--out", "store", "--size", "16", "--workers", "0"]) == 0
    command = "example store vae --out grid.png --steps 2 --batch-size 2 --width 32 --samples-per-class 3"
    monkeypatch.setattr(sys, "argv", command.split())

    runpy.run_path(str(EXAMPLES / "train_on_latents.py"), run_name="__main__")

    with Image.open("grid.png") as grid:
        assert grid.size == (3 * 16 + 2 * 4, 2 * 16 + 4)
    assert "a row each of dark, light" in capsys.readouterr().out


def test_train_on_latents_is_about_sixty_lines() -> None:
    lines = (EXAMPLES / "train_on_latents.py").read_text().split('"""', 2)[2].splitlines()

    assert sum(bool(line.strip()) for line in lines) <= 60
