"""A step of the trainer on the CPU beside that of diffusers' script: `python -m benchmarks.trainer_step`, some minutes.

The sd1 preset at 128x128, batch 4, the batch in memory. Ours is all that a run does in a step: `training.update` with
L2 + LPIPS (whose gradient reaches the VAE) + KL, clipping, AdamW, schedule, checks of loss and gradient, then the
averaged weights. Theirs is the step of diffusers' training script with the same losses, optimiser, clipping, schedule
and averaged weights, and without the script's mistakes: a perceptual term without gradient, weights cast to half
precision in place of autocast. Both begin with equal weights, see the same posterior noise and take turns; a figure is
the median over the rounds of their time over ours, in fp32 and under autocast to bf16 where the CPU computes in it.
LPIPS is left out of both where ../shared does not hold its weights. Appended to benchmarks/trainer_step.md unless the
size is another.

Source of the script's step: huggingface/diffusers@e276f08:examples/research_projects/autoencoderkl/
train_autoencoderkl.py.
"""

import copy
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor

from benchmarks.figures import ROOT, Figure, lacks_bfloat16
from benchmarks.training_step import BACKBONE, BATCH_SIZE, SIZE, run
from sd_vae.autoencoder import AutoencoderKL
from sd_vae.benchmarking import median_ratio, take_turns
from sd_vae.data import Batch, DataConfig, posterior_noise
from sd_vae.losses import LossConfig, Objective, PerceptualConfig
from training.config import OptimConfig, TrainConfig
from training.distributed import build_accelerator
from training.ema import EMA
from training.update import Update

TABLE = ROOT / "benchmarks" / "trainer_step.md"
HEAD = """# A step of the trainer on the CPU

Appended by `python -m benchmarks.trainer_step`; the newest run is last. Figures are times faster than the step of
diffusers' training script with the same losses, medians of the ratios within a round.
"""
Precision = Literal["no", "bf16"]
MUST = 1.2
NUM_COMPARED = 2
"""Steps, not timed, whose losses and gradient norms are compared."""
MAX_DIFFERENCE: dict[Precision, float] = {"no": 1e-4, "bf16": 2e-2}
"""Between those of the first step, relative. AdamW's first update moves every weight by the learning rate against the
sign of its gradient; where that is about zero its sign is rounding, so the two part from there on. In fp32 at 128x128
and batch 2: 7e-5 in the first step and 7e-3 in the second with LPIPS, 2e-6 and 4e-6 without."""


