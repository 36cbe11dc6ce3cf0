"""Memory and time of encode and decode beside diffusers on a CPU: `python -m benchmarks.memory`, ten minutes a round.

Every run is a process of its own: it builds the model (sd1, random weights, the same every time), notes its resident
memory, encodes or decodes once, and reports by how much the kernel's high-water mark lies above what was noted, so
whatever the first call brings along, libraries and compiled kernels among it, is in the figure and in the time. The
ways take turns; a ratio is the median over the turns of a way's figure against diffusers untiled in the same turn.

`--plan` measures other sizes, batches and dtypes than the table's against what `sd_vae.plan_memory` says of them.
Complete tables are appended to benchmarks/memory.md.
"""

import argparse
import ctypes
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.figures import append

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "benchmarks" / "memory.md"
HEAD = """# Memory

Appended by `python -m benchmarks.memory`; the newest run is last. Peaks are resident memory above the loaded weights,
each of a fresh process; "memory" and "time" are fractions of diffusers untiled, medians of the ratios within a round;
"difference" is the largest to diffusers untiled, of the largest magnitude. Random weights of `sd1`.
"""
GIB = 2**30
BASELINE = "diffusers"
WAYS = (BASELINE, "diffusers tiling", "ours tiling")
TASKS = (("decode", 512), ("decode", 1024), ("encode", 1024), ("decode", 2048))
TOO_LARGE = 2048
"""Pixels a side from which on diffusers is left out: untiled it takes 15.5 GiB."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One encode or decode in a process of its own."""

    way: str
    """One of WAYS, "ours untiled" (the plain forward pass), or "ours" (as people call it)."""
    task: str
    height: int
    """Pixels."""
    width: int
    batch_size: int = 1
    dtype: str = "float32"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of a run."""

    peak_gib: float
    """Above the loaded weights."""
    seconds: float
    """Of the process's first call."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """What one way of a task came to over all turns."""

    task: str
    size: int
    way: str
    peak_gib: float
    seconds: float
    memory_ratio: float | None
    """None where diffusers untiled did not run."""
    time_ratio: float | None
    difference: float | None
    """Largest to diffusers untiled, of the largest magnitude."""


PLAN_RUNS = tuple(
    Run(way="ours tiling", task=task, height=height, width=width, batch_size=batch_size, dtype=dtype)
    for task, height, width, batch_size, dtype in (
        ("decode", 512, 512, 1, "float32"),
        ("decode", 520, 776, 1, "float32"),
        ("decode", 384, 640, 2, "float32"),
        ("decode", 392, 456, 3, "float32"),
        ("decode", 1032, 344, 1, "float32"),
        ("decode", 640, 512, 1, "bfloat16"),
        ("decode", 392, 584, 2, "bfloat16"),
        ("encode", 640, 640, 1, "float32"),
        ("encode", 1016, 344, 1, "float32"),
        ("encode", 456, 520, 3, "float32"),
        ("encode", 640, 512, 2, "bfloat16"),
        ("encode", 1000, 904, 1, "bfloat16"),
    )
)
"""Sizes, batches and dtypes that the plan was not fitted to."""


