"""What surrounds a run: its lock, its best weights, the hub, Weights & Biases, memory."""

import json
import logging
import sys
import types
from pathlib import Path
from typing import Any, get_args, get_type_hints

import diffusers
import huggingface_hub
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from sd_vae.errors import UserError
from sd_vae.losses import PerceptualConfig
from sd_vae.losses.backbones import BACKBONES
from training import resume, train
from training.batch_size import find_batch_size
from training.config import load_recipe
from training.config_extras import BEST_METRICS, ReportConfig
from training.distributed import build_accelerator
from training.records import MetricsLog, loss_terms, read_metrics
from training.rehearsal import ShortageError, divisors_from, memory_errors
from training.run_folder import LOCK, RunLock, is_better
from training.throughput import Throughput, training_flops
from training.trainer import Trainer
from training.update import Update

# ---- two runs never write into one folder


def test_a_second_run_is_kept_out_of_a_folder(make_config: Any) -> None:
    config = make_config(steps=1)
    folder = train(config).folder
    lock = RunLock(folder)
    lock.acquire()

    with pytest.raises(UserError, match=r"another run is writing into .*run; wait until it ends or stop it"):
        train(config, overwrite=True)
    assert (folder / "report.json").exists()
    (folder / "report.json").unlink()
    with pytest.raises(UserError, match="another run is writing into"):
        resume(folder)

    lock.release()
    assert resume(folder).report["step"] == 1
    assert not (folder / LOCK).exists()


def test_a_lock_that_was_left_behind_is_no_hindrance(make_config: Any) -> None:
    config = make_config(steps=1)
    Path(config.out).mkdir()
    (Path(config.out) / LOCK).touch()

    assert train(config, overwrite=True).report["step"] == 1


def test_a_lock_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    with pytest.raises(UserError, match=r"cannot write .*run.lock: "):
        RunLock(tmp_path / "file" / "run").acquire()


# ---- best weights


@pytest.mark.parametrize(
    ("metric", "value", "best", "expected"),
    [
        ("psnr_db", 2.0, 1.0, True),
        ("psnr_db", 1.0, 1.0, False),
        ("lpips_vgg", 1.0, 2.0, True),
        ("loss/reconstruction", 2.0, None, True),
    ],
)
def test_is_better_knows_the_direction(metric: str, value: float, best: float | None, expected: bool) -> None:
    assert is_better(metric, {metric: value}, best) is expected


def test_a_metric_that_is_not_measured_is_refused() -> None:
    with pytest.raises(UserError, match=r"report.best_metric is lpips_alex, .*choose: psnr_db"):
        is_better("lpips_alex", {"psnr_db": 1.0}, None)


