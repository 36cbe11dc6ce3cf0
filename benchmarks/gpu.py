"""Decode and encode on a GPU beside diffusers: `python -m benchmarks.gpu`, minutes of one CUDA device.

The same random weights in four ways: ours and diffusers', eager and compiled; diffusers' compiled model in
channels_last too, its best. The ways take turns, each call is timed from an idle device, and what counts is the median
over the turns of a way's time against diffusers compiled. Differences are to diffusers in fp32. Appended to
benchmarks/gpu.md, unless it ran without a GPU: `--device cpu --preset mini --sizes 64` walks through the code, its
times mean nothing.
"""

import argparse
import copy
import datetime
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sd_vae.autoencoder import AutoencoderKL
from sd_vae.compiling import compile_halves
from sd_vae.config import PRESETS
from sd_vae.files import write_text

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "benchmarks" / "gpu.md"
HEAD = """# GPU

Appended by `python -m benchmarks.gpu`; the newest run is last. Times are medians of single calls from an idle device,
"x" the median of the paired ratios to diffusers compiled (above 1 is faster), "floor" the multiple of the least time
counted for an H200 (4 ms for decoding 512x512 in bf16, in proportion to the pixels), "memory" what the allocator
reserved at the first calls beyond what was loaded, "difference" the largest, of the largest magnitude, to fp32.
"""
BASELINE = "diffusers compiled, channels_last"
FLOOR_MS = 4.0
"""Least time of a decode: sd1, bf16, 512x512, batch 1, on an H200; counted, see the head of the table."""

Call = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Row:
    """What one way of running a task came to."""

    task: str
    size: int
    batch_size: int
    way: str
    median_ms: float
    speedup: float
    difference: float
    memory_gib: float | None
    """None where there is no GPU."""
    floor: float | None
    """Multiple of the counted floor; None where none was counted."""


def ways(vae: AutoencoderKL, task: str, device: torch.device) -> dict[str, Call]:
    """The task in every way, by name; each has weights of its own."""
    # Every size is compiled for itself, for both alike; without a GPU nothing is generated.
    options: dict[str, Any] = {"dynamic": False} | ({} if device.type == "cuda" else {"backend": "aot_eager"})
    graphs = options | ({"mode": "reduce-overhead"} if device.type == "cuda" else {})
    ours, ours_compiled = copy.deepcopy(vae), copy.deepcopy(vae)
    compile_halves(ours_compiled, **options)
    theirs = copy.deepcopy(vae).to_diffusers()
    theirs_compiled = copy.deepcopy(vae).to_diffusers().to(memory_format=torch.channels_last)
    setattr(theirs_compiled, task, torch.compile(getattr(theirs_compiled, task), **graphs))
    models = {
        "ours": ours,
        "ours compiled": ours_compiled,
        "diffusers": theirs,
        BASELINE: theirs_compiled,
    }
    return {name: _caller(model, task) for name, model in models.items()}


def _caller(model: Any, task: str) -> Call:
    """Encode or decode, tensor to tensor."""
    if task == "encode":
        return lambda x: model.encode(x, return_dict=False)[0].parameters
    return lambda z: model.decode(z, return_dict=False)[0]


def measure(vae: AutoencoderKL, task: str, size: int, batch_size: int, rounds: int) -> list[Row]:
    """Time every way of one task on one size."""
    device, dtype = vae.device, vae.dtype
    torch.compiler.reset()
    channels, side = (3, size) if task == "encode" else (vae.config.latent_channels, size // vae.factor)
    generator = torch.Generator().manual_seed(0)
    x = (torch.rand(batch_size, channels, side, side, generator=generator) * 2 - 1).to(device, dtype)
    reference = _caller(copy.deepcopy(vae).float().to_diffusers(), task)(x.float())
    calls = ways(vae, task, device)
    differences, memories = {}, {}
    for name, call in calls.items():
        before = _reserved(device)
        for _ in range(3):  # compiling, recording a CUDA graph, replaying it
            result = call(x)
        memories[name] = _peak_reserved(device, before)
        differences[name] = float((result.float() - reference).abs().max() / reference.abs().max())
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(_time_ms(call, x))
    rows = []
    for name, found in times.items():
        median_ms = statistics.median(found)
        is_sd1 = tuple(vae.config.block_out_channels) == (128, 256, 512, 512)
        counted = is_sd1 and task == "decode" and device.type == "cuda" and dtype == torch.bfloat16
        floor_ms = FLOOR_MS * batch_size * (size / 512) ** 2 if counted else None
        row = Row(
            task=task,
            size=size,
            batch_size=batch_size,
            way=name,
            median_ms=median_ms,
            speedup=statistics.median(b / t for b, t in zip(times[BASELINE], found, strict=True)),
            difference=differences[name],
            memory_gib=memories[name],
            floor=None if floor_ms is None else median_ms / floor_ms,
        )
        rows.append(row)
    return rows


def _time_ms(call: Call, x: Tensor) -> float:
    """One call from an idle device to an idle device: by CUDA events, on a CPU by the clock."""
    if x.device.type != "cuda":
        started = time.perf_counter()
        call(x)
        return (time.perf_counter() - started) * 1e3
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    call(x)
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def _reserved(device: torch.device) -> int:
    """Bytes that the allocator holds, with nothing held in vain; the peak starts over."""
    if device.type != "cuda":
        return 0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_reserved()


def _peak_reserved(device: torch.device, before: int) -> float | None:
    """GiB at the peak since `_reserved` beyond what it said."""
    return (torch.cuda.max_memory_reserved() - before) / 2**30 if device.type == "cuda" else None


def to_markdown(rows: list[Row]) -> str:
    """The table."""
    lines = ["| task | size | batch | way | ms | x | floor | memory GiB | difference |", "|" + "---|" * 9]
    for row in rows:
        floor = "-" if row.floor is None else f"{row.floor:.2f}"
        memory = "-" if row.memory_gib is None else f"{row.memory_gib:.2f}"
        lines.append(
            f"| {row.task} | {row.size}x{row.size} | {row.batch_size} | {row.way} | {row.median_ms:.2f} "
            f"| {row.speedup:.2f} | {floor} | {memory} | {row.difference:.1e} |"
        )
    return "\n".join(lines)


def append(table: str, arguments: str) -> None:
    """Add a dated table to benchmarks/gpu.md."""
    command = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
    versions = f"{torch.cuda.get_device_name()}; torch {torch.__version__}, `python -m benchmarks.gpu {arguments}`"
    section = f"## {datetime.date.today().isoformat()}, commit {commit}\n\n{versions.strip()}\n\n{table}\n"
    text = TABLE.read_text(encoding="utf-8") if TABLE.exists() else HEAD
    write_text(TABLE, f"{text}\n{section}")


def main(argv: list[str]) -> int:
    """Measure, print the table, keep it where a GPU ran; 2 where there is none."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--preset", default="sd1", choices=sorted(PRESETS))
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--sizes", type=int, nargs="+", default=[512, 1024], help="pixels of a square picture's side")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--rounds", type=int, default=30)
    options = parser.parse_args(argv)
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        print("needs a CUDA device, and there is none; --device cpu walks through the code.", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    vae = AutoencoderKL.from_preset(options.preset).eval().to(options.device, getattr(torch, options.dtype))
    rows: list[Row] = []
    with torch.no_grad():
        for task in ("decode", "encode"):
            for size in options.sizes:
                for batch_size in options.batch_sizes:
                    rows += measure(vae, task, size, batch_size, options.rounds)
    table = to_markdown(rows)
    print(table)
    if vae.device.type == "cuda":
        append(table, " ".join(argv))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
