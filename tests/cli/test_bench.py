"""`sd-vae bench`: what it prints, that its figures are measured, and what it refuses."""

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from sd_vae.autoencoder import AutoencoderKL
from sd_vae.cli import bench, main
from sd_vae.ops import dispatch


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is not measured, for a process of its own takes seconds to start; ceilings are measured in a hurry."""
    monkeypatch.setattr("sd_vae.benchmarking.comparison.peak_memory", lambda *_: 0.5)
    monkeypatch.setattr("sd_vae.benchmarking.ceilings.MIN_SECONDS", 0.0)
    monkeypatch.setattr("sd_vae.benchmarking.ceilings.MAX_SIDE", {"cpu": 256})


@pytest.fixture
def without_numba(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine on which numba is not installed."""
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "numba" else find_spec(name))
    monkeypatch.setattr("platform.system", lambda: "Linux")
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    dispatch.compiled_unavailable.cache_clear()
    yield
    dispatch.compiled_unavailable.cache_clear()


@pytest.fixture
def tiny_folder(tmp_path: Path, tiny_vae: AutoencoderKL) -> str:
    """The tiny VAE as a folder."""
    tiny_vae.save_pretrained(tmp_path / "vae")
    return str(tmp_path / "vae")


@pytest.mark.usefixtures("in_this_process")
def test_bench_command_prints_one_json_object(tiny_folder: str, capsys) -> None:
    assert main(["bench", tiny_folder, "--sizes", "16", "32", "--repeats", "2", "--json"]) == 0

    found = json.loads(capsys.readouterr().out)
    assert [(row["action"], row["size"]) for row in found["comparisons"]] == [
        ("encode", 16),
        ("decode", 16),
        ("encode", 32),
        ("decode", 32),
    ]
    assert (found["dtype"], found["repeats"], found["vae"]) == ("float32", 2, tiny_folder)
    assert found["num_threads"] == torch.get_num_threads()
    assert found["ceilings"]["matmul_gflop_per_s"] > 0
    assert found["ceilings"]["copy_gb_per_s"] > 0
    assert [(used["action"], used["size"]) for used in found["versions"]] == [("encode", 32), ("decode", 32)]


@pytest.mark.usefixtures("in_this_process")
def test_bench_command_prints_a_table_and_the_versions(tiny_folder: str, capsys) -> None:
    assert main(["bench", tiny_folder, "--sizes", "16", "--repeats", "1", "--action", "decode"]) == 0

    text = capsys.readouterr().out
    assert "decode 16, sd-vae" in text
    assert "decode 16, diffusers" in text
    assert "512 MiB" in text
    assert "ceilings: matrix product" in text
    assert "attention       reference" in text
    assert "encode" not in text


@pytest.mark.usefixtures("in_this_process", "without_numba")
def test_bench_command_says_loudly_that_numba_is_missing(tiny_folder: str, capsys) -> None:
    assert main(["bench", tiny_folder, "--sizes", "16", "--repeats", "1", "--action", "decode"]) == 0

    shown = capsys.readouterr()
    assert 'SLOWER THAN IT COULD BE: numba is not installed; pip install "sd-vae[fast]"' in shown.err
    assert "numba is not installed" in shown.out


def test_bench_without_a_vae_runs_sd1() -> None:
    args = bench.Args()

    assert (args.vae, args.sizes, args.action, args.device, args.dtype) == (None, (256, 512), "both", "cpu", "float32")


def test_bench_without_a_vae_runs_the_architecture_of_the_config(tmp_path: Path, tiny_vae: AutoencoderKL) -> None:
    tiny_vae.save_config(tmp_path)

    vae = bench._load(bench.Args(config=str(tmp_path), dtype="bfloat16"))

    assert tuple(vae.config.block_out_channels) == (8, 16)
    assert (vae.dtype, vae.training) == (torch.bfloat16, False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sizes", "17"], "--sizes has 17, it must be a positive multiple of the VAE's factor, 2."),
        (["--sizes", "16", "0"], "--sizes has 0, it must be a positive multiple of the VAE's factor, 2."),
        (["--sizes", "large"], "--sizes is 'large', it must be a whole number. See sd-vae bench --help."),
        (["--sizes"], "--sizes names no size; give at least one, such as --sizes 512."),
        (["--repeats", "0"], "--repeats is 0, it must be at least 1."),
        (["--dtype", "float64"], "float64"),
        (["--device", "cuda"], "--device is cuda, and torch finds no CUDA device here; choose --device cpu."),
    ],
)
def test_bench_command_refuses_in_one_line(
    tiny_folder: str, monkeypatch: pytest.MonkeyPatch, capsys, arguments: list[str], message: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    assert main(["bench", tiny_folder, *arguments]) == 2

    complaint = capsys.readouterr().err
    assert complaint.count("\n") == 1
    assert message in complaint
