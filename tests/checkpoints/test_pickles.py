"""Pickles: nothing in them runs, tensors come out, damage is one line."""

import os
import pickle
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path
from types import ModuleType

import pytest
import torch
from vae_files import equal_weights, ldm_tensors

from sd_vae.checkpoints import load_vae
from sd_vae.checkpoints.pickles import Inert, load_pickle
from sd_vae.errors import UserError


class Payload:
    """Runs a shell command when it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple:
        return os.system, (self.command,)


@pytest.fixture
def lightning(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A package whose classes stand in old checkpoints and which is not installed where they are read."""
    module = ModuleType("pytorch_lightning")

    class ModelCheckpoint:
        def __init__(self) -> None:
            self.best = 1.0

    class AttributeDict(dict):
        pass

    for kind in (ModelCheckpoint, AttributeDict):
        kind.__module__, kind.__qualname__ = "pytorch_lightning", kind.__name__
        setattr(module, kind.__name__, kind)
    monkeypatch.setitem(sys.modules, "pytorch_lightning", module)
    return module


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])
def test_load_vae_never_runs_a_payload(tmp_path: Path, vae, caplog, is_zip: bool) -> None:
    loot = tmp_path / "loot"
    value = {"state_dict": ldm_tensors(vae, "first_stage_model."), "callbacks": Payload(f"touch {loot}")}
    torch.save(value, tmp_path / "evil.ckpt", _use_new_zipfile_serialization=is_zip)

    loaded = load_vae(tmp_path / "evil.ckpt")

    assert not loot.exists()
    assert equal_weights(loaded, vae)
    assert "posix.system" in caplog.text


def test_payload_of_the_test_above_is_real(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Payload(f"touch {tmp_path / 'loot'}")))  # noqa: S301

    assert (tmp_path / "loot").exists()


def test_load_vae_never_runs_a_bare_pickle(tmp_path: Path) -> None:
    loot = tmp_path / "loot"
    (tmp_path / "evil.pt").write_bytes(pickle.dumps(Payload(f"touch {loot}"), protocol=2))

    with pytest.raises(UserError, match="damaged PyTorch file"):
        load_vae(tmp_path / "evil.pt")

    assert not loot.exists()


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])
def test_load_vae_reads_old_lightning_files(tmp_path: Path, vae, lightning, caplog, is_zip: bool) -> None:
    value = {
        "state_dict": OrderedDict(ldm_tensors(vae)),
        "callbacks": {lightning.ModelCheckpoint: lightning.ModelCheckpoint()},
        "hyper_parameters": lightning.AttributeDict(lr=1.0),
        "epoch": 3,
    }
    torch.save(value, tmp_path / "last.ckpt", _use_new_zipfile_serialization=is_zip)
    sys.modules.pop("pytorch_lightning")

    loaded = load_vae(tmp_path / "last.ckpt")

    assert equal_weights(loaded, vae)
    assert "pytorch_lightning.AttributeDict, pytorch_lightning.ModelCheckpoint" in caplog.text
    assert "pytorch_lightning" not in sys.modules


def test_load_pickle_keeps_numbers_and_containers(tmp_path: Path, lightning) -> None:
    value = {
        "odd": lightning.AttributeDict(a=1),
        "numbers": [1, 2.5, True, {3}],
        "weight": torch.nn.Parameter(torch.ones(2)),
    }
    torch.save(value, tmp_path / "x.ckpt")

    loaded, dropped = load_pickle(tmp_path / "x.ckpt", is_zip=True)

    assert loaded["numbers"] == [1, 2.5, True, {3}]
    assert isinstance(loaded["odd"], Inert)
    assert torch.equal(loaded["weight"], torch.ones(2))
    assert dropped == ("pytorch_lightning.AttributeDict",)


def test_load_pickle_shields_torch_from_a_build_instruction(tmp_path: Path) -> None:
    # Find a function of torch's, then set an attribute on it.
    program = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}U\x05ownedK\x01sb."
    with zipfile.ZipFile(tmp_path / "x.ckpt", "w") as archive:
        archive.writestr("x/data.pkl", program)
        archive.writestr("x/version", "3\n")
        archive.writestr("x/byteorder", "little")

    load_pickle(tmp_path / "x.ckpt", is_zip=True)

    assert not hasattr(torch._utils._rebuild_tensor_v2, "owned")


def test_load_vae_refuses_torchscript(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(1)}, tmp_path / "x.pt")
    with zipfile.ZipFile(tmp_path / "x.pt", "a") as archive:
        archive.writestr("x/constants.pkl", b"")

    with pytest.raises(UserError, match="TorchScript"):
        load_vae(tmp_path / "x.pt")
