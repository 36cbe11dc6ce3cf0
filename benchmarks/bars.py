"""`make bars`: the bars that need ../shared, minutes of CPU or a GPU, measured and appended to benchmarks/bars.md.

Each bar is a function that returns its figure and whether it is met; one that cannot run here says why and is recorded
as not run. `python -m benchmarks.bars NAME ...` runs some of them.
"""

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.figures import Figure, all_met
from sd_vae.files import write_text
from sd_vae.images import list_images, open_image

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
KODAK = SHARED / "data" / "kodak24"
ALEXNET = SHARED / "weights" / "alexnet_features_torchvision.pth"
NO_SHARED = "not run: needs the folder shared/ beside the checkout"
TABLE = ROOT / "benchmarks" / "bars.md"
HEAD = """# Bars

Appended by `make bars`; the newest run is last. A bar that could not run says why.
"""


@dataclass(frozen=True, kw_only=True)
class Result:
    """What came of one bar."""

    met: bool | None
    """None where it could not run."""
    figure: str
    """What was measured, or why it was not."""


def sd1_parity() -> Result:
    """The full sd1 preset against diffusers: 512x512, outputs, moments, and gradients at 256x256, bar 1e-5."""
    from sd_vae.autoencoder import AutoencoderKL

    torch.manual_seed(0)
    ours = AutoencoderKL.from_preset("sd1")
    theirs = ours.to_diffusers()
    x = torch.rand(1, 3, 512, 512) * 2 - 1
    worst = {}
    with torch.no_grad():
        moments = [vae.encode(x).latent_dist.parameters for vae in (ours, theirs)]
        worst["moments"] = _relative(*moments)
        z = moments[1][:, :4]
        worst["decode"] = _relative(ours.decode(z).sample, theirs.decode(z).sample)
    gradients = []
    for vae in (ours, theirs):
        posterior = vae.encode(x[..., :256, :256]).latent_dist
        (vae.decode(posterior.mean).sample.square().mean() + 1e-6 * posterior.kl().mean()).backward()
        # Both hold the same parameters, so the gradient is taken away before the other's turn.
        gradients.append({name: parameter.grad for name, parameter in vae.named_parameters()})
        vae.zero_grad(set_to_none=True)
    worst["gradients"] = max(_relative(gradients[0][name], value) for name, value in gradients[1].items())
    figure = ", ".join(f"{name} {value:.1e}" for name, value in worst.items()) + " of the largest magnitude (bar 1e-5)"
    return Result(met=max(worst.values()) <= 1e-5, figure=figure)


