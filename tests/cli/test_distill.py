"""`sd-vae distill`: a student's folder that others open."""

import json
from pathlib import Path

import pytest
from diffusers import AutoencoderTiny
from PIL import Image

from sd_vae.cli import main
from sd_vae.latents import distillation

SHORT = ["--steps", "2", "--batch-size", "2", "--size", "16", "--num-workers", "0"]


def test_distill_writes_what_diffusers_opens(place, capsys) -> None:
    assert main(["distill", "start", "--data", "photos", "--out", "student", *SHORT, "--json"]) == 0

    report = json.loads(capsys.readouterr().out)
    student = AutoencoderTiny.from_pretrained("student")
    assert student.config.decoder_block_out_channels == [64, 64]
    assert report["steps"] == 2
    assert report["measured_on"] == "training pictures"
    assert {"student_to_vae_psnr_db", "student_psnr_db", "vae_psnr_db", "decoder", "encoder"} <= set(report)
    assert "has factor 8, this VAE has 2" in report["comfyui"]
    with Image.open("student/comparison.jpg") as sheet:
        assert sheet.width > sheet.height / 2


def test_distill_goes_on_from_a_student(place) -> None:
    main(["distill", "start", "--data", "photos", "--out", "student", *SHORT])

    assert main(["distill", "start", "--data", "photos", "--start", "student", "--out", "next", *SHORT]) == 0
    assert main(["distill", "start", "--data", "photos", "--start", "start", "--out", "other", *SHORT]) == 2


def test_interrupted_distill_saves_what_was_learned(place, capsys, monkeypatch) -> None:
    def interrupted(*arguments, progress, **options):
        progress(distillation.Step(1, {"encoder": 1.0, "decoder": 1.0}))
        raise KeyboardInterrupt

    monkeypatch.setattr(distillation, "distill", interrupted)

    assert main(["distill", "start", "--data", "photos", "--out", "student", *SHORT]) == 130

    assert "stopped after 1 steps; what was learned is in student" in capsys.readouterr().err
    assert Path("student/config.json").is_file()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--size", "15"], "--size is 15, it must be a multiple of the VAE's factor, 2"),
        (["--steps", "0"], "steps is 0"),
        (["--batch-size", "0"], "--batch-size is 0"),
        (["--data", "texts"], "texts"),
        (["--start", "nowhere"], "nowhere"),
        (["--start", "start"], "start holds a AutoencoderKL, --start takes an AutoencoderTiny"),
    ],
)
def test_wrong_arguments_are_one_line(place, capsys, arguments, words) -> None:
    given = {"--data": "photos", "--out": "o", **dict(zip(SHORT[::2], SHORT[1::2], strict=True))}
    given |= dict(zip(arguments[::2], arguments[1::2], strict=True))

    assert main(["distill", "start", *(part for pair in given.items() for part in pair)]) == 2

    error = capsys.readouterr().err
    assert words in error
    assert len([line for line in error.splitlines() if line.startswith("error:")]) == 1
    assert not Path("o").exists()
