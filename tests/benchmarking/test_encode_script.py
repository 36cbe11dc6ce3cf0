"""benchmarks/encode.py on a tiny model: what it compares and computes; its times mean nothing here."""

import copy
from pathlib import Path

import pytest
import torch

from benchmarks import bars, encode
from sd_vae.autoencoder import AutoencoderKL


@pytest.fixture
def figures(tiny_vae: AutoencoderKL, monkeypatch: pytest.MonkeyPatch) -> list[encode.Figure]:
    monkeypatch.setattr(AutoencoderKL, "from_preset", lambda name: copy.deepcopy(tiny_vae))
    monkeypatch.setattr(encode, "NUM_WORKERS", 0)
    return encode.measure(size=16, rounds=1, num_pictures=3)


def test_encode_script_compares_equal_latents(figures: list[encode.Figure]) -> None:
    (figure,) = figures

    assert figure.is_correct
    assert float(figure.note.rpartition(" ")[2]) < 1e-5  # worst seen 3e-7
    assert (figure.must, figure.aim) == (1.8, 2.4)


def test_encode_script_sees_other_latents(tiny_vae: AutoencoderKL, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    encode.write_photos(tmp_path / "photos", 3, 16)
    encode.our_encode(tiny_vae, tmp_path / "photos", tmp_path / "ours", 16)
    torch.nn.init.normal_(tiny_vae.encoder.conv_in.weight)

    encode.plain_loop(tiny_vae.to_diffusers(), tmp_path / "photos", tmp_path / "theirs", 16)

    ours, theirs = encode._of_store(tmp_path / "ours"), encode._of_files(tmp_path / "theirs")
    assert ours.shape == theirs.shape == (3, 8, 8, 8)
    assert encode.relative_difference(ours, theirs) > encode.MAX_DIFFERENCE


def test_encode_script_looks_at_memory_in_both_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    held = iter(range(1000))
    monkeypatch.setattr(encode, "resident_mib", lambda: float(next(held)))

    first, rest = encode._encode_many(100)

    assert (first, rest) == (2.0, 10.0)  # looked at 0, 10, 20, and then to 100


@pytest.mark.parametrize(("rest", "met"), [(101.9, True), (102.1, False)])
def test_encode_memory_bar_is_missed_by_growth(monkeypatch: pytest.MonkeyPatch, rest: float, met: bool) -> None:
    monkeypatch.setattr(encode, "measure_memory", lambda: (100.0, rest))

    result = bars.encode_memory()

    assert result.met is met
    assert "100 MiB at most in the first 2,000 of 10,000 pictures" in result.figure
