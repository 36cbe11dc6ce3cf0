"""Broken configs and data folders end in one clear line; `python -m benchmarks.fuzz_training` does 500."""

from pathlib import Path
from typing import Any

import pytest

from benchmarks import fuzz_training
from sd_vae.errors import UserError
from training import train


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # what Pillow and others say of odd files is not judged here
def test_mutations_of_configs_and_data_give_clear_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    bad, counts = fuzz_training.fuzz(40, tmp_path)

    assert bad == []
    assert counts["good"] == 40


@pytest.mark.filterwarnings("ignore")
def test_a_defect_is_seen_by_the_fuzzer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def defect(*_: object, **__: object) -> None:
        raise KeyError("a defect")

    monkeypatch.setattr("training.trainer.Trainer", defect)
    monkeypatch.setattr(fuzz_training, "mutate_config", lambda *_: "nothing")
    monkeypatch.setattr(fuzz_training, "mutate_data", lambda *_: "data: nothing")

    bad, _ = fuzz_training.fuzz(1, tmp_path)

    assert "a defect" in bad[0][2]


def test_a_run_folder_of_an_impossible_name_is_one_line(make_config: Any) -> None:
    with pytest.raises(UserError, match=r"cannot write .*aaa: File name too long"):
        train(make_config("a" * 300))


@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_an_absurd_learning_rate_is_one_line(make_config: Any, clip: float) -> None:
    optim = {"lr": 1e38, "schedule": "constant", "warmup_steps": 0, "max_grad_norm": clip}

    with pytest.raises(UserError, match=r"optim.lr is 1e\+38, beyond the range of the weights' numbers; lower it"):
        train(make_config(optim=optim, steps=3, checkpoint_every=10))
