"""Runs that are interrupted, killed or cannot write, and what they are once they go on: the run that was not."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from sd_vae.data import open_training_source
from sd_vae.errors import UserError
from sd_vae.losses import AdversarialConfig, Objective
from training import checkpoint, resume, train
from training import trainer as trainer_module
from training.checkpoint import newest_checkpoint
from training.config import save_recipe
from training.distributed import build_accelerator
from training.records import read_metrics
from training.trainer import Trainer

GAN = AdversarialConfig(weight=0.5, width=8, num_layers=1, norm="spectral", lecam_weight=0.1, start_step=1)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_resume_after_an_interrupt_equals_an_uninterrupted_run(
    make_config: Any, assert_same_run: Any, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    whole = train(make_config("whole"))
    step = Trainer._step

    def interrupted(self: Trainer, batches: Any) -> Any:
        if self.progress.step == 2:
            os.kill(os.getpid(), number)
        return step(self, batches)

    monkeypatch.setattr(Trainer, "_step", interrupted)
    with pytest.raises(KeyboardInterrupt, match="stopped after step 3, which is saved; go on: sd-vae train --resume"):
        train(make_config("parts"))
    monkeypatch.undo()
    parts = resume(make_config("parts").out)

    assert_same_run(whole.folder, parts.folder)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_resume_after_kill_9_is_bit_identical(
    make_config: Any, assert_same_run: Any, run_until_kill_9: Any, optimizer: str
) -> None:
    # With worker processes, EMA, schedule and accumulation; killed while it is past its checkpoint.
    settings: dict[str, Any] = {"steps": 6, "gradient_accumulation_steps": 2, "optim": {"name": optimizer}}
    settings["data"] = {"num_workers": 1, "validation": None}
    whole = train(make_config("whole", **settings))
    config = make_config("parts", **settings)

    run_until_kill_9(config, 2)
    parts = resume(config.out)

    assert_same_run(whole.folder, parts.folder)


def test_resume_of_everything_together_after_kill_9_is_bit_identical(
    make_config: Any, assert_same_run: Any, run_until_kill_9: Any, tars: Path
) -> None:
    # Tars, workers, discriminator past its start with LeCam, learned log-variance, EMA, both schedules: 2N = N + N.
    data = {"train": str(tars), "validation": None, "num_workers": 1, "shuffle_window": 2}
    settings: dict[str, Any] = {"steps": 8, "data": data, "loss": {"adversarial": GAN, "learn_logvar": True}}
    whole = train(make_config("whole", **settings))
    config = make_config("parts", checkpoint_every=4, **settings)

    run_until_kill_9(config, 4)
    parts = resume(config.out)

    assert_same_run(whole.folder, parts.folder)
    assert all("disc_loss" in row for row in read_metrics(parts.folder / "metrics.jsonl") if row["step"] == 4)


def test_kill_9_while_a_checkpoint_is_written_leaves_the_one_before(tmp_path: Path) -> None:
    script = """
import os, signal, sys
from pathlib import Path
from torch import nn
from training import checkpoint

def save(step):
    progress = checkpoint.Progress(step=step, samples=step, num_pictures=1)
    checkpoint.save_checkpoint(Path(sys.argv[1]), progress, {"model": nn.Linear(2, 2)}, {}, keep=2)

save(1)
if sys.argv[2] == "killed":
    checkpoint.write_json = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
