"""The trainer: what a run leaves behind, exact resume, and what it refuses."""

import dataclasses
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from sd_vae.checkpoints import load_vae
from sd_vae.errors import UserError
from training import resume, train
from training.config import save_recipe
from training.records import read_metrics
from training.trainer import Trainer


def weights(folder: Path, name: str = "model") -> dict[str, torch.Tensor]:
    return load_file(folder / "checkpoints" / "last" / f"{name}.safetensors")


def test_train_leaves_the_promised_run_folder(make_config: Any) -> None:
    result = train(make_config(tensorboard=True))

    names = {path.name for path in result.folder.iterdir()}
    assert names == {"config.yaml", "metrics.jsonl", "samples", "checkpoints", "vae", "report.json", "tensorboard"}
    assert sorted(p.name for p in (result.folder / "samples").iterdir()) == ["step-0000002.png", "step-0000004.png"]
    assert json.loads((result.folder / "report.json").read_text())["step"] == 4
    assert list((result.folder / "tensorboard").iterdir())


def test_trained_vae_is_the_average_and_opens_in_diffusers(make_config: Any) -> None:
    result = train(make_config())

    vae = diffusers.AutoencoderKL.from_pretrained(result.vae)
    averaged = weights(result.folder, "ema")
    assert all(torch.equal(averaged[name], value) for name, value in vae.state_dict().items())
    assert not torch.equal(averaged["encoder.conv_in.weight"], weights(result.folder)["encoder.conv_in.weight"])


def test_trained_vae_carries_its_provenance(make_config: Any) -> None:
    result = train(make_config(steps=2))

    with safe_open(result.vae / "diffusion_pytorch_model.safetensors", "pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata["recipe"])["optim"]["lr"] == 1e-3
    assert json.loads(metadata["training"])["versions"]["torch"] == torch.__version__.split("+")[0]
    assert "2 optimizer steps, 4 pictures seen" in (result.vae / "README.md").read_text()


def test_resume_needs_only_the_folder(make_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = make_config(steps=2)
    relative = dataclasses.replace(config, data=dataclasses.replace(config.data, train="photos", validation="photos"))
    result = train(relative)
    (result.folder / "report.json").unlink()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    result.folder.rename(tmp_path / "moved")

    again = resume(tmp_path / "moved")

    assert again.report["step"] == 2


def test_accumulated_batches_equal_one_batch(make_config: Any) -> None:
    one = train(make_config("one", batch_size=4))
    two = train(make_config("two", batch_size=2, gradient_accumulation_steps=2))

    ours, theirs = weights(one.folder), weights(two.folder)
    # Adam's first steps divide tiny gradients by their own size; worst seen 2e-5
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=0, atol=2e-4)
    rows = [[row for row in read_metrics(run.folder / "metrics.jsonl") if "loss" in row] for run in (one, two)]
    for mine, other in zip(*rows, strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], rel=1e-4)


def test_decoder_only_leaves_the_encoder_bit_equal(make_config: Any) -> None:
    config = make_config(model={"trainable": "decoder"})
    start = load_vae(config.model.pretrained).state_dict()

    result = train(config)

    trained = load_vae(result.vae).state_dict()
    frozen = [name for name in start if name.startswith(("encoder.", "quant_conv."))]
    assert all(torch.equal(start[name], trained[name]) for name in frozen)
    assert not torch.equal(start["decoder.conv_out.weight"], trained["decoder.conv_out.weight"])


def test_bf16_autocast_keeps_weights_in_fp32(make_config: Any) -> None:
    result = train(make_config(mixed_precision="bf16", steps=2))

    assert {value.dtype for value in weights(result.folder).values()} == {torch.float32}
    # masters move by less than a bf16 step of a weight near 0.1, which a bf16 master would lose
    moved = weights(result.folder)["encoder.conv_in.weight"]
    assert not torch.equal(moved, moved.bfloat16().float())


def test_scaling_factor_is_measured_from_random_weights_and_kept_otherwise(make_config: Any) -> None:
    from_random = make_config("a", steps=1, model={"pretrained": None, "preset": "mini"})
    started = make_config("b", steps=1)

    measured, kept = train(from_random).report, train(started).report

    assert measured["scaling_factor_source"].startswith("1 / standard deviation of the latents of 6 training photos")
    assert measured["scaling_factor"] not in (1.0, 0.18215)
    assert (kept["scaling_factor"], kept["scaling_factor_source"]) == (0.18215, "kept")


def test_same_seed_gives_the_same_random_weights_without_touching_the_global_seed(make_config: Any) -> None:
    config = make_config(steps=1, model={"pretrained": None, "preset": "mini"})
    torch.manual_seed(1)
    before = torch.get_rng_state()

    one = Trainer(config).vae.state_dict()
    two = Trainer(config).vae.state_dict()

    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_metrics_hold_what_the_schedule_and_the_loop_did(make_config: Any) -> None:
    result = train(make_config(loss={"reconstruction": "l1"}))

    rows = [row for row in read_metrics(result.folder / "metrics.jsonl") if "loss" in row]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert [row["samples"] for row in rows] == [2, 4, 6, 8]
    # one step of warm-up from 0 to 1e-3, then a half cosine over three; each row has its own step's rate
    assert [row["lr"] for row in rows] == pytest.approx([0.0, 1e-3, 0.75e-3, 0.25e-3])
    assert rows[0]["loss"] == pytest.approx(rows[0]["reconstruction"] + 1e-6 * rows[0]["kl"])