def test_best_weights_are_those_of_the_best_validation(make_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    values = iter([{"psnr_db": 20.0}, {"psnr_db": 10.0}])
    monkeypatch.setattr("training.trainer.validate", lambda *_: (next(values), Image.new("RGB", (4, 4))))

    result = train(make_config(report={"best_metric": "psnr_db"}))

    assert (result.report["best"], result.report["validation"]) == (20.0, {"psnr_db": 10.0})
    with safe_open(result.folder / "best" / "diffusion_pytorch_model.safetensors", "pt") as file:
        assert (file.metadata()["step"], file.metadata()["chosen_by"]) == ("2", "psnr_db")
    best, last = (diffusers.AutoencoderKL.from_pretrained(result.folder / name) for name in ("best", "vae"))
    assert not torch.equal(best.decoder.conv_in.weight, last.decoder.conv_in.weight)


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"best_metric": "beauty"}, r"report.best_metric is 'beauty', choose one of: psnr_db"),
        ({"wandb_project": ""}, r"report.wandb_project is empty"),
        ({"push_to_hub": "name"}, r"report.push_to_hub is 'name', write USER/NAME"),
    ],
)
def test_report_config_rejects(fields: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        ReportConfig(**fields)


# ---- the hub


class Hub:
    """Stands in for `HfApi`."""

    calls: list[tuple[str, Any]]
    failing = ""

    def _call(self, name: str, value: Any) -> None:
        Hub.calls.append((name, value))
        if name == self.failing:
            raise ConnectionError("no route to the hub")

    def whoami(self) -> None:
        self._call("whoami", None)

    def create_repo(self, repo: str, *, private: bool, exist_ok: bool) -> None:
        self._call("create_repo", (repo, private))

    def upload_folder(self, *, repo_id: str, folder_path: str, commit_message: str) -> None:
        self._call("upload_folder", (repo_id, sorted(path.name for path in Path(folder_path).iterdir())))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> type[Hub]:
    Hub.calls, Hub.failing = [], ""
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    return Hub


def test_a_finished_vae_is_pushed_when_asked(make_config: Any, hub: type[Hub]) -> None:
    train(make_config(steps=1, report={"push_to_hub": "me/vae"}))

    files = ["README.md", "config.json", "diffusion_pytorch_model.safetensors"]
    assert hub.calls == [("whoami", None), ("create_repo", ("me/vae", True)), ("upload_folder", ("me/vae", files))]


def test_a_run_that_may_not_push_does_not_begin(make_config: Any, hub: type[Hub]) -> None:
    hub.failing = "whoami"
    config = make_config(report={"push_to_hub": "me/vae"})

    with pytest.raises(UserError, match=r"the hub does not let this machine in: no route.*hf auth login"):
        train(config)

    assert not Path(config.out).exists()


def test_an_upload_that_fails_leaves_a_finished_run(make_config: Any, hub: type[Hub]) -> None:
    hub.failing = "upload_folder"
    config = make_config(steps=1, report={"push_to_hub": "me/vae"})

    with pytest.raises(UserError, match=r"cannot upload to me/vae: no route.*upload it later: hf upload me/vae "):
        train(config)

    assert (Path(config.out) / "report.json").exists()


# ---- Weights & Biases


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Any:
    module: Any = types.ModuleType("wandb")
    module.rows, module.opened = [], []
    module.Error = type("Error", (Exception,), {})
    module.Image = lambda picture: ("picture", picture.size)
    run = types.SimpleNamespace(log=lambda row, step: module.rows.append((step, row)), finish=lambda: None)
    module.init = lambda **settings: module.opened.append(settings) or run
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_wandb_gets_rows_and_pictures(make_config: Any, wandb: Any) -> None:
    result = train(make_config(steps=2, report={"wandb_project": "vaes"}))

    assert [step for step, _ in wandb.rows] == [1, 2, 2]
    assert wandb.rows[0][1]["grad_norm"] > 0
    assert wandb.rows[2][1]["reconstructions"] == ("picture", (32, 32))
    assert (wandb.opened[0]["project"], wandb.opened[0]["name"]) == ("vaes", "run")
    assert wandb.opened[0]["dir"] == str(result.folder)


def test_wandb_goes_on_with_the_same_run(make_config: Any, wandb: Any) -> None:
    folder = train(make_config(steps=1, report={"wandb_project": "vaes"})).folder
    (folder / "report.json").unlink()

    resume(folder)

    assert wandb.opened[0]["id"] == wandb.opened[1]["id"]
    assert wandb.opened[1]["resume"] == "allow"


def test_wandb_that_is_missing_names_the_extra(
    make_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)

    with pytest.raises(UserError, match=r'needs Weights & Biases; install it: pip install "sd-vae\[wandb\]"'):
        MetricsLog(tmp_path, make_config(report={"wandb_project": "vaes"}), step=0)


def test_wandb_that_cannot_be_opened_is_one_line(make_config: Any, tmp_path: Path, wandb: Any) -> None:
    def refuse(**_: Any) -> None:
        raise wandb.Error("no key")

    wandb.init = refuse

    with pytest.raises(UserError, match=r"cannot open the Weights & Biases project vaes: no key; log in"):
        MetricsLog(tmp_path, make_config(report={"wandb_project": "vaes"}), step=0)


def test_tensorboard_shows_the_reconstructions(make_config: Any, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = MetricsLog(tmp_path, make_config(tensorboard=True), step=0)
    log.write(3, {"validation/psnr_db": 20.0}, Image.fromarray(np.zeros((8, 8, 3), dtype=np.uint8)))
    log.close()

    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Images("reconstructions")] == [3]


def test_a_progress_bar_shows_the_loss_and_its_terms() -> None:
    terms = {"loss": 0.25, "reconstruction": 0.125, "lpips_alex": 0.5, "kl": 12345.6, "adversarial_weight": 0.1}

    line = loss_terms(terms | {"disc_loss": 1.0, "disc_accuracy": 0.5, "grad_norm": 3.0})

    assert line == "loss 0.25, reconstruction 0.125, lpips_alex 0.5, kl 1.235e+04, disc_loss 1"


# ---- memory and speed


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(), RuntimeError("can't allocate memory: 9 TB")]
)
def test_too_little_memory_names_the_settings(make_config: Any, error: Exception) -> None:
    with (
        pytest.raises(
            ShortageError, match=r"batch_size 2 at 16x16 does not fit into memory; lower batch_size and raise"
        ),
        memory_errors(make_config()),
    ):
        raise error


