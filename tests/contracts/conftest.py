"""A process in which only diffusers exists: what our files must open in."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

PlainDiffusers = Callable[[str, Path], str]

NO_SD_VAE = """
import sys
sys.modules["sd_vae"] = None  # `import sd_vae` raises ImportError from here on
"""


@pytest.fixture(scope="session")
def plain_diffusers() -> PlainDiffusers:
    """Run a script in a folder, in a process that cannot import sd_vae, and return what it prints."""

    def run(script: str, folder: Path) -> str:
        command = [sys.executable, "-I", "-c", NO_SD_VAE + script]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run
