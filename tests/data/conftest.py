"""Small real picture files of several kinds."""

import io
import itertools
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from stream_cases import grey_png, write_tar


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


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    """Three tars with 3, 4 and 2 pictures; picture n is of grey n, and each has a text beside it."""
    place = tmp_path / "tars"
    place.mkdir()
    numbers = iter(range(9))
    for tar, size in enumerate((3, 4, 2)):
        names = [(n, kind) for n in itertools.islice(numbers, size) for kind in ("png", "txt")]
        members = [(f"{n:03d}.{kind}", grey_png(n) if kind == "png" else b"text") for n, kind in names]
        write_tar(place / f"{tar:02d}.tar", members)
    return place
