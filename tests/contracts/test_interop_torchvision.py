"""torch and torchvision of different builds: one line that says what to reinstall, not three libraries' traceback."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

MESSAGE = "torch and torchvision are not of the same build"
REMEDY = "pip install --force-reinstall torch torchvision."


@pytest.fixture
def mismatched(tmp_path: Path) -> dict[str, str]:
    """An environment whose torchvision fails as one built against another torch does."""
    package = tmp_path / "site" / "torchvision"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text('raise RuntimeError("operator torchvision::nms does not exist")\n')
    return {**os.environ, "PYTHONPATH": str(package.parent)}


def run(arguments: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False)


def test_interop_mismatched_torchvision_raises_a_user_error(mismatched) -> None:
    script = "import sd_vae\ntry:\n    sd_vae.AutoencoderKL\nexcept sd_vae.UserError as error:\n    print(error)"

    done = run(["-c", script], mismatched)

    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(MESSAGE)
    assert done.stdout.rstrip().endswith(REMEDY)
    assert len(done.stdout.splitlines()) == 1


def test_interop_mismatched_torchvision_exits_2_on_the_command_line(mismatched, tiny_vae, tmp_path: Path) -> None:
    tiny_vae.save_pretrained(tmp_path / "vae")
    target = tmp_path / "vae.safetensors"

    done = run(["-m", "sd_vae", "convert", str(tmp_path / "vae"), str(target), "--layout", "ldm"], mismatched)

    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"error: {MESSAGE}")
    assert "Traceback" not in done.stderr
    assert not target.exists()
