"""Small real picture files of several kinds."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


def picture(number: int, width: int = 40, height: int = 32) -> Image.Image:
    """Noise that tells pictures apart."""
    noise = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def png(number: int) -> bytes:
    file = io.BytesIO()
    picture(number).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Seven pictures, one of them in a folder below."""
    place = tmp_path / "photos"
    (place / "below").mkdir(parents=True)
    for number in range(7):
        (place / ("below" if number == 3 else "") / f"{number}.png").write_bytes(png(number))
    return place


@pytest.fixture
def encoded() -> list[bytes]:
    """Five PNG files as bytes."""
    return [png(number) for number in range(5)]


@pytest.fixture(autouse=True)
def private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep what `datasets` caches inside the test's own folder."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets-cache")