save(2)
"""
    codes, left, newest = [], [], []
    for ending in ("killed", "whole"):
        done = subprocess.run(
            [sys.executable, "-c", script, str(tmp_path), ending],
            check=False,
            timeout=600,
            cwd=Path(__file__).parents[2],
        )
        codes.append(done.returncode)
        left.append([path.name.split(".")[1] for path in tmp_path.glob(".step*")])
        newest.append(newest_checkpoint(tmp_path).name)

    assert codes == [-signal.SIGKILL, 0]
    assert newest == ["step-0000001", "step-0000002"]
    assert left == [["step-0000002"], []]  # what a killed process leaves half done, the next one removes


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_a_run_goes_on_with_another_number_of_processes(
    make_config: Any, tmp_path: Path, tars: Path, before: int, after: int
) -> None:
    # Six pictures in two tars, twelve samples: steps of `before`, and from the middle of the first epoch on of `after`.
    num_samples, stop_after = 12, 4 // before
    steps = stop_after + (num_samples - 4) // after
    data = {"train": str(tars), "validation": None, "num_workers": 1, "shuffle_window": 2}
    config = make_config(steps=steps, batch_size=1, data=data, checkpoint_every=100)
    save_recipe(config, tmp_path / "recipe.yaml")

    first = _launch(before, stop_after, tmp_path / "first", tmp_path / "recipe.yaml")
    second = _launch(after, 0, tmp_path / "second", Path(config.out))

    in_order = open_training_source(config.data, config.seed)
    expected = [in_order.address(sample)[:2] for sample in range(num_samples)]
    assert [*first.samples, *second.samples] == expected
    assert len(set(expected)) == num_samples
    assert f"stopped after step {stop_after}, which is saved" in first.log
    assert f"{after} process{'es' if after > 1 else ''} now, {before} before: a step is {after} pictures, it was" in (
        second.log
    )
    assert "The order goes on at picture 4; none is left out and none comes twice" in second.log


class Launched(NamedTuple):
    samples: list[tuple[int, int]]
    """Those of a step, process by process, then those of the next."""
    log: str


def _launch(num_processes: int, stop_after: int, notes: Path, place: Path) -> Launched:
    notes.mkdir()
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(num_processes)]
    script, root = Path(__file__).with_name("elastic.py"), Path(__file__).parents[2]
    done = subprocess.run(
        [*launcher, str(script), str(num_processes), str(stop_after), str(notes), str(place)],
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root), "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [json.loads((notes / f"{rank}.json").read_text()) for rank in range(num_processes)]
    samples = [(epoch, index) for row in zip(*ranks, strict=True) for batch in row for epoch, index in batch]
    return Launched(samples, done.stderr)


def test_a_run_whose_disk_fills_up_names_the_checkpoint_before_and_goes_on_from_it(
    make_config: Any, assert_same_run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(make_config("whole"))
    save, saved = checkpoint.save_file, []

    def fill_up(tensors: Any, path: Path, **others: Any) -> None:
        saved.append(path)
        if len(saved) > 3:  # two files a checkpoint: in the middle of the second
            raise OSError(errno.ENOSPC, "No space left on device")
        save(tensors, path, **others)

    monkeypatch.setattr(checkpoint, "save_file", fill_up)
    with pytest.raises(
        UserError, match=r"step-0000004: No space left on device; .*go on from step-0000002, which is whole: --resume"
    ):
        train(make_config("parts"))
    monkeypatch.undo()
    parts = resume(make_config("parts").out)

    assert_same_run(whole.folder, parts.folder)


def test_a_run_that_diverges_after_a_checkpoint_names_it(make_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    objective = Objective.forward

    def diverge(self: Objective, *inputs: Any) -> Any:
        found = objective(self, *inputs)
        return found._replace(total=found.total * float("nan")) if inputs[-1] >= 2 else found

    monkeypatch.setattr(Objective, "forward", diverge)

    # Of the steps 3 to 5 none is taken, so the weights saved at 4 are those of 2.
    with pytest.raises(UserError, match=r"at step 5; .* the last good checkpoint, step-0000004: --resume .*run"):
        train(make_config(steps=8, max_skipped_steps=3, data={"validation": None}))


# ---- half precision


def test_a_half_precision_run_with_a_discriminator_resumes_to_the_bit(make_config: Any, assert_same_run: Any) -> None:
    settings = {"mixed_precision": "bf16", "loss": {"adversarial": GAN}}
    whole = train(make_config("whole", **settings))
    parts = train(make_config("parts", **settings))
    shutil.rmtree(parts.folder / "checkpoints" / "step-0000004")
    (parts.folder / "report.json").unlink()

    resume(parts.folder)

    assert_same_run(whole.folder, parts.folder)


@pytest.fixture
def scaled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs on this CPU scale their gradients as those in fp16 on a GPU do; the scale doubles after every step."""

    def build(config: Any) -> Any:
        accelerator = build_accelerator(config)
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=1)
        accelerator.native_amp = True
        accelerator.state._mixed_precision = "fp16"
        monkeypatch.setattr(accelerator, "autocast", nullcontext)
        return accelerator

    monkeypatch.setattr(trainer_module, "build_accelerator", build)


def test_the_gradient_scale_is_part_of_a_checkpoint(make_config: Any, assert_same_run: Any, scaled: None) -> None:
    whole = train(make_config("whole", loss={"adversarial": GAN}))
    parts = train(make_config("parts", loss={"adversarial": GAN}))
    shutil.rmtree(parts.folder / "checkpoints" / "step-0000004")
    (parts.folder / "report.json").unlink()

    resume(parts.folder)

    assert_same_run(whole.folder, parts.folder)
    state = torch.load(parts.folder / "checkpoints" / "last" / "optimizer.pt", weights_only=True)["scaler"]
    assert state["scale"] > 4.0


def test_an_overflow_lowers_the_gradient_scale_and_takes_no_step(make_config: Any, scaled: None) -> None:
    trainer = Trainer(make_config())
    scaler, mover = trainer.accelerator.scaler, trainer.update.mover
    before = [parameter.detach().clone() for parameter in mover.parameters]
    trainer.accelerator.backward(sum(parameter.sum() for parameter in mover.parameters) * float("inf"))

    is_taken, _ = mover.move(torch.zeros(()))

    assert not is_taken
    assert scaler.get_scale() == 2.0
    assert all(torch.equal(parameter, was) for parameter, was in zip(mover.parameters, before, strict=True))