def test_unreadable_pictures_are_left_out_counted_and_listed(
    make_config: Any, photos: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (photos / "zz.png").write_bytes(b"not a picture")
    config = make_config(data={"validation": None}, steps=6)

    with caplog.at_level(logging.WARNING):
        report = train(config).report

    assert len(report["unreadable"]) == 1
    assert "zz.png" in report["unreadable"][0]
    assert "1 pictures could not be read" in caplog.text


def test_first_line_says_how_many_processes_run(make_config: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="training"):
        train(make_config(steps=1))

    first = next(record for record in caplog.records if record.name.startswith("training"))
    assert first.getMessage().startswith("1 process on cpu, precision no; ")


def test_a_run_that_diverges_stops_with_the_remedy(make_config: Any) -> None:
    wild = {"lr": 1e30, "schedule": "constant", "warmup_steps": 0, "max_grad_norm": 0.0}

    with pytest.raises(UserError, match=r"2 updates in a row had a loss or gradient .* at step 3; lower optim.lr"):
        train(make_config(optim=wild, max_skipped_steps=2, checkpoint_every=4))


def test_train_refuses_a_folder_that_is_taken(make_config: Any) -> None:
    config = make_config(steps=1)
    train(config)

    with pytest.raises(UserError, match="run exists; choose another place or pass --overwrite"):
        train(config)


def test_train_overwrites_a_run_when_asked(make_config: Any) -> None:
    train(make_config(steps=2))

    report = train(make_config(steps=1), overwrite=True).report

    assert report["step"] == 1


def test_train_never_overwrites_what_is_not_a_run(make_config: Any, photos: Path) -> None:
    with pytest.raises(UserError, match=r"exists and is not a run folder \(it holds 0.png\), so it is not replaced"):
        train(make_config("photos"), overwrite=True)

    assert len(list(photos.iterdir())) == 6


def test_train_refuses_a_crop_that_the_factor_does_not_divide(make_config: Any) -> None:
    with pytest.raises(UserError, match=r"data.size is 17, it must be a multiple of the factor 2"):
        train(make_config(data={"size": 17}))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_train_refuses_fp16_without_a_gpu(make_config: Any) -> None:
    with pytest.raises(UserError, match="mixed_precision is fp16, which needs a GPU"):
        train(make_config(mixed_precision="fp16"))


def test_resume_refuses_what_is_no_unfinished_run(make_config: Any, tmp_path: Path) -> None:
    finished = train(make_config(steps=1)).folder

    with pytest.raises(UserError, match="is not a run folder"):
        resume(tmp_path)
    with pytest.raises(UserError, match="is finished"):
        resume(finished)


def test_resume_refuses_a_source_of_another_size(
    make_config: Any, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = train(make_config(steps=2)).folder
    (folder / "report.json").unlink()
    (photos / "5.png").unlink()

    with pytest.raises(UserError, match=r"holds 5 pictures, the checkpoint of step 2 was trained on 6"):
        resume(folder)


def test_a_finished_run_is_resumed_with_what_it_had_noted(make_config: Any, photos: Path) -> None:
    (photos / "zz.png").write_bytes(b"not a picture")
    first = train(make_config(steps=6))
    (first.folder / "report.json").unlink()

    again = resume(first.folder)

    assert again.report == first.report
    assert len(again.report["unreadable"]) == 1
    assert again.report["validation"]


def test_an_unreadable_validation_photo_is_passed_over(
    make_config: Any, photos: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (photos / "0.png").write_bytes(b"not a picture")

    report = train(make_config(steps=2)).report

    assert report["validation"]["loss/reconstruction"] > 0
    assert "left out" in caplog.text


def test_published_files_hold_no_paths_of_this_machine(make_config: Any, tmp_path: Path) -> None:
    result = train(make_config(steps=1))

    with safe_open(result.vae / "diffusion_pytorch_model.safetensors", "pt") as file:
        published = json.dumps(file.metadata()) + (result.vae / "README.md").read_text()
    assert str(tmp_path) not in published
    assert "photos" in published


def test_an_environment_variable_does_not_change_the_recipe(make_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")

    assert train(make_config(steps=1)).report["samples"] == 2


def test_shift_is_measured_where_the_family_has_one(make_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from sd_vae.config import PRESETS

    small = dataclasses.replace(PRESETS["mini"], shift_factor=0.5)
    monkeypatch.setitem(PRESETS, "mini", small)

    report = train(make_config(steps=1, model={"pretrained": None, "preset": "mini"})).report

    assert report["shift_factor"] not in (0.5, None)


@pytest.mark.slow
def test_torchrun_on_cpus_trains_in_one_run(make_config: Any, tmp_path: Path, photos: Path) -> None:
    (photos / "zz.png").write_bytes(b"not a picture")
    config = make_config(steps=4, batch_size=1, data={"validation": None})
    save_recipe(config, tmp_path / "recipe.yaml")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]

    done = subprocess.run(
        [*launcher, "-m", "training", "--config", str(tmp_path / "recipe.yaml")],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )

    assert done.returncode == 0, done.stderr[-2000:]
    assert "2 processes on cpu" in done.stderr
    report = json.loads((Path(config.out) / "report.json").read_text())
    assert (report["step"], report["samples"]) == (4, 8)
    assert len(report["unreadable"]) == 1
