"""The benchmark of `sd-vae anomaly`: its photos, its table and its picture; the figures themselves take minutes."""

from pathlib import Path

import numpy as np
import skimage.data
from PIL import Image

from benchmarks.anomaly import SCORE, alarm_rates, make_photos, sheet, table, to_figures
from benchmarks.anomaly_defects import DEFECTS, make_defect
from benchmarks.mini_data import is_held_out

PHOTO, DONOR = skimage.data.astronaut()[100:228, 100:228], skimage.data.coffee()[100:228, 100:228]


def test_each_kind_of_defect_has_a_score_that_is_to_find_it() -> None:
    assert SCORE.keys() == DEFECTS.keys()


def test_defects_follow_from_their_seed_and_patches_are_small() -> None:
    for kind in DEFECTS:
        one, again, other = (make_defect(kind, PHOTO, DONOR, seed) for seed in (1, 1, 2))
        changed = (np.abs(one.astype(int) - PHOTO) > 0).any(axis=2).mean()

        assert (one == again).all()
        assert (one != other).any()
        if kind.endswith("_patch"):
            assert 0.005 < changed < 1.6 / 16  # a sixteenth, and its soft edge


def test_photos_are_held_out_by_their_names(tmp_path: Path) -> None:
    names = [f"{index}.png" for index in range(100)]
    (tmp_path / "photos" / "feedme").mkdir(parents=True)
    for name in names:
        Image.fromarray(PHOTO).save(tmp_path / "photos" / "feedme" / name)
    held_out = {f"feedme_{name}" for name in names if is_held_out(f"feedme/{name}")}

    make_photos(tmp_path / "photos", tmp_path / "work", size=32, limit=5, kinds=["blur"])

    def written(*parts: str) -> set[str]:
        return {path.name for path in tmp_path.joinpath("work", *parts).iterdir()}

    assert len(held_out) > 1
    assert written("defects", "good") == written("defects", "blur") == held_out
    assert len(written("normal")) == 5
    assert not written("normal") & held_out


def test_table_has_a_line_a_score_and_a_column_a_kind() -> None:
    auroc = {"value": 0.912, "low": 0.84, "high": 0.96}

    assert table({"blur": {"joint": auroc}, "noise": {"joint": auroc, "patch": auroc}}) == [
        "| score | blur | noise |",
        "|---|---|---|",
        "| joint | 0.912 (0.84 to 0.96) | 0.912 (0.84 to 0.96) |",
        "| patch | - | 0.912 (0.84 to 0.96) |",
    ]


def test_alarm_rates_are_by_label() -> None:
    pictures = [{"label": "good", "alarm": index == 0} for index in range(4)] + [{"label": "blur", "alarm": True}]

    assert alarm_rates(pictures) == {"good": 0.25, "blur": 1.0}


def test_sheet_has_each_picture_above_its_heat_map(tmp_path: Path) -> None:
    for kind, grey in (("blur", 40), ("noise_patch", 80)):
        for name in ("a", "b", "c"):
            strip = np.zeros((64, 136, 3), np.uint8)
            strip[:, :64], strip[:, 72:] = grey, grey + 100
            Image.fromarray(strip).save(tmp_path / f"{kind}_{name}.png")

    pixels = np.asarray(sheet(tmp_path, ["blur", "noise_patch"]).convert("L"))

    levels = [pixels[row, column] for row in (32, 100, 170, 240) for column in (32, pixels.shape[1] - 32)]
    assert levels == [40, 80, 140, 180] * 2


def test_a_defect_is_judged_by_the_score_of_its_kind() -> None:
    def aurocs(value: float) -> dict[str, dict[str, dict[str, float]]]:
        names = ("learned", "lines", "blur", "noise", "patch", "pixel variance")
        return {name: {"auroc": {"value": value if name == "lines" else 0.95}} for name in names}

    figures = to_figures({"detection": {kind: aurocs(0.5) for kind in DEFECTS}})

    assert [figure.verdict for figure in figures] == ["MISSED", "met", "met", "met", "met"]
    assert figures[0].note == "by lines; learned 0.950, pixel variance 0.950"
