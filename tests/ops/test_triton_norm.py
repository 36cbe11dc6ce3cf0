"""The fused GroupNorm: its numbers in Triton's interpreter, its compilation for a GPU, its domain.

The figures come from `triton_cases`, run once in a process of its own; a GPU is never needed.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from ops_cases import fake_map

from sd_vae.ops import triton_norm

CASES = Path(__file__).with_name("triton_cases.py")


def run_cases(what: str, **environment: str) -> Any:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("needs triton, which this platform has not")
    done = subprocess.run(
        [sys.executable, str(CASES), what], env=os.environ | environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def figures() -> dict[str, Any]:
    return run_cases("figures", TRITON_INTERPRET="1")


# Of the largest magnitude, against fp64, log-normal gains; the worst of 20 seeds on maps up to 24x24 is in the comment.
@pytest.mark.parametrize(
    ("case", "bound"),
    [
        ("float32", 5e-7),  # 1.9e-7
        ("without_silu", 5e-7),  # 1.9e-7
        ("full_tiles", 5e-7),  # 1.5e-7
        ("float16", 1e-3),  # 4.5e-4, half a unit in the last place
        ("bfloat16", 8e-3),  # 6.4e-3: the interpreter cuts bf16 off, where a GPU rounds it
        ("near_overflow", 1e-3),  # 3.8e-4; fp16 values up to 6e4, whose squares fp16 does not hold
        ("mean_100", 3e-5),  # 1.1e-5 where the mean is 100 deviations off; torch's fp32 group_norm is 4e-4 to 8e-3 off
        ("mean_10000", 3e-3),  # 1.2e-3, as x itself is rounded to 1e-3 of a deviation; torch's is off by more than 1
        ("constant_map", 0),
    ],
)
def test_group_norm_silu_equals_reference(figures: dict[str, Any], case: str, bound: float) -> None:
    assert figures[case] <= bound


@pytest.mark.parametrize("fact", ["batch_equals_images", "keeps_format", "leaves_x_alone"])
def test_group_norm_silu_holds(figures: dict[str, Any], fact: str) -> None:
    assert figures[fact]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("fact", ["sums_equal", "norms_equal"])
def test_add_with_statistics_is_bit_equal(figures: dict[str, Any], dtype: str, fact: str) -> None:
    # bf16 is left out: the interpreter cuts it off, torch rounds it.
    assert figures[f"{dtype}_residual"][fact]


def test_kernels_compile_for_a_gpu(tmp_path: Path) -> None:
    compiled = run_cases("compile", TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path))

    assert len(compiled) == 6


@pytest.mark.usefixtures("ampere")
def test_supports_takes_its_domain() -> None:
    with torch.no_grad():
        assert triton_norm.supports(fake_map(), 4) is None


@pytest.mark.usefixtures("ampere")
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"device": "cpu"}, "x is on the cpu, not on a CUDA device"),
        ({"dtype": torch.float64}, "x has dtype torch.float64, not float32, float16 or bfloat16"),
        ({"shape": (2, 12, 35)}, r"x has shape \(2, 12, 35\), not \(B, D, H, W\)"),
        ({"shape": (0, 12, 5, 7)}, "with at least one value"),
        ({"format": torch.contiguous_format}, "x is not channels_last"),
        ({"shape": (2, 10, 5, 7)}, "10 channels do not divide into 4 groups"),
    ],
)
def test_supports_names_what_is_outside(changes: dict[str, Any], reason: str) -> None:
    with torch.no_grad():
        found = triton_norm.supports(fake_map(**changes), 4)

    assert found is not None
    assert re.search(reason, found)


@pytest.mark.usefixtures("ampere")
def test_supports_refuses_gradients() -> None:
    assert triton_norm.supports(fake_map(), 4) == "gradients are on, and the kernels have none"


@pytest.mark.usefixtures("ampere")
def test_supports_refuses_an_old_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))

    with torch.no_grad():
        assert triton_norm.supports(fake_map(), 4) == "the GPU has compute capability 7.5, Triton needs 8.0"


@pytest.mark.usefixtures("ampere")
def test_supports_refuses_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_norm, "_triton_is_installed", lambda: False)

    with torch.no_grad():
        assert triton_norm.supports(fake_map(), 4) == "triton is not installed"


def test_supports_leaves_fusing_to_the_compiler() -> None:
    reasons = []

    def ask(x: torch.Tensor) -> torch.Tensor:
        reasons.append(triton_norm.supports(x, 4))
        return x + 1

    torch.compile(ask, backend="eager", fullgraph=True)(torch.ones(1, 4, 2, 2))

    assert reasons == ["torch.compile fuses the plain operations itself"]
