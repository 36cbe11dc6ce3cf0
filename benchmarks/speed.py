"""Decode and encode on the CPU beside diffusers as people run it: `python -m benchmarks.speed`, some ten minutes.

The sd1 preset with the same random weights, batch 1, both in one process and in turns; a figure is the median over the
rounds of diffusers' time over ours. A second process gives both the allocator trick, after which freed memory stays
with the process (glibc's mallopt): what is left of the lead is not page faults. bf16 runs where the CPU computes in it.
Appended to benchmarks/speed.md unless the size is another than the bars'.
"""

import argparse
import copy
import ctypes
import json
import math
import subprocess
import sys
from dataclasses import asdict
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from benchmarks.figures import ROOT, Figure, all_met, append, lacks_bfloat16, to_markdown
from sd_vae.autoencoder import AutoencoderKL
from sd_vae.benchmarking import median_ratio, relative_difference, take_turns
from sd_vae.benchmarking.inputs import caller, random_input
from sd_vae.config import PRESETS

TABLE = ROOT / "benchmarks" / "speed.md"
HEAD = """# Speed on the CPU

Appended by `python -m benchmarks.speed`; the newest run is last. Figures are times faster than diffusers, medians of
the ratios within a round, or dB.
"""
SIZE = 512
MAX_DIFFERENCE = 1e-4
"""Of the largest magnitude, fp32."""
BARS: dict[tuple[str, bool], tuple[float, float]] = {
    ("decode", False): (2.0, 3.0),
    ("encode", False): (2.0, 3.3),
    ("decode", True): (1.4, 1.8),
    ("encode", True): (1.4, 1.8),
}
"""Must and aim in fp32, by action and whether the allocator trick is on."""
KEEP = {-4: 0, -1: 2**31 - 1, -2: 64 * 2**20}  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD


def keep_freed_memory() -> str | None:
    """Make glibc keep what is freed, for the rest of this process; return why that cannot be, or None."""
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except OSError:
        return "the allocator trick is glibc's"
    refused = [option for option, value in KEEP.items() if mallopt(option, value) != 1]
    return f"mallopt refused option {refused[0]}" if refused else None


@torch.no_grad()
def measure_float32(vae: AutoencoderKL, size: int, rounds: int, *, keep: bool) -> list[Figure]:
    """Both actions in fp32; `keep` says that the allocator trick is on, and chooses the bars."""
    figures = []
    actions: tuple[Literal["decode", "encode"], ...] = ("decode", "encode")
    for action in actions:
        x = random_input(vae, action, size, size)
        ways = {"ours": caller(vae, action), "diffusers": caller(vae.to_diffusers(), action)}
        results = {name: call(x) for name, call in ways.items()}
        difference = relative_difference(results["ours"], results["diffusers"])
        wall, note = _race({name: partial(call, x) for name, call in ways.items()}, rounds)
        must, aim = BARS[action, keep]
        figure = Figure(
            name=f"{action} {size}, fp32" + (", allocator trick for both" if keep else ""),
            value=wall,
            must=must,
            aim=aim,
            note=f"{note}; difference {difference:.1e}",
            is_correct=difference <= MAX_DIFFERENCE,
        )
        figures.append(figure)
    return figures


