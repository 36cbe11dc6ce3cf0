"""`sd-vae anomaly`: fitted to crops of a photo, tried on crops with and without defects."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image
from safetensors.torch import load_file

from sd_vae.cli import main
from sd_vae.images import open_image

SIDE = 24
QUICK = ("--size", SIDE, "--workers", 0, "--device", "cpu")


def anomaly(*arguments):
    return main(["anomaly", *map(str, arguments)])


def write_crops(folder, count, *, seed, spoil=lambda pixels: pixels):
    folder.mkdir(parents=True)
    photo, rng = skimage.data.astronaut(), np.random.default_rng(seed)
    for index in range(count):
        top, left = rng.integers(0, 512 - SIDE, 2)
        pixels = photo[top : top + SIDE, left : left + SIDE].copy()
        Image.fromarray(spoil(pixels)).save(folder / f"{index}.png")


def with_hole(pixels):
    pixels[6:14, 6:14] = (255, 0, 255)
    return pixels


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """A folder with vae, normal pictures, a detector of them, and labelled pictures."""
    from sd_vae.autoencoder import AutoencoderKL

    place = tmp_path_factory.mktemp("anomaly")
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
    )
    vae.save_pretrained(place / "vae")
    write_crops(place / "normal", 44, seed=0)
    write_crops(place / "test" / "good", 5, seed=1)
    write_crops(place / "test" / "hole", 5, seed=2, spoil=with_hole)
    options = ("--steps", 2, "--false-alarm-rate", 0.1)
    code = anomaly("fit", place / "vae", place / "normal", "--out", place / "m.safetensors", *QUICK, *options)
    assert code == 0
    return place


def score(fitted, out, *arguments, data="test"):
    rate = () if "--false-alarm-rate" in arguments else ("--false-alarm-rate", 0.1)
    return anomaly("score", fitted / "m.safetensors", fitted / data, "--out", out, "--workers", 0, *rate, *arguments)


def test_fit_prints_its_thresholds(fitted, tmp_path, capsys):
    code = anomaly(
        "fit", fitted / "vae", fitted / "normal", "--out", tmp_path / "m.safetensors", *QUICK, "--steps", 0,
        "--false-alarm-rate", 0.1, "--json",
    )  # fmt: skip

    found = json.loads(capsys.readouterr().out)
    assert code == 0
    assert found["num_normal"] == 44
    assert found["num_calibrated"] == 11
    assert list(found["thresholds"]) == ["joint", "elbo", "pooled", "local", "structure", "pixel"]
    assert found["thresholds"]["joint"]["wanted_rate"] == 0.1


def test_fit_gives_the_same_detector_again(fitted, tmp_path):
    options = ("--steps", 2, "--false-alarm-rate", 0.1)

    anomaly("fit", fitted / "vae", fitted / "normal", "--out", tmp_path / "m.safetensors", *QUICK, *options)

    one, again = (load_file(folder / "m.safetensors") for folder in (fitted, tmp_path))
    assert all(torch.equal(tensor, again[name]) for name, tensor in one.items())


def test_fit_says_before_the_work_that_pictures_are_too_few(fitted, tmp_path, capsys):
    code = anomaly(
        "fit", fitted / "vae", fitted / "normal", "--out", tmp_path / "m", *QUICK, "--false-alarm-rate", 0.01
    )

    assert code == 2
    assert "11 normal pictures cannot show a false-alarm rate of 0.01; give at least 99" in capsys.readouterr().err
    assert not (tmp_path / "m").exists()


def test_fit_replaces_a_file_only_when_told(fitted, capsys):
    before = (fitted / "m.safetensors").read_bytes()

    code = anomaly("fit", fitted / "vae", fitted / "normal", "--out", fitted / "m.safetensors", *QUICK)

    assert code == 2
    assert "pass --overwrite" in capsys.readouterr().err
    assert (fitted / "m.safetensors").read_bytes() == before


def test_fit_refuses_weights_of_no_network(fitted, tmp_path, capsys):
    code = anomaly(
        "fit", fitted / "vae", fitted / "normal", "--out", tmp_path / "m", *QUICK, "--perceptual-backbone", "alex.pth"
    )

    assert code == 2
    assert "alex.pth, but no LPIPS network" in capsys.readouterr().err


def test_fit_leaves_out_what_it_cannot_read(fitted, tmp_path, capsys):
    shutil.copytree(fitted / "normal", tmp_path / "mixed")
    (tmp_path / "mixed" / "broken.png").write_text("no picture")
    options = ("--steps", 0, "--false-alarm-rate", 0.1, "--out", tmp_path / "m")

    assert anomaly("fit", fitted / "vae", tmp_path / "mixed", *QUICK, *options) == 0
    assert "broken.png, not-a-picture" in capsys.readouterr().err
    assert anomaly("fit", fitted / "vae", tmp_path / "mixed", *QUICK, *options, "--overwrite", "--strict") == 2
    assert "broken.png cannot be used, not-a-picture" in capsys.readouterr().err


def test_score_writes_report_scores_and_heat_maps(fitted, tmp_path, capsys):
    code = score(fitted, tmp_path / "out", "--maps", "all")

    assert code == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "maps",
        "report.html",
        "scores.csv",
        "scores.json",
    ]
    assert open_image(tmp_path / "out" / "maps" / "hole_3.png").size == (2 * SIDE + 8, SIDE)
    rows = list(csv.DictReader((tmp_path / "out" / "scores.csv").read_text().splitlines()))
    assert [row["picture"] for row in rows][:2] == ["good/0.png", "good/1.png"]
    assert {row["label"] for row in rows} == {"good", "hole"}
    assert "AUROC against normal pictures" in capsys.readouterr().out


def test_score_measures_labelled_pictures(fitted, tmp_path, capsys):
    score(fitted, tmp_path / "out", "--json")

    found = json.loads(capsys.readouterr().out)
    assert list(found["detection"]) == ["hole"]
    assert list(found["detection"]["hole"])[-1] == "pixel variance"
    assert found["detection"]["hole"]["joint"]["num_abnormal"] == 5
    assert 0 <= found["detection"]["hole"]["joint"]["auroc"]["value"] <= 1
    assert [one["alarm"] for one in found["pictures"]] == [
        one["scores"]["learned"] > found["thresholds"]["learned"]["score"]["value"] for one in found["pictures"]
    ]


def test_score_writes_maps_of_alarms_alone(fitted, tmp_path, capsys):
    score(fitted, tmp_path / "out", "--false-alarm-rate", 0.5, "--json", "--by", "pooled")

    alarms = [one["name"] for one in json.loads(capsys.readouterr().out)["pictures"] if one["alarm"]]
    written = {path.name for path in (tmp_path / "out").glob("maps/*")}
    assert 0 < len(alarms) < 10
    assert written == {name.replace("/", "_") for name in alarms}


def test_score_goes_without_labels(fitted, tmp_path, capsys):
    code = score(fitted, tmp_path / "out", "--json", data="normal")

    assert code == 0
    assert json.loads(capsys.readouterr().out)["detection"] == {}


def test_score_is_the_same_again(fitted, tmp_path):
    for name in ("one", "two"):
        score(fitted, tmp_path / name)

    for file in ("report.html", "scores.json", "scores.csv"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def _another_vae(fitted, tmp_path):
    from sd_vae import load_vae

    vae = load_vae(str(fitted / "vae"))
    vae.decoder.conv_out.bias.data += 1.0
    vae.save_pretrained(tmp_path / "other")
    return ["--vae", tmp_path / "other"]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (lambda fitted, tmp_path: ["--normal", "fine"], "'good', 'hole', none of which is normal (fine)"),
        (lambda fitted, tmp_path: ["--by", "luck"], "has no score 'luck'; choose one of: learned, lines, blur"),
        (lambda fitted, tmp_path: ["--by", "lpips"], "has no score 'lpips'"),
        (lambda fitted, tmp_path: ["--vae", tmp_path / "gone"], "gone"),
        (_another_vae, "was fitted with a VAE of fingerprint"),
        (lambda fitted, tmp_path: ["--false-alarm-rate", 0.001], "give at least 999"),
    ],
)
def test_score_refuses_in_one_line(fitted, tmp_path, capsys, arguments, complaint):
    code = score(fitted, tmp_path / "out", *arguments(fitted, tmp_path))

    assert code == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("error: ")
    assert complaint in line
    assert not (tmp_path / "out").exists()


def test_score_says_where_the_vae_was(fitted, tmp_path, capsys):
    shutil.move(fitted / "vae", tmp_path / "vae")
    try:
        away = score(fitted, tmp_path / "out"), capsys.readouterr().err
        named = score(fitted, tmp_path / "out", "--vae", tmp_path / "vae")
    finally:
        shutil.move(tmp_path / "vae", fitted / "vae")

    assert away[0] == 2
    assert "Name its place by --vae." in away[1]
    assert named == 0


def test_score_of_a_folder_without_a_usable_picture_is_refused(fitted, tmp_path, capsys):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "0.png").write_text("no picture")

    code = score(fitted, tmp_path / "out", data=tmp_path / "bad")

    assert code == 2
    assert "holds no picture that can be scored" in capsys.readouterr().err


def test_score_replaces_only_what_it_wrote(fitted, tmp_path, capsys):
    Path(tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("old")

    assert score(fitted, tmp_path / "out", "--overwrite") == 2
    assert "is not a folder of anomaly scores (it holds thesis.tex)" in capsys.readouterr().err


@pytest.mark.parametrize(("arguments", "code"), [([], 0), (["--help"], 0), (["guess"], 2)])
def test_anomaly_lists_its_actions(arguments, code, capsys):
    assert anomaly(*arguments) == code
    said = capsys.readouterr()
    assert all(word in said.out + said.err for word in ("fit", "score"))
