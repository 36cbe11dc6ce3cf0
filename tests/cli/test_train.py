"""`sd-vae train`: recipe and overrides, resume, interrupts, and standard output for the result alone."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from sd_vae.cli import main
from training.config import load_recipe
from training.run_folder import with_absolute_paths
from training.trainer import Trainer

TRAIN = ["train", "--config", "r.yaml", "--out", "o"]


def test_train_options_win_over_the_recipe(place: Path) -> None:
    assert main([*TRAIN, "--steps", "1", "--optim.lr", "2e-5"]) == 0

    resolved = yaml.safe_load(Path("o/config.yaml").read_text())
    assert (resolved["steps"], resolved["optim"]["lr"], resolved["batch_size"]) == (1, 2e-5, 2)


def test_train_prints_nothing_but_one_json_object(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([*TRAIN, "--steps", "1", "--json"])

    report = json.loads(capsys.readouterr().out)
    assert (report["step"], report["vae"]) == (1, "o/vae")


def test_train_without_json_prints_nothing_on_standard_output(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([*TRAIN, "--steps", "1"])

    output = capsys.readouterr()
    assert output.out == ""
    assert "trained VAE: o/vae" in output.err


def test_train_interrupted_saves_and_names_the_command_that_goes_on(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    step = Trainer._step

    def interrupted(self: Trainer, batches: object) -> object:
        os.kill(os.getpid(), signal.SIGINT)
        return step(self, batches)

    monkeypatch.setattr(Trainer, "_step", interrupted)
    code = main(TRAIN)
    monkeypatch.undo()
    os.chdir(place)

    assert code == 130
    line = capsys.readouterr().err.splitlines()[-1]
    assert line == "stopped after step 1, which is saved; go on: sd-vae train --resume o"
    assert main(line.partition("sd-vae ")[2].split()) == 0
    assert json.loads(Path("o/report.json").read_text())["step"] == 3


def test_train_interrupted_while_it_is_set_up_leaves_nothing(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("training.optim.build_optimizer", interrupt)

    assert main(TRAIN) == 130
    assert not Path("o").exists()


def test_train_interrupted_twice_stops_at_once(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(self: Trainer, batches: object) -> object:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("the second signal was to end this step")

    monkeypatch.setattr(Trainer, "_step", interrupted)

    assert main(TRAIN) == 130
    assert not Path("o/checkpoints").exists()


def test_train_that_diverges_writes_no_checkpoint(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    step = Trainer._step

    def damaged(self: Trainer, batches: object) -> object:
        terms = step(self, batches)
        self.parameters[0].data.fill_(float("nan"))
        return terms

    monkeypatch.setattr(Trainer, "_step", damaged)

    assert main([*TRAIN, "--checkpoint-every", "1"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: weights are not finite at step 1; lower optim.lr")
    assert error.endswith("and start anew with --overwrite.")
    assert not Path("o/checkpoints").exists()


def test_train_cut_off_metrics_do_not_keep_a_run_from_going_on(place: Path) -> None:
    main(TRAIN)
    Path("o/report.json").unlink()
    with Path("o/metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')

    assert main(["train", "--resume", "o"]) == 0


def test_train_names_the_line_of_damaged_metrics(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(TRAIN)
    Path("o/report.json").unlink()
    rows = Path("o/metrics.jsonl").read_text()
    Path("o/metrics.jsonl").write_text("nonsense\n" + rows)

    assert main(["train", "--resume", "o"]) == 2
    assert "metrics.jsonl line 1 is not a row of metrics: 'nonsense'; remove it." in capsys.readouterr().err


def test_train_resumes_from_elsewhere_with_its_perceptual_network(place: Path) -> None:
    recipe = yaml.safe_load(Path("r.yaml").read_text())
    recipe["loss"]["perceptual"] |= {"net": "vgg", "backbone": "note.txt"}
    Path("b.yaml").write_text(yaml.safe_dump(recipe))

    config = with_absolute_paths(load_recipe("b.yaml"))

    assert config.loss.perceptual.backbone == str(place / "note.txt")


def test_train_help_lists_the_fields_without_torch() -> None:
    program = (
        "import sys, contextlib\nfrom sd_vae.cli import main\n"
        "with contextlib.suppress(SystemExit): main(['train', '--help'])\n"
        "assert not {'torch', 'diffusers', 'datasets'} & set(sys.modules), 'a heavy import'"
    )
    started = time.perf_counter()

    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in ("--optim.lr", "--data.train", "--loss.perceptual.net", "--resume"))
    # 0.3 s on an idle machine; a machine that does five other things may take ten times as long
    assert time.perf_counter() - started < 3


VALIDATED = [*TRAIN, "--data.validation", "photos", "--num-validation-images", "3"]


def test_train_validates_as_eval_evaluates(place: Path) -> None:
    assert main([*VALIDATED, "--ema-decay", "0.9"]) == 0

    rows = [json.loads(line) for line in Path("o/metrics.jsonl").read_text().splitlines()]
    last = [row for row in rows if "validation/psnr_db" in row][-1]
    assert [row["step"] for row in rows if "validation/psnr_db" in row] == [2, 3]
    Path("three").mkdir()
    for index in range(3):
        Path(f"three/{index}.png").write_bytes(Path(f"photos/{index}.png").read_bytes())
    metrics = ["--metrics", "psnr_db", "ssim", "l1"]
    assert main(["eval", "o/vae", "three", "--out", "e", "--size", "16", "--device", "cpu", *metrics]) == 0
    means = json.loads(Path("e/report.json").read_text())["evaluation"]["rows"][0]["means"]
    assert {name: last[f"validation/{name}"] for name in means} == means


def test_train_ends_with_a_report_and_a_card_that_has_it(place: Path) -> None:
    main([*VALIDATED, "--report.best-metric", "ssim"])

    report = json.loads(Path("o/evaluation/report.json").read_text())
    card = Path("o/vae/README.md").read_text()
    psnr = report["evaluation"]["rows"][0]["means"]["psnr_db"]
    assert Path("o/evaluation/report.html").is_file()
    assert "3 validation photos by protocol `native at 16`, version 1" in card
    assert f"| PSNR (dB) ↑ | {psnr:.2f} [" in card
    assert "![photos and their reconstructions](reconstructions.png)" in card
    assert Path("o/vae/reconstructions.png").is_file()
    assert Path("o/best/config.json").is_file()
    # all of it is the run's own: it is replaced
    assert main([*VALIDATED, "--overwrite"]) == 0


def test_train_resumed_measures_too(place: Path) -> None:
    main(VALIDATED)
    Path("o/report.json").unlink()

    assert main(["train", "--resume", "o"]) == 0
    assert json.loads(Path("o/report.json").read_text())["validation"]["psnr_db"] > 0


def test_train_refuses_an_unknown_protocol_before_it_begins(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*VALIDATED, "--report.protocol", "mine"]) == 2
    assert "unknown protocol 'mine'; choose one of: pixels, native" in capsys.readouterr().err
    assert not Path("o").exists()