@torch.no_grad()
def measure_bfloat16(vae: AutoencoderKL, size: int, rounds: int) -> list[Figure]:
    """Decode in bf16 against diffusers in fp32 and in its best bf16, and how near it is to fp32."""
    bars = {"diffusers fp32": (2.8, 3.6), "diffusers bf16 channels_last": (1.15, 1.3)}
    lacking = lacks_bfloat16()
    if lacking is not None:
        names = [*(f"decode {size}, bf16 against {name}" for name in bars), f"decode {size}, bf16, PSNR to fp32"]
        musts = [*bars.values(), (46.0, None)]
        return [
            Figure(name=name, value=None, must=must, aim=aim, note=lacking)
            for name, (must, aim) in zip(names, musts, strict=True)
        ]
    ours = copy.deepcopy(vae).bfloat16()
    theirs = copy.deepcopy(vae).bfloat16().to_diffusers().to(memory_format=torch.channels_last)
    z = random_input(vae, "decode", size, size)
    ways = {
        "ours": partial(caller(ours, "decode"), z.bfloat16()),
        "diffusers fp32": partial(caller(vae.to_diffusers(), "decode"), z),
        "diffusers bf16 channels_last": partial(caller(theirs, "decode"), z.bfloat16()),
    }
    results: dict[str, Tensor] = {name: call() for name, call in ways.items()}
    turns = take_turns(ways, rounds, vae.device)
    walls = {name: [turn.wall_s for turn in taken] for name, taken in turns.items()}
    figures = [
        Figure(
            name=f"decode {size}, bf16 against {name}",
            value=median_ratio(walls[name], walls["ours"]),
            must=must,
            aim=aim,
            note=f"{min(walls['ours']):.2f} s at best",
        )
        for name, (must, aim) in bars.items()
    ]
    exact = results["diffusers fp32"]
    psnrs = {name: psnr_db(results[name], exact) for name in ("ours", "diffusers bf16 channels_last")}
    note = f"diffusers bf16 {psnrs['diffusers bf16 channels_last']:.1f} dB, of the range of values"
    name = f"decode {size}, bf16, PSNR to fp32"
    return [*figures, Figure(name=name, value=psnrs["ours"], must=46.0, note=note)]


def psnr_db(found: Tensor, reference: Tensor) -> float:
    """Peak signal to noise, the peak being the range of the reference's values."""
    error = (found.float() - reference.float()).square().mean()
    return 20 * math.log10(float(reference.max() - reference.min())) - 10 * math.log10(float(error))


def measure(size: int = SIZE, rounds: int = 3, preset: str = "sd1") -> list[Figure]:
    """Everything; the allocator trick in a process of its own."""
    vae = _model(preset)
    figures = measure_float32(vae, size, rounds, keep=False)
    command = [sys.executable, "-m", "benchmarks.speed", "--keep", "--size", str(size), "--rounds", str(rounds)]
    done = subprocess.run([*command, "--preset", preset], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    figures += [Figure(**fields) for fields in json.loads(done.stdout)]
    return figures + measure_bfloat16(vae, size, rounds)


def _race(ways: dict[str, Any], rounds: int) -> tuple[float, str]:
    """How many times faster ours is, and the times in words."""
    turns = take_turns(ways, rounds, torch.device("cpu"))
    wall = {name: [turn.wall_s for turn in taken] for name, taken in turns.items()}
    cpu = {name: [turn.cpu_s for turn in taken] for name, taken in turns.items()}
    processor = median_ratio(cpu["diffusers"], cpu["ours"])
    best = {name: min(times) for name, times in wall.items()}
    note = f"{best['ours']:.2f} s against {best['diffusers']:.2f} s at best; {processor:.2f} in processor time"
    return median_ratio(wall["diffusers"], wall["ours"]), note


def _model(preset: str) -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL.from_preset(preset).eval()


def main(argv: list[str]) -> int:
    """Measure, print the table, keep it where it is the bars' size and model; 1 where a must is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=SIZE, help="pixels of a square picture's side")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--preset", default="sd1", choices=sorted(PRESETS))
    parser.add_argument("--keep", action="store_true", help="only fp32 with the allocator trick, as JSON")
    options = parser.parse_args(argv)
    if options.keep:
        lacking = keep_freed_memory()
        if lacking is not None:
            names = [f"{action} {options.size}, fp32, allocator trick for both" for action in ("decode", "encode")]
            figures = [Figure(name=name, value=None, must=1.4, aim=1.8, note=lacking) for name in names]
        else:
            figures = measure_float32(_model(options.preset), options.size, options.rounds, keep=True)
        print(json.dumps([asdict(figure) for figure in figures]))
        return 0
    figures = measure(options.size, options.rounds, options.preset)
    table = to_markdown(figures)
    print(table)
    if (options.size, options.preset) == (SIZE, "sd1"):
        append(TABLE, HEAD, table, " ".join(["python -m benchmarks.speed", *argv]))
    return int(all_met(figures) is False)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
