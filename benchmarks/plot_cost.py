"""What encoding and decoding cost against the number of pixels: `python -m benchmarks.plot_cost`, some minutes.

On the left seconds of a decode, ours and diffusers', beside a line through the origin: convolution costs the same for
every pixel. On the right what bends it for large pictures: the share that the attention of the middle block, which
grows with the square of the pixels, has in the operations, counted and not timed. Writes benchmarks/cost.png, and the
numbers to benchmarks/cost.md.
"""

import argparse
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

import torch

from benchmarks.figures import ROOT, append
from sd_vae.autoencoder import AutoencoderKL
from sd_vae.benchmarking import count_flops, take_turns
from sd_vae.benchmarking.inputs import caller, random_input
from sd_vae.config import PRESETS, VAEConfig

TABLE = ROOT / "benchmarks" / "cost.md"
PLOT = ROOT / "benchmarks" / "cost.png"
HEAD = """# Cost against pixels

Appended by `python -m benchmarks.plot_cost`; the newest run is last and is the one in cost.png. Seconds are medians of
calls in turns; GFLOP and attention's share are counted on the plain network.
"""
COUNTED_SIZES = (256, 512, 1024, 2048, 4096)


@dataclass(frozen=True, kw_only=True)
class Point:
    """One size."""

    size: int
    """Pixels of a side."""
    seconds: dict[str, float]
    """Of a decode, by way; empty where it was only counted."""
    gflop: dict[str, float]
    """Of each action."""
    attention: dict[str, float]
    """Share of attention in them."""


def measure(preset: str, sizes: list[int], rounds: int) -> list[Point]:
    """Every size that is timed or counted, the smallest first."""
    torch.manual_seed(0)
    vae = AutoencoderKL.from_preset(preset).eval()
    return [
        _point(PRESETS[preset], size, _time(vae, size, rounds) if size in sizes else {})
        for size in sorted({*sizes, *COUNTED_SIZES})
    ]


@torch.no_grad()
def _time(vae: AutoencoderKL, size: int, rounds: int) -> dict[str, float]:
    z = random_input(vae, "decode", size, size)
    ways = {"sd-vae": partial(caller(vae, "decode"), z), "diffusers": partial(caller(vae.to_diffusers(), "decode"), z)}
    for call in ways.values():
        call()
    turns = take_turns(ways, rounds, vae.device)
    return {name: median(turn.wall_s for turn in taken) for name, taken in turns.items()}


def _point(config: VAEConfig, size: int, seconds: dict[str, float]) -> Point:
    encode, decode = count_flops(config, "encode", size, size), count_flops(config, "decode", size, size)
    return Point(
        size=size,
        seconds=seconds,
        gflop={"encode": encode.total / 1e9, "decode": decode.total / 1e9},
        attention={"encode": encode.attention / encode.total, "decode": decode.attention / decode.total},
    )


def draw(points: list[Point], path: Path) -> None:
    """Write the plot."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    timed = [point for point in points if point.seconds]
    megapixels = [point.size**2 / 1e6 for point in timed]
    for name, color in (("diffusers", "tab:gray"), ("sd-vae", "tab:blue")):
        seconds = [point.seconds[name] for point in timed]
        rate = sum(m * s for m, s in zip(megapixels, seconds, strict=True)) / sum(m * m for m in megapixels)
        left.plot(megapixels, seconds, "o", color=color, label=f"{name}, {rate:.3g} s a megapixel")
        left.plot([0, megapixels[-1]], [0, rate * megapixels[-1]], "-", color=color, linewidth=1)
    left.set(xlabel="megapixels", ylabel="seconds", title="decode: cost is linear in the pixels", xlim=0, ylim=0)
    left.legend(frameon=False)
    for action, style in (("encode", "s--"), ("decode", "o-")):
        shares = [100 * point.attention[action] for point in points]
        right.plot([point.size for point in points], shares, style, color="tab:blue", label=action)
    right.set_xscale("log", base=2)
    right.set_xticks([point.size for point in points], [str(point.size) for point in points], fontsize=8)
    right.set(xlabel="pixels a side", ylabel="percent of the operations", title="attention's share")
    right.legend(frameon=False)
    figure.savefig(path, dpi=110)


def to_markdown(points: list[Point]) -> str:
    """The table."""
    lines = [
        "| pixels a side | sd-vae s | diffusers s | encode GFLOP | decode GFLOP | attention, encode | decode |",
        "|" + "---|" * 7,
    ]
    for point in points:
        ours, theirs = (f"{point.seconds[name]:.2f}" if point.seconds else "-" for name in ("sd-vae", "diffusers"))
        counts = " | ".join(f"{point.gflop[action]:.0f}" for action in ("encode", "decode"))
        shares = " | ".join(f"{point.attention[action]:.1%}" for action in ("encode", "decode"))
        lines.append(f"| {point.size} | {ours} | {theirs} | {counts} | {shares} |")
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    """Measure, print the table, draw and keep it where the model is sd1."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[128, 256, 384, 512], help="timed, pixels of a side")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--preset", default="sd1", choices=sorted(PRESETS))
    options = parser.parse_args(argv)
    points = measure(options.preset, options.sizes, options.rounds)
    table = to_markdown(points)
    print(table)
    if options.preset == "sd1":
        draw(points, PLOT)
        append(TABLE, HEAD, table, " ".join(["python -m benchmarks.plot_cost", *argv]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
