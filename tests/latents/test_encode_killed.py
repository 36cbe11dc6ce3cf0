"""Encoding that is killed with SIGKILL at one step or another, and goes on."""

import os
import subprocess
import sys
from pathlib import Path

import encode_killed
import numpy as np
import pytest
from PIL import Image
from synthetic_store import contents

from sd_vae.autoencoder import AutoencoderKL
from sd_vae.data import open_records
from sd_vae.latents.encode import encode

NUM_PHOTOS = 10


@pytest.fixture
def root(tmp_path: Path, tiny_vae: AutoencoderKL) -> Path:
    """Ten photos, the sixth of which is none, and their stores as killed processes left them."""
    if not hasattr(os, "fork"):
        pytest.skip("needs os.fork to kill a process many times")
    for name in ("photos", "stores"):
        (tmp_path / name).mkdir()
    for number in range(NUM_PHOTOS):
        noise = np.random.default_rng(number).integers(0, 256, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / "photos" / f"{number}.png")
    (tmp_path / "photos" / "5.png").write_text("no picture")
    tiny_vae.save_pretrained(tmp_path / "vae")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, encode_killed.__file__, tmp_path], check=True, env=environment, timeout=200)
    return tmp_path


@pytest.mark.slow  # 40 s: some forty processes are killed
def test_encode_goes_on_to_the_same_bytes_wherever_it_was_killed(root: Path, tiny_vae: AutoencoderKL) -> None:
    records, undisturbed = open_records(str(root / "photos")), contents(root / "stores" / "0")
    killed = sorted((root / "stores").iterdir(), key=lambda folder: int(folder.name))[1:-1]
    assert len(killed) > 20

    for folder in killed:
        num_encoded = len((root / f"{folder.name}.txt").read_text().splitlines())
        done = encode(tiny_vae, records, folder, encode_killed.CONFIG)

        assert contents(folder) == undisturbed, f"killed at step {folder.name}"
        # A shard is finished when the first picture of the next has come, and two more may be on their way by then.
        num_repeated = num_encoded + done.num_done - NUM_PHOTOS
        assert num_repeated <= encode_killed.CONFIG.shard_items + 3, f"killed at step {folder.name}"
