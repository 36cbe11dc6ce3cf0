"""Each command once as a process of its own: it is found, starts and explains itself."""

import subprocess
import sys
from pathlib import Path

import pytest

from sd_vae.cli import COMMANDS

SD_VAE = [sys.executable, "-m", "sd_vae"]


@pytest.mark.parametrize(
    ("command", "words"),
    [
        *(([*SD_VAE, name, "--help"], f"sd-vae {name}") for name in COMMANDS),
        ([str(Path(sys.executable).parent / "sd-vae"), "--help"], "sd-vae COMMAND"),
        ([*SD_VAE, "--version"], "sd-vae 0."),
        ([sys.executable, "-m", "training", "--help"], "usage: sd-vae train"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_command_explains_itself(command: list[str], words: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr
    assert words in done.stdout
    assert done.stderr == ""