class Ours:
    """The trainer's step.

    Args:
        vae: Model, trained from now on.
        config: The run.
        objective: The losses.
    """

    def __init__(self, vae: AutoencoderKL, config: TrainConfig, objective: Objective) -> None:
        vae = vae.train().to(memory_format=torch.channels_last)
        self.vae = vae
        self.ema = EMA(vae, config.ema_decay)
        self.update = Update(build_accelerator(config), config, vae, objective)
        self.num_steps = 0

    def step(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Train on one batch; return loss and gradient norm."""
        result = self.update([batch], self.num_steps)
        self.ema.update_parameters(self.vae)
        self.num_steps += 1
        return result.terms["loss"], result.terms["grad_norm"]


class Theirs:
    """The script's step.

    Args:
        vae: diffusers' model, trained from now on.
        config: The same run.
        objective: Holds the `lpips` package's network, called as the package has it.
    """

    def __init__(self, vae: Any, config: TrainConfig, objective: Objective) -> None:
        self.config = config
        self.accelerator = Accelerator(cpu=True, mixed_precision=config.mixed_precision)
        optim = config.optim
        optimizer = torch.optim.AdamW(
            vae.parameters(), lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=optim.fused
        )
        schedule = get_scheduler(
            "constant_with_warmup", optimizer, num_warmup_steps=optim.warmup_steps, num_training_steps=config.steps
        )
        self.ema = EMAModel(vae.parameters(), decay=config.ema_decay)
        self.vae, self.optimizer, self.schedule = self.accelerator.prepare(vae.train(), optimizer, schedule)
        self.lpips = None if objective.perceptual is None else objective.perceptual.model

    def step(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Train on one batch; return loss and gradient norm."""
        x = batch.x
        with self.accelerator.autocast():
            posterior = self.vae.encode(x).latent_dist
            noise = posterior_noise(self.config.seed, batch.epochs, batch.indices, posterior.mean.shape[1:])
            recon = self.vae.decode(posterior.mean + posterior.std * noise).sample
        loss = torch.nn.functional.mse_loss(recon.float(), x)
        if self.lpips is not None:
            loss = loss + self.config.loss.perceptual.weight * self.lpips(recon.float(), x).mean()
        kl = posterior.kl().float().mean() / posterior.mean[0].numel()
        loss = loss + self.config.loss.kl.weight * kl
        self.accelerator.backward(loss)
        grad_norm = self.accelerator.clip_grad_norm_(self.vae.parameters(), self.config.optim.max_grad_norm)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.step(self.vae.parameters())
        return loss.detach(), grad_norm


def measure(
    size: int = SIZE, batch_size: int = BATCH_SIZE, rounds: int = 5, preset: str = "sd1", *, lpips: bool = True
) -> list[Figure]:
    """Both figures; that in bf16 only where the CPU computes in it."""
    torch.manual_seed(0)
    vae = AutoencoderKL.from_preset(preset)
    return [_measure(vae, precision, size, batch_size, rounds, lpips=lpips) for precision in MAX_DIFFERENCE]


def _measure(
    vae: AutoencoderKL, precision: Precision, size: int, batch_size: int, rounds: int, *, lpips: bool
) -> Figure:
    has_lpips = lpips and BACKBONE.is_file()
    losses = "L2 + LPIPS (alex) + KL" if has_lpips else "L2 + KL"
    name = f"step, {'autocast' if precision == 'bf16' else 'fp32'}, {size}x{size}, batch {batch_size}, {losses}"
    lacking = lacks_bfloat16() if precision == "bf16" else None
    if lacking is not None:
        return Figure(name=name, value=None, must=MUST, note=lacking)
    config = _config(precision, size, batch_size, has_lpips=has_lpips)
    objective = Objective(config.loss)
    ways = {
        "ours": Ours(copy.deepcopy(vae), config, objective),
        "theirs": Theirs(copy.deepcopy(vae).to_diffusers(), config, objective),
    }
    indices = torch.arange(batch_size)
    batch = Batch(torch.rand(batch_size, 3, size, size) * 2 - 1, torch.zeros_like(indices), indices, [])
    compared = {key: [torch.stack(way.step(batch)) for _ in range(NUM_COMPARED)] for key, way in ways.items()}
    first, later = (
        float(((ours - theirs) / theirs).abs().max())
        for ours, theirs in zip(compared["ours"], compared["theirs"], strict=True)
    )
    steps: dict[str, Callable[[], object]] = {key: partial(way.step, batch) for key, way in ways.items()}
    seconds = {key: [turn.wall_s for turn in taken] for key, taken in take_turns(steps, rounds, batch.x.device).items()}
    return Figure(
        name=name,
        value=median_ratio(seconds["theirs"], seconds["ours"]),
        must=MUST,
        note=f"{1 / min(seconds['ours']):.3f} steps/s against {1 / min(seconds['theirs']):.3f} at best; loss and "
        f"gradient norm differ by {first:.1e} in the first step, {later:.1e} in the second",
        is_correct=first <= MAX_DIFFERENCE[precision],
    )


def _config(precision: Precision, size: int, batch_size: int, *, has_lpips: bool) -> TrainConfig:
    perceptual = PerceptualConfig(net="alex", backbone=str(BACKBONE)) if has_lpips else PerceptualConfig(weight=0.0)
    return TrainConfig(
        out="none",
        steps=1000,
        batch_size=batch_size,
        mixed_precision=precision,
        ema_decay=0.999,
        data=DataConfig(train="none", size=size),
        loss=LossConfig(reconstruction="l2", perceptual=perceptual),
        optim=OptimConfig(lr=1e-5, fused=True),
    )


def main(argv: list[str]) -> int:
    """Run the benchmark."""
    return run(argv, measure, name="trainer_step", about=__doc__, rounds=5, table=TABLE, head=HEAD)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
