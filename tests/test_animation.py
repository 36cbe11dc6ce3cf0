"""Films run there and back, in every format, and an MP4 without PyAV says what to do."""

import sys
from pathlib import Path

import pytest
from PIL import Image

from sd_vae.animation import save_film
from sd_vae.errors import UserError

PICTURES = [Image.new("RGB", (33, 21), colour) for colour in ("red", "lime", "blue")]


@pytest.mark.parametrize("suffix", [".gif", ".webp"])
def test_film_runs_there_and_back(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"film{suffix}"

    save_film(path, PICTURES, fps=10)

    with Image.open(path) as film:
        colours = []
        for frame in range(film.n_frames):
            film.seek(frame)
            colours.append(film.convert("RGB").getpixel((5, 5)))
        assert film.size == (33, 21)
        assert film.info["loop"] == 0
        assert film.info["duration"] == 100
    strongest = [max(range(3), key=colour.__getitem__) for colour in colours]
    assert strongest == [0, 1, 2, 1]


def test_mp4_has_even_sides(tmp_path: Path) -> None:
    av = pytest.importorskip("av")

    save_film(tmp_path / "film.mp4", PICTURES, fps=10)

    with av.open(str(tmp_path / "film.mp4")) as film:
        frames = [frame.to_image() for frame in film.decode(video=0)]
        assert film.streams.video[0].average_rate == 10
    assert [frame.size for frame in frames] == [(32, 20)] * 4
    strongest = [max(range(3), key=frame.getpixel((5, 5)).__getitem__) for frame in frames]
    assert strongest == [0, 1, 2, 1]


def test_one_picture_is_a_film(tmp_path: Path) -> None:
    save_film(tmp_path / "film.gif", PICTURES[:1])

    assert (tmp_path / "film.gif").exists()


def test_mp4_without_pyav_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)

    with pytest.raises(UserError, match=r'needs PyAV, .*pip install "sd-vae\[video\]", or write .gif or .webp'):
        save_film(tmp_path / "film.mp4", PICTURES)


def test_other_endings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"film.avi does not end like a film; choose one of: .gif, .webp, .mp4"):
        save_film(tmp_path / "film.avi", PICTURES)


@pytest.mark.parametrize("fps", [0, 51])
def test_other_paces_are_refused(fps: int, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"fps is {fps}, it must be from 1 to 50"):
        save_film(tmp_path / "film.gif", PICTURES, fps=fps)
