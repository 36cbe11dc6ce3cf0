"""The layer contracts hold, and each of them fails when its rule is broken."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def lint(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).parent / "lint-imports"), "--no-cache", "--config", "pyproject.toml"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("file", "planted", "contract"),
    [
        ("sd_vae/files.py", "import training.config", "the library knows neither application"),
        ("sd_vae/images.py", "import eval.metrics", "the library knows neither application"),
        ("sd_vae/files.py", "import sd_vae.cli.console", "only the entry points import the command line"),
        ("training/ema.py", "import eval.metrics", "the applications do not know each other"),
    ],
)
def test_each_layer_contract_fails_when_broken(tmp_path: Path, file: str, planted: str, contract: str) -> None:
    for package in ("sd_vae", "training", "eval"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    path = tmp_path / file
    path.write_text(path.read_text() + f"\n{planted}\n")

    done = lint(tmp_path)

    assert done.returncode == 1, done.stderr
    assert f"{contract} BROKEN" in done.stdout