def measure(run: Run, result: Path | None = None) -> Outcome:
    """Do a run in a fresh process; its output goes to a file where one is named."""
    command = [sys.executable, "-m", "benchmarks.memory", "--run", json.dumps(asdict(run))]
    command += [] if result is None else ["--result", str(result)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{run} ended with {done.returncode}: {done.stderr.strip()[-500:]}")
    return Outcome(**json.loads(done.stdout.splitlines()[-1]))


def perform(run: Run, result: Path | None) -> Outcome:
    """Do a run in this process, which has done nothing else."""
    from sd_vae import ops
    from sd_vae.autoencoder import AutoencoderKL

    torch.manual_seed(0)
    vae = AutoencoderKL.from_preset("sd1").eval().to(getattr(torch, run.dtype))
    model: Any = vae.to_diffusers() if run.way.startswith("diffusers") else vae
    if run.way.endswith("tiling"):
        model.enable_tiling()
    plain = ops.reference() if run.way == "ours untiled" and run.dtype == "float32" else nullcontext()
    call: Callable[[Tensor], Tensor] = lambda x: (  # noqa: E731
        model.encode(x).latent_dist.parameters if run.task == "encode" else model.decode(x).sample
    )
    scale, channels = (1, 3) if run.task == "encode" else (vae.factor, vae.config.latent_channels)
    shape = (run.batch_size, channels, run.height // scale, run.width // scale)
    ctypes.CDLL(None).malloc_trim(0)  # what was freed while loading is not to hide what the call takes
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts over
    before = _memory_bytes("VmRSS")
    with torch.no_grad(), plain:
        x = torch.rand(shape, generator=torch.Generator().manual_seed(1)).mul_(2).sub_(1).to(vae.dtype)
        started = time.perf_counter()
        y = call(x)
        seconds = time.perf_counter() - started
    peak = _memory_bytes("VmHWM") - before
    if result is not None:
        torch.save(y.float(), result)
    return Outcome(peak_gib=peak / GIB, seconds=seconds)


def _memory_bytes(field: str) -> int:
    """A field of /proc/self/status: VmRSS is resident memory now, VmHWM its peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}; this needs Linux.")


def compare(task: str, size: int, rounds: int, ways: tuple[str, ...]) -> list[Row]:
    """Run a task in turns, every way once a turn."""
    outcomes: dict[str, list[Outcome]] = {way: [] for way in ways}
    with tempfile.TemporaryDirectory() as folder:
        files = {way: Path(folder) / f"{way}.pt" for way in ways}
        for _ in range(rounds):
            for way in ways:
                run = Run(way=way, task=task, height=size, width=size)
                outcomes[way].append(measure(run, files[way]))
        results = {way: torch.load(file, weights_only=True) for way, file in files.items()}
    return [
        Row(
            task=task,
            size=size,
            way=way,
            peak_gib=statistics.median(outcome.peak_gib for outcome in found),
            seconds=statistics.median(outcome.seconds for outcome in found),
            memory_ratio=_median_ratio(found, outcomes.get(BASELINE), "peak_gib"),
            time_ratio=_median_ratio(found, outcomes.get(BASELINE), "seconds"),
            difference=_relative(results[way], results[BASELINE]) if BASELINE in results else None,
        )
        for way, found in outcomes.items()
    ]


def _median_ratio(found: list[Outcome], against: list[Outcome] | None, field: str) -> float | None:
    if against is None:
        return None
    return statistics.median(getattr(a, field) / getattr(b, field) for a, b in zip(found, against, strict=True))


def _relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


def plan_errors() -> Iterator[tuple[Run, float, float]]:
    """Each of PLAN_RUNS in bands and as a plain forward pass: the run, its measured GiB and its predicted GiB."""
    from sd_vae import plan_memory
    from sd_vae.config import PRESETS

    for run in PLAN_RUNS:
        plan = plan_memory(
            PRESETS["sd1"],
            run.height,
            run.width,
            getattr(torch, run.dtype),
            action=run.task,  # type: ignore[arg-type]
            batch_size=run.batch_size,
        )
        yield run, measure(run).peak_gib, plan.banded_gib
        untiled = Run(**asdict(run) | {"way": "ours untiled"})
        yield untiled, measure(untiled).peak_gib, plan.untiled_gib


def measure_plan() -> float:
    """Measure what `plan_memory` predicts, append the table to benchmarks/memory.md, and return the largest error."""
    lines = ["| run | way | measured GiB | predicted GiB | error |", "|---|---|--:|--:|--:|"]
    errors = []
    for run, measured, predicted in plan_errors():
        size = f"{run.task} {run.batch_size} x {run.height}x{run.width} {run.dtype}"
        errors.append(predicted / measured - 1)
        lines.append(f"| {size} | {run.way} | {measured:.3f} | {predicted:.3f} | {errors[-1]:+.0%} |")
        print(lines[-1], flush=True)
    append(TABLE, HEAD, "\n".join(lines), "python -m benchmarks.memory --plan")
    return max(map(abs, errors))


def to_markdown(rows: list[Row]) -> str:
    """The table."""
    lines = ["| task | way | peak GiB | memory | s | time | difference |", "|---|---|--:|--:|--:|--:|--:|"]
    for row in rows:
        memory, seconds = ("-" if ratio is None else f"{ratio:.2f}x" for ratio in (row.memory_ratio, row.time_ratio))
        difference = "-" if row.difference is None else f"{row.difference:.1e}"
        lines.append(
            f"| {row.task} {row.size}x{row.size} | {row.way} | {row.peak_gib:.3f} | {memory} | {row.seconds:.1f} "
            f"| {seconds} | {difference} |"
        )
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=[f"{task}:{size}" for task, size in TASKS], metavar="TASK:SIZE")
    parser.add_argument("--ways", nargs="+", default=WAYS, choices=WAYS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--plan", action="store_true", help="measure what plan_memory predicts, and nothing else")
    parser.add_argument("--run", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.run is not None:
        print(json.dumps(asdict(perform(Run(**options.run), options.result))))
        return 0
    command = " ".join(["python -m benchmarks.memory", *argv])
    if options.plan:
        measure_plan()
        return 0
    rows: list[Row] = []
    for name in options.tasks:
        task, _, size = name.partition(":")
        ways = tuple(way for way in options.ways if int(size) < TOO_LARGE or way.startswith("ours"))
        rows += compare(task, int(size), options.rounds, ways)
    table = to_markdown(rows)
    print(table)
    if options.tasks == parser.get_default("tasks") and set(options.ways) == set(WAYS):
        append(TABLE, HEAD, table, command)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
