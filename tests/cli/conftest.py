"""A workplace: a tiny VAE, photos, things that are none, and a recipe of three steps, as the current directory."""

from pathlib import Path

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image

from sd_vae.autoencoder import AutoencoderKL

RECIPE = """\
steps: 3
batch_size: 2
log_every: 1
checkpoint_every: 2
validate_every: 2
tensorboard: false
model: {pretrained: start}
data: {train: photos, size: 16, num_workers: 0}
loss: {perceptual: {weight: 0.0}}
"""


@pytest.fixture
def place(tmp_path: Path, tiny_vae: AutoencoderKL, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Current directory with start, nan, photos, texts, empty, unreadable, mixed, note.txt and r.yaml."""
    monkeypatch.chdir(tmp_path)
    tiny_vae.save_pretrained("start")
    torch.nn.init.constant_(tiny_vae.quant_conv.bias, float("nan"))
    tiny_vae.save_pretrained("nan")
    for name in ("photos", "texts", "empty", "unreadable", "mixed"):
        Path(name).mkdir()
    astronaut = skimage.data.astronaut()
    for index in range(4):
        pixels = np.ascontiguousarray(astronaut[60 * index : 60 * index + 40, 100:148])
        Image.fromarray(pixels).save(f"photos/{index}.png")
    Image.fromarray(pixels).save("mixed/1.png")
    for name in ("texts/a.txt", "unreadable/0.png", "mixed/0.png", "note.txt"):
        Path(name).write_text("no picture")
    Path("r.yaml").write_text(RECIPE)
    return tmp_path
