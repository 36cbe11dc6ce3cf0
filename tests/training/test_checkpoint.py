"""Checkpoints: whole or absent, pruned, strict when read."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sd_vae.errors import UserError
from sd_vae.files import write_json
from training import checkpoint
from training.checkpoint import Progress, load_checkpoint, newest_checkpoint, save_checkpoint


@pytest.fixture
def parts() -> tuple[dict[str, nn.Module], dict[str, Any]]:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return {"model": model}, {"optimizer": optimizer}


def test_checkpoint_brings_back_weights_and_optimizer(tmp_path: Path, parts: Any) -> None:
    models, states = parts
    path = save_checkpoint(tmp_path, Progress(step=3, samples=12, num_pictures=6), models, states, keep=2)
    other = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(other.parameters(), lr=0.5)

    progress = load_checkpoint(path, {"model": other}, {"optimizer": optimizer})

    assert progress == Progress(step=3, samples=12, num_pictures=6)
    assert torch.equal(other.weight, models["model"].weight)
    assert optimizer.param_groups[0]["lr"] == 0.1
    assert torch.equal(
        optimizer.state[other.weight]["exp_avg"], states["optimizer"].state_dict()["state"][0]["exp_avg"]
    )


def test_save_checkpoint_keeps_the_newest_and_links_last(tmp_path: Path, parts: Any) -> None:
    for step in (1, 2, 10):
        save_checkpoint(tmp_path, Progress(step=step, samples=step, num_pictures=6), *parts, keep=2)

    assert sorted(p.name for p in tmp_path.iterdir()) == ["last", "step-0000002", "step-0000010"]
    assert (tmp_path / "last").resolve() == newest_checkpoint(tmp_path).resolve()


def test_save_checkpoint_that_fails_leaves_the_one_before(
    tmp_path: Path, parts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(tmp_path, Progress(step=1, samples=1, num_pictures=6), *parts, keep=1)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.torch, "save", full)
    with pytest.raises(
        UserError,
        match=r"cannot write .*step-0000002: No space left on device; .*go on from step-0000001, which is whole",
    ):
        save_checkpoint(tmp_path, Progress(step=2, samples=2, num_pictures=6), *parts, keep=1)

    assert newest_checkpoint(tmp_path).name == "step-0000001"
    assert not list(tmp_path.glob(".step*"))


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.pt"])
def test_load_checkpoint_names_a_damaged_checkpoint(tmp_path: Path, parts: Any, file: str) -> None:
    path = save_checkpoint(tmp_path, Progress(step=1, samples=1, num_pictures=6), *parts, keep=1)
    (path / file).write_bytes((path / file).read_bytes()[:50])

    with pytest.raises(UserError, match=r"cannot resume from .*step-0000001"):
        load_checkpoint(path, *parts)


def test_load_checkpoint_refuses_another_model(tmp_path: Path, parts: Any) -> None:
    path = save_checkpoint(tmp_path, Progress(step=1, samples=1, num_pictures=6), *parts, keep=1)

    with pytest.raises(UserError, match=r"cannot resume from .*size mismatch"):
        load_checkpoint(path, {"model": nn.Linear(4, 2)}, parts[1])


def test_load_checkpoint_refuses_another_format(tmp_path: Path, parts: Any) -> None:
    path = save_checkpoint(tmp_path, Progress(step=1, samples=1, num_pictures=6), *parts, keep=1)
    write_json(path / "state.json", {"format_version": 99})

    with pytest.raises(UserError, match="has checkpoint format 99, this version reads 1"):
        load_checkpoint(path, *parts)


def test_newest_checkpoint_says_when_there_is_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no checkpoint to resume from"):
        newest_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("optimizer.pt", b""),
        ("optimizer.pt", b"hello"),
        ("model.safetensors", b"hello"),
        ("state.json", b'{"format_version": 1}'),
        ("state.json", b'{"format_version": 1, "step": "x", "samples": 2}'),
    ],
)
def test_a_damaged_checkpoint_names_the_way_round_it(tmp_path: Path, file: str, content: bytes) -> None:
    model = nn.Linear(2, 2)
    states = {"optimizer": torch.optim.SGD(model.parameters())}
    path = save_checkpoint(tmp_path, Progress(step=1, samples=2, num_pictures=6), {"model": model}, states, keep=1)
    (path / file).write_bytes(content)

    with pytest.raises(UserError, match=r"cannot resume from .*; remove it to resume from the one before"):
        load_checkpoint(path, {"model": model}, states)


def test_a_state_that_is_no_object_is_of_no_format(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text("[]")

    with pytest.raises(UserError, match="has checkpoint format None, this version reads 1"):
        load_checkpoint(tmp_path, {}, {})


def test_a_full_disk_leaves_no_checkpoint_and_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("[enforce fail at inline_container.cc:671] . unexpected pos 203200 vs 203088")

    monkeypatch.setattr(torch, "save", fail)

    with pytest.raises(UserError, match=r"cannot write .*step-0000001: .enforce fail.*free space, then start anew"):
        save_checkpoint(
            tmp_path / "c", Progress(step=1, samples=2, num_pictures=6), {"model": nn.Linear(2, 2)}, {}, keep=1
        )

    assert list((tmp_path / "c").iterdir()) == []
