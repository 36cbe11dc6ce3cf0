"""What the speed benchmarks share: a figure with its bars, and dated tables of them."""

import datetime
import os
import platform
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch

from sd_vae.files import write_text

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One measured ratio, or why it was not measured."""

    name: str
    value: float | None
    """Larger is better; None where it could not be measured."""
    must: float
    aim: float | None = None
    note: str
    """What stands beside the figure, or why there is none."""
    is_correct: bool = True
    """Whether the numbers that were computed so fast are the right ones."""

    @property
    def met(self) -> bool | None:
        """Whether the must is reached with right numbers; None where it was not measured."""
        return None if self.value is None else self.value >= self.must and self.is_correct

    @property
    def verdict(self) -> str:
        """In words."""
        if self.value is None:
            return "not run"
        if not self.met:
            return "MISSED"
        return "met" if self.aim is None or self.value >= self.aim else "met, aim missed"

    def __str__(self) -> str:
        value = "not run" if self.value is None else f"{self.value:.2f}"
        return f"{self.name} {value} ({_bars(self)}; {self.note})"


def all_met(figures: list[Figure]) -> bool | None:
    """Whether every figure that was measured is met; None where none was."""
    measured = [figure.met for figure in figures if figure.met is not None]
    return all(measured) if measured else None


def to_markdown(figures: list[Figure]) -> str:
    """The table."""
    lines = ["| what | figure | bars | verdict | beside it |", "|" + "---|" * 5]
    for figure in figures:
        value = "-" if figure.value is None else f"{figure.value:.2f}"
        lines.append(f"| {figure.name} | {value} | {_bars(figure)} | {figure.verdict} | {figure.note} |")
    return "\n".join(lines)


def append(path: Path, head: str, body: str, command: str) -> None:
    """Add a dated section to a file in benchmarks/, with the hardware and the command that made it."""
    describe = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(describe, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
    text = path.read_text(encoding="utf-8") if path.exists() else head
    title = f"## {datetime.date.today().isoformat()}, commit {commit}"
    write_text(path, f"{text}\n{title}\n\n{machine()}; torch {torch.__version__}, `{command}`\n\n{body}\n")


def machine() -> str:
    """Kind of machine, without its name."""
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{platform.machine()} CPU, {os.cpu_count()} cores, {torch.get_num_threads()} threads, {capability}"


def lacks_bfloat16() -> str | None:
    """Why bf16 is not measured on this CPU; None where it computes in bf16."""
    path = Path("/proc/cpuinfo")
    flags = path.read_text(encoding="utf-8").split() if path.exists() else []
    return None if {"avx512_bf16", "amx_bf16"} & set(flags) else "this CPU has neither avx512_bf16 nor amx_bf16"


def _bars(figure: Figure) -> str:
    return f"must {figure.must:g}" + ("" if figure.aim is None else f", aim {figure.aim:g}")