def test_another_error_is_not_taken_for_too_little_memory(make_config: Any) -> None:
    with pytest.raises(RuntimeError, match="shapes"), memory_errors(make_config()):
        raise RuntimeError("shapes differ")


def test_a_rehearsal_leaves_no_trace(make_config: Any) -> None:
    trainer = Trainer(make_config(loss={}))
    before = {name: value.clone() for name, value in trainer.vae.state_dict().items()}

    trainer.update.rehearse()

    assert all(torch.equal(before[name], value) for name, value in trainer.vae.state_dict().items())
    assert all(parameter.grad is None for parameter in trainer.parameters)
    assert not trainer.update.mover.optimizer.state_dict()["state"]


def test_the_batch_is_lowered_until_it_fits_and_a_step_keeps_its_pictures(
    make_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rehearse(self: Update) -> None:
        with memory_errors(self.config):
            if self.config.batch_size > 3:
                raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Update, "rehearse", rehearse)

    found = find_batch_size(make_config(batch_size=6, gradient_accumulation_steps=2))

    assert (found.batch_size, found.gradient_accumulation_steps) == (3, 4)


def test_not_even_one_picture_fits(make_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def rehearse(self: Update) -> None:
        raise ShortageError("too large.")

    monkeypatch.setattr(Update, "rehearse", rehearse)

    with pytest.raises(UserError, match="not even one picture of 16x16 fits into memory"):
        find_batch_size(make_config(batch_size=2))


def test_divisors_go_from_large_to_small() -> None:
    assert divisors_from(24, 10) == [8, 6, 4, 3, 2, 1]


def test_flops_count_a_frozen_encoder_once(tiny_vae: Any) -> None:
    whole = training_flops(tiny_vae, 16)
    tiny_vae.encoder.requires_grad_(False)

    assert 0 < training_flops(tiny_vae, 16) < whole


def test_throughput_has_a_share_where_the_peak_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([10.0, 12.0])
    monkeypatch.setattr("training.throughput.time.perf_counter", lambda: next(clock))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA A100-SXM4-80GB")
    throughput = Throughput(1e12, torch.device("cuda"), 2, 100)

    assert throughput.rows(300) == {"images_per_s": 100.0, "tflops_per_s": 100.0, "mfu": 100.0 / 624.0}


def test_the_fused_optimizer_takes_the_same_steps(make_config: Any) -> None:
    plain, fused = (
        train(make_config(name, steps=2, optim={"fused": is_fused}))
        for name, is_fused in (("plain", False), ("fused", True))
    )

    key = "loss/reconstruction"
    assert fused.report["validation"][key] == pytest.approx(plain.report["validation"][key], rel=1e-4)


@pytest.mark.parametrize("variable", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"])
def test_split_weights_are_refused(make_config: Any, monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv(variable, "true")

    with pytest.raises(UserError, match=rf"{variable} is set, and weights that are split over devices are not offered"):
        build_accelerator(make_config())


# ---- another number of processes


def test_resuming_with_other_processes_says_what_changed(make_config: Any, caplog: pytest.LogCaptureFixture) -> None:
    folder = train(make_config(steps=2)).folder
    (folder / "report.json").unlink()
    state = folder / "checkpoints" / "step-0000002" / "state.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | {"num_processes": 4}))

    with caplog.at_level(logging.WARNING):
        resume(folder)

    assert "1 process now, 4 before: a step is 2 pictures, it was 8. The order goes on at picture 4" in caplog.text


def test_the_perceptual_term_of_every_loss_can_choose() -> None:
    nets = set(get_args(get_type_hints(PerceptualConfig)["net"])) - {"auto"}

    terms = {"loss/" + (f"lpips_{net}" if net in BACKBONES else net) for net in nets}

    assert terms <= set(BEST_METRICS)


def test_the_run_folder_says_which_perceptual_network_was_chosen(
    make_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))  # without LPIPS' weights
    config = make_config(data={"size": 32}, loss={"perceptual": PerceptualConfig(weight=0.1)})

    folder = train(config).folder

    assert load_recipe(folder / "config.yaml").loss.perceptual.net == "distilled"
    assert "distilled" in read_metrics(folder / "metrics.jsonl")[0]
