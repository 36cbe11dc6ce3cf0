"""`sd-vae demo`: the folder that it makes, the photos that it writes, and once, slowly, everything."""

import json
from pathlib import Path

import pytest

from sd_vae.cli import main
from sd_vae.cli.demo import HELD_OUT, _prepare_folder, _write_photos
from sd_vae.images import open_image


def test_demo_replaces_an_earlier_demo_when_told(tmp_path: Path) -> None:
    (tmp_path / "d" / "run").mkdir(parents=True)
    (tmp_path / "d" / "report.json").touch()

    _prepare_folder(tmp_path / "d", overwrite=True)

    assert list((tmp_path / "d").iterdir()) == []


def test_demo_replaces_a_demo_that_was_interrupted(tmp_path: Path) -> None:
    (tmp_path / "d" / ".photos.abc.tmp").mkdir(parents=True)

    _prepare_folder(tmp_path / "d", overwrite=True)

    assert list((tmp_path / "d").iterdir()) == []


def test_demo_makes_its_folder_and_those_above(tmp_path: Path) -> None:
    _prepare_folder(tmp_path / "a" / "d", overwrite=False)

    assert (tmp_path / "a" / "d").is_dir()


def test_demo_trains_on_no_photo_that_it_holds_out(tmp_path: Path) -> None:
    _write_photos(tmp_path / "photos")

    written = {
        folder: {path.stem for path in (tmp_path / "photos" / folder).iterdir()} for folder in ("train", "held_out")
    }
    assert written["held_out"] == set(HELD_OUT)
    assert len(written["train"]) == 6
    assert not written["train"] & written["held_out"]
    assert open_image(tmp_path / "photos" / "held_out" / "chelsea.png").size == (451, 300)


def test_demo_interrupted_while_writing_photos_leaves_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("PIL.Image.Image.save", interrupt)

    assert main(["demo", "--out", str(tmp_path / "d")]) == 130
    assert list((tmp_path / "d").iterdir()) == []


@pytest.mark.slow
def test_demo_of_one_step_runs_to_its_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["demo", "--out", str(tmp_path / "d"), "--steps", "1", "--json"])

    report = json.loads(capsys.readouterr().out)
    assert code == 0
    assert report == json.loads((tmp_path / "d" / "report.json").read_text())
    rows = [row["name"] for row in report["evaluation"]["rows"]]
    assert rows[:2] == ["mini", "fine-tuned"]
    assert "<html" in (tmp_path / "d" / "report.html").read_text()
    assert (tmp_path / "d" / "run" / "vae" / "config.json").is_file()
