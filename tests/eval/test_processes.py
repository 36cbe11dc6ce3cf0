"""Two processes that torchrun starts find what one finds, to the last digit, in every metric and every probe."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from eval.protocols import IMAGE_METRICS, SET_METRICS
from sd_vae.latents.processes import Processes

pytestmark = pytest.mark.slow  # three starts of every network

SCRIPT = Path(__file__).with_name("processes.py")


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("eval_processes", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def results(script: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Any]:
    """What one process finds, and what each of two finds; started once, since starting takes most of the time."""
    cache = tmp_path_factory.mktemp("cache")
    before, threads = torch.hub.get_dir(), torch.get_num_threads()
    script.write_backbones(cache)
    root = SCRIPT.parents[2]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", SCRIPT, cache],
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
        cwd=root,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root), "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    one = json.loads(json.dumps(script.run(Processes(), cache)))
    torch.hub.set_dir(before)
    torch.set_num_threads(threads)
    return one, *(json.loads((cache / f"rank{rank}.json").read_text()) for rank in (0, 1))


def test_two_processes_find_what_one_finds(results: tuple[Any, Any, Any]) -> None:
    one, first, second = results

    assert first == one
    assert second == one


def test_the_comparison_covers_every_metric(results: tuple[Any, Any, Any]) -> None:
    row = results[1]["evaluation"]["rows"][0]

    assert set(IMAGE_METRICS) <= set(row["means"])
    assert set(SET_METRICS) <= set(row["pooled"])
    assert all(value is not None for value in {**row["means"], **row["pooled"]}.values())
    assert results[1]["evaluation"]["checks"]
    assert {"psnr_db", "ssim", "lpips_alex", "kl_per_element"} <= set(results[1]["validation"])
