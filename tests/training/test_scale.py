"""What makes a run fit and go fast, and data that comes over the network."""

import json
import tarfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tar_server import serve
from torch import nn

from sd_vae.cli import main
from sd_vae.data import Batch
from sd_vae.losses import Objective
from training import train
from training.config import save_recipe
from training.distributed import build_accelerator
from training.model import initial_vae
from training.rehearsal import ShortageError
from training.step import TrainingForward
from training.trainer import Trainer
from training.update import Update


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "checkpoints" / "last" / "model.safetensors")


def worst(one: Path, other: Path) -> float:
    ours, theirs = weights(one), weights(other)
    assert ours.keys() == theirs.keys()
    return max(float((value - theirs[name]).abs().max()) for name, value in ours.items())


# ---- memory


def test_recomputed_blocks_train_alike(make_config: Any) -> None:
    stored = train(make_config("stored", data={"validation": None}))
    recomputing = Trainer(make_config("recomputed", data={"validation": None}, model={"gradient_checkpointing": True}))
    assert recomputing.vae.is_gradient_checkpointing

    assert worst(recomputing.fit().folder, stored.folder) == 0


def test_too_large_a_batch_ends_the_run_before_it_begins(make_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(make_config())
    monkeypatch.setattr(trainer, "accelerator", SimpleNamespace(device=torch.device("cuda")))

    def rehearse() -> None:
        raise ShortageError("batch_size 2 at 16x16 does not fit into memory.")

    monkeypatch.setattr(trainer.update, "rehearse", rehearse)

    with pytest.raises(ShortageError, match="does not fit"):
        trainer.fit()
    assert not trainer.folder.exists()


def test_find_batch_size_is_an_option_of_the_command(
    make_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(steps=1, batch_size=4, data={"validation": None})
    save_recipe(config, tmp_path / "recipe.yaml")
    tried = []

    def rehearse(self: Update) -> None:
        tried.append(self.config.batch_size)
        if self.config.batch_size > 1:
            raise ShortageError("too large.")

    monkeypatch.setattr(Update, "rehearse", rehearse)

    assert main(["train", "--config", str(tmp_path / "recipe.yaml"), "--find-batch-size"]) == 0
    assert tried == [4, 2, 1]
    report = json.loads((Path(config.out) / "report.json").read_text())
    assert (report["step"], report["samples"]) == (1, 4)


# ---- speed


def test_gradients_are_synchronised_in_the_last_batch_alone(make_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(gradient_accumulation_steps=4)
    accelerator = build_accelerator(config)
    update = Update(accelerator, config, initial_vae(config).train(), Objective(config.loss))
    apart, no_sync = [], accelerator.no_sync
    monkeypatch.setattr(accelerator, "no_sync", lambda module: (apart.append(module), no_sync(module))[1])
    indices = torch.arange(2)

    update([Batch(torch.rand(2, 3, 16, 16), torch.zeros_like(indices), indices, []) for _ in range(4)], 0)

    assert apart == [update.forward] * 3


def test_a_compiled_run_trains_alike(make_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []

    def compile_traced(self: TrainingForward) -> None:
        compiled.append(self)
        nn.Module.compile(self, backend="eager")  # traced as it would be; the machine code would take minutes

    monkeypatch.setattr(TrainingForward, "compile", compile_traced)
    plain = train(make_config("plain", steps=2, data={"validation": None}))

    traced = train(make_config("traced", steps=2, data={"validation": None}, speed={"compile": True}))

    assert len(compiled) == 1
    # seen 7e-6 (other operations round otherwise); Adam's step is 1e-3
    assert worst(traced.folder, plain.folder) < 1e-4


@pytest.mark.parametrize("is_last", [True, False])
def test_feature_maps_are_stored_as_the_config_says(make_config: Any, is_last: bool) -> None:
    trainer = Trainer(make_config(model={"channels_last": is_last}))

    weight = trainer.vae.encoder.down_blocks[0].resnets[0].conv1.weight
    assert weight.is_contiguous(memory_format=torch.channels_last) == is_last


# ---- data over the network


@pytest.fixture
def server(tars: Path) -> Any:
    with serve(tars) as running:
        yield running


def test_a_run_on_remote_tars_counts_what_it_asked_for_again(make_config: Any, tars: Path, server: Any) -> None:
    here = train(make_config("here", data={"train": str(tars / "{0..1}.tar"), "validation": None}))
    trainer = Trainer(make_config("there", data={"train": server.url + "/{0..1}.tar", "validation": None}))
    server.trouble = [503, "cut"]

    there = trainer.fit()

    assert worst(there.folder, here.folder) == 0
    assert (there.report["retries"], there.report["rejects"], here.report["retries"]) == (2, 0, 0)


def test_published_files_hold_neither_signatures_nor_names_of_unreadable_files(
    make_config: Any, tars: Path, server: Any
) -> None:
    with tarfile.open(tars / "2.tar", "w") as archive:
        info = tarfile.TarInfo("broken.png")
        info.size = 0
        archive.addfile(info)
    train_on = server.url + "/{0..2}.tar?signature=hidden"

    result = train(make_config(data={"train": train_on, "validation": None}))

    with safe_open(result.vae / "diffusion_pytorch_model.safetensors", "pt") as file:
        published = json.dumps(file.metadata()) + (result.vae / "README.md").read_text()
    assert "hidden" not in published
    assert "broken" not in published
    assert "/{0..2}.tar" in published
    assert "broken.png" in result.report["unreadable"][0]