def upstream_conformance() -> Result:
    """Diffusers' own tests with our class in place of theirs: the same outcome test by test."""
    tests = os.environ.get("DIFFUSERS_TESTS")
    if not tests:
        return Result(met=None, figure="not run: set DIFFUSERS_TESTS to the tests/ of a diffusers checkout")
    command = [sys.executable, "benchmarks/upstream_conformance.py", "--diffusers-tests", tests, "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 1):
        return Result(met=None, figure=f"not run: {done.stderr.strip()[-200:]}")
    found = json.loads(done.stdout)
    counts = ", ".join(f"{count} {outcome}" for outcome, count in sorted(found["counts"]["sd_vae"].items()))
    return Result(met=done.returncode == 0, figure=f"{counts}; {len(found['different'])} differ from diffusers")


def shared_tests() -> Result:
    """The tests that need ../shared: LPIPS value and gradient on Kodak pairs, the 248 names."""
    if not SHARED.is_dir():
        return Result(met=None, figure=NO_SHARED)
    command = [sys.executable, "-m", "pytest", "-m", "shared", "-rs"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return Result(met=done.returncode == 0, figure=f"pytest -m shared: {done.stdout.strip().splitlines()[-1]}")


def demo() -> Result:
    """`sd-vae demo`: held-out PSNR at least 1 dB above 16x16 box averages, latents that matter, same numbers twice."""
    with tempfile.TemporaryDirectory() as folder:
        reports = []
        durations = []
        for name in ("one", "two"):
            started = time.perf_counter()
            command = [sys.executable, "-m", "sd_vae", "demo", "--out", f"{folder}/{name}", "--json"]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
            if done.returncode:
                return Result(met=False, figure=f"exit code {done.returncode}: {done.stderr.strip()[-200:]}")
            durations.append(time.perf_counter() - started)
            reports.append(json.loads(done.stdout))
    report = reports[0]
    psnr = {row["name"]: row["means"]["psnr_db"] for row in report["evaluation"]["rows"]}
    facts = next(part["facts"] for part in report["sections"] if part["title"] == "What was checked")
    swapped = [float(value.split()[0]) for name, value in facts.items() if name.startswith("PSNR from")]
    difference = float(facts["Difference to plain diffusers"].split()[0])
    tuned = psnr["fine-tuned"]
    above = tuned - psnr["16x16 box average"]
    same = reports[0]["evaluation"] == reports[1]["evaluation"]
    figure = (
        f"{psnr['mini']:.2f} dB, fine-tuned {tuned:.2f}, {above:+.2f} to the 16x16 box average (bar +1), "
        f"{tuned - psnr['8x8 box average']:+.2f} to the 8x8 one (aim 0); zeros and swapped latents lose "
        f"{tuned - max(swapped):.1f} dB or more (bar 5); diffusers differs by {difference:.1e} (bar 1e-5); "
        f"{max(durations):.0f} s (bar 300); two runs {'equal' if same else 'differ'}"
    )
    met = above >= 1 and tuned - max(swapped) >= 5 and difference <= 1e-5 and same and max(durations) <= 300
    return Result(met=met, figure=figure)


def banded_memory() -> Result:
    """Row bands against diffusers untiled, fresh processes: decode 512 and 1024, encode 1024, decode 2048."""
    if sys.platform != "linux":
        return Result(met=None, figure="not run: reads resident memory from /proc, which needs Linux")
    from benchmarks.memory import BASELINE, compare

    musts = {("decode", 512): (0.5, 0.8), ("decode", 1024): (0.5, 0.75), ("encode", 1024): (0.8, 0.75)}
    met, parts = True, []
    for (task, size), (memory, seconds) in musts.items():
        ours = compare(task, size, 3 if size == 512 else 1, (BASELINE, "ours tiling"))[1]
        assert ours.memory_ratio is not None
        assert ours.time_ratio is not None
        assert ours.difference is not None
        met &= ours.memory_ratio <= memory and ours.time_ratio <= seconds and ours.difference <= 1e-4
        parts.append(
            f"{task} {size}x{size} {ours.memory_ratio:.2f}x memory (bar {memory}), {ours.time_ratio:.2f}x time "
            f"(bar {seconds}), difference {ours.difference:.1e} (bar 1e-4)"
        )
    large = compare("decode", 2048, 1, ("ours tiling",))[0]
    parts.append(f"decode 2048x2048 {large.peak_gib:.2f} GiB (bar 6) in {large.seconds:.0f} s")
    return Result(met=met and large.peak_gib <= 6, figure="; ".join(parts))


def memory_plan() -> Result:
    """`plan_memory` against resident memory on 12 combinations of size, batch and dtype, in bands and untiled."""
    if sys.platform != "linux":
        return Result(met=None, figure="not run: reads resident memory from /proc, which needs Linux")
    from benchmarks.memory import PLAN_RUNS, measure_plan

    worst = measure_plan()
    figure = f"largest error {worst:.0%} over {len(PLAN_RUNS)} combinations, each in bands and untiled (bar 15%)"
    return Result(met=worst <= 0.15, figure=figure)


def cpu_speed() -> Result:
    """Decode and encode 512x512 against diffusers on the CPU: fp32 2.0x, 1.4x with its allocator tuned; bf16."""
    from benchmarks import speed

    return _of_figures(speed.measure())


def training_step() -> Result:
    """A step at 128x128, batch 4, against diffusers' module: 1.2x in fp32; autocast 1.9x, 1.0x against its own."""
    from benchmarks import training_step as benchmark

    return _of_figures(benchmark.measure())


def trainer_step() -> Result:
    """All that the trainer does in a step, against the step of diffusers' script with the same losses: 1.2x."""
    from benchmarks import trainer_step as benchmark

    return _of_figures(benchmark.measure())


def encode_throughput() -> Result:
    """JPEG files to latents at 256x256 with the sd1 preset, against diffusers in a loop over a DataLoader: 1.8x."""
    from benchmarks import encode

    return _of_figures(encode.measure())


def encode_memory() -> Result:
    """Memory while 10,000 pictures are encoded: flat after the first fifth, within 2%."""
    if sys.platform != "linux":
        return Result(met=None, figure="not run: reads resident memory from /proc, which needs Linux")
    from benchmarks import encode

    first, rest = encode.measure_memory()
    growth = rest / first - 1
    figure = f"{first:.0f} MiB at most in the first 2,000 of {encode.NUM_SMALL:,} pictures, {rest:.0f} in the rest"
    return Result(met=growth <= encode.MAX_GROWTH, figure=f"{figure}: {growth:+.1%} (bar {encode.MAX_GROWTH:.0%})")


def gpu_speed() -> Result:
    """Decode 512x512 in bf16 on a GPU: 1.6 times the counted floor, 1.2x diffusers compiled in channels_last."""
    if not torch.cuda.is_available():
        return Result(met=None, figure="not run: torch finds no CUDA device")
    from benchmarks import gpu
    from sd_vae.autoencoder import AutoencoderKL

    torch.manual_seed(0)
    vae = AutoencoderKL.from_preset("sd1").eval().to("cuda", torch.bfloat16)
    with torch.no_grad():
        rows = gpu.measure(vae, "decode", 512, 1, rounds=30)
    ours = next(row for row in rows if row.way == "ours compiled")
    assert ours.floor is not None
    figure = (
        f"{ours.median_ms:.2f} ms, {ours.floor:.2f} times the floor (bar 1.6), {ours.speedup:.2f}x diffusers compiled "
        f"(bar 1.2), difference to fp32 {ours.difference:.1e}"
    )
    return Result(met=ours.floor <= 1.6 and ours.speedup >= 1.2, figure=figure)


def mini() -> Result:
    """What ships beside TAESD on Kodak: 1 dB better, a lower LPIPS, no more time; variances within 10% of 1."""
    if not SHARED.is_dir():
        return Result(met=None, figure=NO_SHARED)
    from benchmarks import mini_bars, mini_data

    with tempfile.TemporaryDirectory() as folder:
        mini_data.pack(SHARED / "data" / "photos_train", Path(folder) / "data")
        measured = mini_bars.measure_all(
            "mini",
            kodak=str(KODAK),
            taesd=str(SHARED / "weights" / "taesd.f8e4m3.safetensors"),
            photos=f"{folder}/data/train",
            holdout=f"{folder}/data/holdout",
            backbone=str(ALEXNET),
        )
    return _of_figures(measured.figures)


def mini_perceptual() -> Result:
    """The distilled network: rank correlation 0.95, as fast as LPIPS-alex, a `mini` trained with it within 10%."""
    if not SHARED.is_dir():
        return Result(met=None, figure=NO_SHARED)
    from benchmarks import mini_data
    from benchmarks import mini_perceptual as benchmark

    with tempfile.TemporaryDirectory() as folder:
        mini_data.pack(SHARED / "data" / "photos_train", Path(folder) / "data")
        options = {"--train": f"{folder}/data/train", "--photos": KODAK, "--holdout": f"{folder}/data/holdout"}
        options |= {"--alex": ALEXNET, "--work": f"{folder}/work"}
        words = [str(word) for option in options.items() for word in option]
        return _of_figures(benchmark.measure_all(benchmark.parse(["mini", *words])))


def compression() -> Result:
    """`sd-vae compress` on Kodak: quantisation costs at most 0.3 dB, a 10 MB picture becomes at most 100 KB."""
    if not SHARED.is_dir():
        return Result(met=None, figure=NO_SHARED)
    from benchmarks import compression as benchmark

    rows, large_bytes = benchmark.measure_all("mini", [open_image(path) for path in list_images(KODAK)], str(ALEXNET))
    return _of_figures(benchmark.to_figures(rows, large_bytes))


def anomaly() -> Result:
    """AUROC of `sd-vae anomaly` on held-out photos with defects, by the score of the kind: 0.9 for each."""
    if not SHARED.is_dir():
        return Result(met=None, figure=NO_SHARED)
    from benchmarks import anomaly as benchmark

    with tempfile.TemporaryDirectory() as folder:
        benchmark.make_photos(SHARED / "data" / "photos_train", Path(folder), size=256, limit=1200)
        return _of_figures(benchmark.to_figures(benchmark.measure_defects("mini", Path(folder), 256, 3000)))


BARS: dict[str, Callable[[], Result]] = {
    "sd1_parity": sd1_parity,
    "upstream_conformance": upstream_conformance,
    "shared_tests": shared_tests,
    "demo": demo,
    "cpu_speed": cpu_speed,
    "training_step": training_step,
    "trainer_step": trainer_step,
    "encode_throughput": encode_throughput,
    "encode_memory": encode_memory,
    "gpu_speed": gpu_speed,
    "banded_memory": banded_memory,
    "memory_plan": memory_plan,
    "mini": mini,
    "mini_perceptual": mini_perceptual,
    "compression": compression,
    "anomaly": anomaly,
}


def main() -> int:
    """Run bars, append the table, and return 1 where one is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(BARS)}; all by default")
    names = parser.parse_args().names or list(BARS)
    unknown = [name for name in names if name not in BARS]
    if unknown:
        parser.error(f"unknown bar {unknown[0]!r}; choose from {', '.join(BARS)}")
    results = {}
    for name in names:
        print(f"{name} ...", flush=True)
        results[name] = BARS[name]()
        print(f"{name}: {_verdict(results[name])}: {results[name].figure}", flush=True)
    append(results)
    return int(any(result.met is False for result in results.values()))


def append(results: dict[str, Result]) -> None:
    """Add a dated table to benchmarks/bars.md."""
    command = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
    rows = [f"| {name} | {_verdict(result)} | {result.figure} |" for name, result in results.items()]
    lines = [
        f"## {datetime.date.today().isoformat()}, commit {commit}",
        "",
        f"{_machine()}; torch {torch.__version__}",
        "",
        "| bar | verdict | figure |",
        "|---|---|---|",
        *rows,
    ]
    text = TABLE.read_text(encoding="utf-8") if TABLE.exists() else HEAD
    write_text(TABLE, text + "\n" + "\n".join(lines) + "\n")


def _of_figures(figures: list[Figure]) -> Result:
    """Several figures as one bar: met where every one that could run is; not run where none could."""
    return Result(met=all_met(figures), figure="; ".join(map(str, figures)))


def _verdict(result: Result) -> str:
    return {True: "met", False: "MISSED", None: "not run"}[result.met]


def _machine() -> str:
    """Kind of machine, without its name."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name(0)
    return f"{platform.machine()} CPU, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"


def _relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Largest difference relative to the largest magnitude."""
    return float((ours - theirs).abs().max() / theirs.abs().max())


if __name__ == "__main__":
    sys.exit(main())
