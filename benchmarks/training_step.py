"""One training step on the CPU beside diffusers' module: `python -m benchmarks.training_step`, some minutes.

The sd1 preset at 128x128, batch 4, the batch in memory: forward, losses, backward and a fused AdamW step, the same for
both; L1 + LPIPS + KL where ../shared holds the LPIPS weights, else L1 + KL. Each way has weights of its own, equal at
the start, and the ways take turns; a figure is the median over the rounds of diffusers' time over ours. Autocast to
bf16 runs where the CPU computes in it. Appended to benchmarks/training_step.md unless the size is another.
"""

import argparse
import copy
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.figures import ROOT, Figure, all_met, append, lacks_bfloat16, to_markdown
from sd_vae.autoencoder import AutoencoderKL
from sd_vae.benchmarking import median_ratio, take_turns
from sd_vae.config import PRESETS
from sd_vae.losses import LossConfig, Objective, PerceptualConfig
from training.step import TrainingForward

TABLE = ROOT / "benchmarks" / "training_step.md"
HEAD = """# Training step on the CPU

Appended by `python -m benchmarks.training_step`; the newest run is last. Figures are times faster than diffusers'
module, medians of the ratios within a round.
"""
BACKBONE = ROOT.parent / "shared" / "weights" / "alexnet_features_torchvision.pth"
SIZE, BATCH_SIZE = 128, 4
MAX_DIFFERENCE = 1e-4
"""Between the gradients, of the largest magnitude, fp32."""
BARS = {
    ("ours", "diffusers"): (1.2, 1.6),
    ("ours, autocast", "diffusers"): (1.9, 2.5),
    ("ours, autocast", "diffusers, autocast, channels_last"): (1.0, None),
}
"""Must and aim by way and what it is compared with."""


class Trainer:
    """A model with its optimiser and the losses.

    Args:
        vae: Ours or diffusers'; trained from now on.
        objective: The losses.
        autocast: Whether the forward pass runs in bf16.
    """

    def __init__(self, vae: Any, objective: Objective, *, autocast: bool) -> None:
        self.vae = vae.train()
        self.model = TrainingForward(vae)
        self.objective = objective
        self.autocast = autocast
        self.optimizer = torch.optim.AdamW(vae.parameters(), lr=1e-5, fused=True)

    def gradients(self, x: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """Run forward and backward passes and return every gradient, float."""
        self.optimizer.zero_grad(set_to_none=True)
        precision: AbstractContextManager[Any] = (
            torch.autocast("cpu", torch.bfloat16) if self.autocast else nullcontext()
        )
        with precision:
            recon, posterior = self.model(x, noise)
        self.objective(x, recon.float(), posterior).total.backward()
        return {name: parameter.grad for name, parameter in self.vae.named_parameters() if parameter.grad is not None}

    def step(self, x: Tensor, noise: Tensor) -> None:
        """Train on one batch."""
        self.gradients(x, noise)
        self.optimizer.step()


def measure(size: int = SIZE, batch_size: int = BATCH_SIZE, rounds: int = 3, preset: str = "sd1") -> list[Figure]:
    """Every figure; those in bf16 only where the CPU computes in it."""
    torch.manual_seed(0)
    vae = AutoencoderKL.from_preset(preset)
    objective, losses = _objective()
    x = torch.rand(batch_size, 3, size, size) * 2 - 1
    noise = torch.randn(batch_size, vae.config.latent_channels, size // vae.factor, size // vae.factor)
    lacking = lacks_bfloat16()
    trainers = _trainers(vae, objective, in_bfloat16=lacking is None)
    # The first step of each, which is not timed: from equal weights.
    difference = gradient_difference(*(trainers[name].gradients(x, noise) for name in ("ours", "diffusers")))
    steps: dict[str, Callable[[], None]] = {name: partial(own.step, x, noise) for name, own in trainers.items()}
    for step in steps.values():
        step()
    seconds = {name: [turn.wall_s for turn in taken] for name, taken in take_turns(steps, rounds, x.device).items()}
    figures = []
    for (ours, theirs), (must, aim) in BARS.items():
        name = f"{ours} against {theirs}, {size}x{size}, batch {batch_size}, {losses}"
        if ours not in seconds or theirs not in seconds:
            figures.append(Figure(name=name, value=None, must=must, aim=aim, note=str(lacking)))
            continue
        best = f"{min(seconds[ours]):.2f} s against {min(seconds[theirs]):.2f} s at best"
        is_exact = ours == "ours"
        figure = Figure(
            name=name,
            value=median_ratio(seconds[theirs], seconds[ours]),
            must=must,
            aim=aim,
            note=f"{best}; gradients differ by {difference:.1e}" if is_exact else best,
            is_correct=difference <= MAX_DIFFERENCE or not is_exact,
        )
        figures.append(figure)
    return figures


def gradient_difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Largest difference over all parameters, relative to the largest magnitude over all."""
    assert ours.keys() == theirs.keys(), "the models have other parameters"
    largest = max(float((ours[name] - gradient).abs().max()) for name, gradient in theirs.items())
    return largest / max(float(gradient.abs().max()) for gradient in theirs.values())


def _trainers(vae: AutoencoderKL, objective: Objective, *, in_bfloat16: bool) -> dict[str, Trainer]:
    """Every way, by name."""
    theirs = copy.deepcopy(vae).to_diffusers()
    trainers = {
        "ours": Trainer(copy.deepcopy(vae), objective, autocast=False),
        "diffusers": Trainer(theirs, objective, autocast=False),
    }
    if in_bfloat16:
        last = copy.deepcopy(vae).to_diffusers().to(memory_format=torch.channels_last)
        trainers["ours, autocast"] = Trainer(copy.deepcopy(vae), objective, autocast=True)
        trainers["diffusers, autocast, channels_last"] = Trainer(last, objective, autocast=True)
    return trainers


def _objective() -> tuple[Objective, str]:
    """The losses, and their names."""
    if BACKBONE.is_file():
        perceptual = PerceptualConfig(net="alex", backbone=str(BACKBONE))
        return Objective(LossConfig(reconstruction="l1", perceptual=perceptual)), "L1 + LPIPS (alex) + KL"
    return Objective(LossConfig(reconstruction="l1", perceptual=PerceptualConfig(weight=0.0))), "L1 + KL"


def run(
    argv: list[str],
    measure: Callable[[int, int, int, str], list[Figure]],
    *,
    name: str,
    about: str | None,
    rounds: int,
    table: Path,
    head: str,
) -> int:
    """Measure, print the table, keep it where it is the bars' size and model; 1 where a must is missed.

    Args:
        argv: Arguments of the command line.
        measure: (size, batch size, rounds, preset) to figures.
        name: Module of the benchmark.
        about: Its docstring.
        rounds: By default.
        table: File that the table is added to.
        head: Its beginning.
    """
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=SIZE, help="pixels of a square picture's side")
    parser.add_argument("--batch-size", type=int, default=BATCH_SIZE)
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--preset", default="sd1", choices=sorted(PRESETS))
    options = parser.parse_args(argv)
    figures = measure(options.size, options.batch_size, options.rounds, options.preset)
    text = to_markdown(figures)
    print(text)
    if (options.size, options.batch_size, options.preset) == (SIZE, BATCH_SIZE, "sd1"):
        append(table, head, text, " ".join([f"python -m benchmarks.{name}", *argv]))
    return int(all_met(figures) is False)


def main(argv: list[str]) -> int:
    """Run the benchmark."""
    return run(argv, measure, name="training_step", about=__doc__, rounds=3, table=TABLE, head=HEAD)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
