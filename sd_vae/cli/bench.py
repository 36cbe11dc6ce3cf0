"""`sd-vae bench`: speed, memory and numbers beside diffusers on this machine, and which version of what runs."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from sd_vae.cli import console
from sd_vae.errors import UserError

if TYPE_CHECKING:
    from sd_vae.autoencoder import AutoencoderKL
    from sd_vae.benchmarking import Ceilings, Comparison, VersionsInUse

__all__ = ["Args", "run"]

Action = Literal["encode", "decode"]


@dataclass(frozen=True)
class Args:
    """Measure encode and decode beside diffusers with the same weights, in turns, on this machine.

    Two sizes of the sd1 architecture in both directions take some five minutes on two CPU cores.
    """

    vae: Annotated[tyro.conf.Positional[str | None], tyro.conf.arg(metavar="VAE")] = None
    """VAE to run: a folder, a file or a hub id; by default the sd1 architecture, or that of --config, with random
    weights, which are as fast as any."""
    config: str | None = None
    """Architecture of a file beside which nothing tells, or of the random weights: a config.json, its folder, or a
    preset."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where to run."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Number format of weights and activations, ours and diffusers'; differences are to diffusers in float32."""
    sizes: tuple[int, ...] = (256, 512)
    """Sides of square pictures in pixels, multiples of the VAE's factor."""
    action: Literal["encode", "decode", "both"] = "both"
    """What to measure."""
    repeats: int = 3
    """Timed calls of each; the median counts."""
    json: bool = False
    """Print the result as one JSON object."""


def run(argv: list[str]) -> None:
    """Run the command.

    Args:
        argv: Its arguments.

    Raises:
        UserError: No CUDA device, no VAE there, a size that the factor does not divide, nothing to repeat, or a process
            that the system ended for its memory.
    """
    args = console.parse(Args, argv, command="bench")
    if args.repeats < 1:
        raise UserError(f"--repeats is {args.repeats}, it must be at least 1.")
    if not args.sizes:
        raise UserError("--sizes names no size; give at least one, such as --sizes 512.")

    import torch

    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device is cuda, and torch finds no CUDA device here; choose --device cpu.")
    vae = _load(args)
    wrong = [size for size in args.sizes if size < 1 or size % vae.factor]
    if wrong:
        raise UserError(f"--sizes has {wrong[0]}, it must be a positive multiple of the VAE's factor, {vae.factor}.")

    from sd_vae.ops.dispatch import compiled_unavailable

    lacking = compiled_unavailable() if args.device == "cpu" else None
    if lacking:
        console.say(f"SLOWER THAN IT COULD BE: {lacking}. Until then PyTorch's own operations run.")
    ceilings, comparisons, versions = _measure(vae, args)
    if args.json:
        found = {
            "vae": args.vae or f"{args.config or 'sd1'}, random weights",
            "device": _device_name(args),
            "dtype": args.dtype,
            "num_threads": torch.get_num_threads(),
            "repeats": args.repeats,
            "ceilings": asdict(ceilings),
            "comparisons": [asdict(comparison) for comparison in comparisons],
            "versions": [asdict(used) for used in versions],
            "compiled_unavailable": lacking,
        }
        console.print_json(found)
        return
    _print_comparisons(args, ceilings, comparisons)
    for used in versions:
        _print_versions(used)


def _load(args: Args) -> AutoencoderKL:
    import sd_vae

    if args.vae is not None:
        return sd_vae.load_vae(args.vae, args.config, dtype=args.dtype, device=args.device)
    import torch

    from sd_vae.checkpoints.layouts import read_config

    vae = sd_vae.AutoencoderKL(**read_config(args.config or "sd1").to_dict())
    dtype: Any = getattr(torch, args.dtype)
    # `type`, not `to`: diffusers' `to` warns about a change of dtype, which is harmless here.
    return vae.eval().type(dtype).to(args.device)


def _measure(vae: AutoencoderKL, args: Args) -> tuple[Ceilings, list[Comparison], list[VersionsInUse]]:
    """Everything that is printed."""
    from sd_vae.benchmarking import compare, measure_ceilings, versions_in_use
    from sd_vae.benchmarking.comparison import count_steps

    actions: tuple[Action, ...] = ("encode", "decode") if args.action == "both" else (args.action,)
    tasks = [(action, size) for size in args.sizes for action in actions]
    ceilings = measure_ceilings(vae.device, vae.dtype)
    with _progress(len(tasks) * count_steps(args.repeats)) as step:
        comparisons = [compare(vae, *task, ceilings, rounds=args.repeats, on_step=step) for task in tasks]
    largest = max(args.sizes)
    return ceilings, comparisons, [versions_in_use(vae, action, largest) for action in actions]


@contextmanager
def _progress(total: int) -> Iterator[Callable[[], None]]:
    """A bar on standard error with rate and time left; yields what moves it on."""
    from tqdm import tqdm

    with tqdm(total=total, desc="measuring", unit="call", file=sys.stderr) as bar:

        def step() -> None:
            bar.update()

        yield step


def _device_name(args: Args) -> str:
    """The kind of device, without the machine's name."""
    import torch

    if args.device == "cuda":
        return torch.cuda.get_device_name()
    return f"CPU with {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"


def _print_comparisons(args: Args, ceilings: Ceilings, comparisons: list[Comparison]) -> None:
    """The table, and what its figures are measured by."""
    subject = args.vae or f"{args.config or 'sd1'} with random weights (no slower or faster than others)"
    rows = []
    for found in comparisons:
        for name, side, faster in (("sd-vae", found.ours, f"{found.speedup:.2f}x"), ("diffusers", found.diffusers, "")):
            row = [f"{found.action} {found.size}, {name}", _seconds(side.median_s), faster, _memory(side.memory_gib)]
            rows.append([*row, f"{side.of_ceiling:.0%}", f"{side.difference:.1e}"])
    console.print_table(
        f"{subject}; {args.dtype}, {_device_name(args)}",
        ["pixels a side", "time", "faster", "memory", "of ceiling", "difference"],
        rows,
    )
    print(
        f"time: median of {args.repeats} calls in turns; faster: median of the ratios within a round\n"
        "memory: peak above the weights, libraries that the call loads included\n"
        f"ceilings: matrix product {ceilings.matmul_gflop_per_s:.3g} GFLOP/s, copy {ceilings.copy_gb_per_s:.3g} GB/s\n"
        "of ceiling: the plain network's operations a second; Winograd needs fewer and may pass 100%\n"
        "difference: largest, of the largest magnitude, to diffusers in float32"
    )


def _print_versions(used: VersionsInUse) -> None:
    """Which version each operation runs, and why."""
    how = f"whole maps, as {used.whole}" if used.whole else "maps in row bands, quickest in fp32 on the CPU"
    print(f"\n{used.action} {used.size}: {how}")
    for group in used.groups:
        count = f"{len(group.layers)} layer{'s' * (len(group.layers) > 1)}"
        print(f"  {group.operation:15} {group.version:10} {count:9}  {group.why}; {', '.join(group.widths)}")


def _seconds(value: float) -> str:
    return f"{value:.3g} s" if value >= 1 else f"{value * 1e3:.3g} ms"


def _memory(gib: float | None) -> str:
    return "-" if gib is None else f"{gib:.2f} GiB" if gib >= 1 else f"{gib * 1024:.0f} MiB"
