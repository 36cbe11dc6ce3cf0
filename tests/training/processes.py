"""Run by torchrun, and imported by the test beside it: twenty updates on fixed pictures, in every variant.

A variant is the trainer as it is, in another setting, or with a planted bug that a comparison must see.
"""

import sys
from pathlib import Path
from typing import Any

import torch

from sd_vae.autoencoder import AutoencoderKL
from sd_vae.data import Batch, DataConfig
from sd_vae.losses import AdversarialConfig, KLConfig, LossConfig, Objective, PerceptualConfig, adaptive_weight
from training.config import OptimConfig, TrainConfig
from training.distributed import build_accelerator
from training.optim import Mover
from training.update import Update

NUM_STEPS = 20
GLOBAL_BATCH = 4
TINY: dict[str, Any] = {
    "block_out_channels": (8, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 4,
    "sample_size": 32,
}

VARIANTS: dict[str, dict[str, Any]] = {
    "group, hinge": {},
    "spectral, vanilla, LeCam": {"norm": "spectral", "loss": "vanilla", "lecam_weight": 0.1},
    "accumulated": {"gradient_accumulation_steps": 2},
    # Adam makes steps of full size of gradients that are rounding errors around 0, in float32 above its usual eps.
    "float32": {"dtype": torch.float32, "eps": 1e-3},
    "bug: unwrapped": {"bug": "unwrapped"},
    "bug: factor not averaged": {"bug": "unaveraged"},
}


def run(
    num_processes: int,
    *,
    bug: str = "",
    dtype: torch.dtype = torch.float64,
    eps: float = 1e-8,
    gradient_accumulation_steps: int = 1,
    **adversarial: Any,
) -> dict[str, Any]:
    """Return gradients of the first step, losses of all steps and weights after the last, as rank 0 has them."""
    per_batch = GLOBAL_BATCH // num_processes // gradient_accumulation_steps
    config = TrainConfig(
        out="none",
        steps=NUM_STEPS,
        batch_size=per_batch,
        gradient_accumulation_steps=gradient_accumulation_steps,
        data=DataConfig(train="none", size=16),
        loss=LossConfig(
            perceptual=PerceptualConfig(weight=0.0),
            kl=KLConfig(weight=1e-3, free_bits=0.05, warmup_steps=5),
            learn_logvar=True,
            adversarial=AdversarialConfig(weight=0.5, width=8, num_layers=1, **adversarial),
        ),
        optim=OptimConfig(lr=1e-3, warmup_steps=2, eps=eps),
    )
    accelerator = build_accelerator(config)
    assert accelerator.num_processes == num_processes, f"{accelerator.num_processes} processes, not {num_processes}"
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)  # everything is built in it: what is wrapped must not be cast afterwards
    try:
        vae = AutoencoderKL(**TINY).train()
        update = Update(accelerator, config, vae, Objective(config.loss))
    finally:
        torch.set_default_dtype(torch.float32)
    adversary = update._adversary
    if bug == "unwrapped":
        update.forward = accelerator.unwrap_model(update.forward)
    if bug == "unaveraged":
        adversary.factor = lambda pulls, num: adaptive_weight(*pulls, num, 1e4)  # type: ignore[method-assign]
    gradients = _note_gradients(update)
    losses = []
    for step in range(NUM_STEPS):
        result = update(_batches(step, accelerator.process_index, per_batch, num_processes, dtype), step)
        assert result.is_taken
        losses.append(float(_mean(result.terms["loss"])))
    networks = {
        "vae": vae,
        "discriminator": adversary.network,
        "lecam": adversary.lecam,
        "output": update.objective.output,
    }
    weights = {
        f"{kind}.{name}": value.clone()
        for kind, network in networks.items()
        if network is not None
        for name, value in network.state_dict().items()
    }
    return {"num_processes": accelerator.num_processes, "gradients": gradients, "weights": weights, "losses": losses}


def _batches(step: int, rank: int, per_batch: int, num_processes: int, dtype: torch.dtype) -> list[Batch]:
    """This process's batches of a step, dealt out in rows as the loader does."""
    first = GLOBAL_BATCH * step
    rows = torch.arange(first, first + GLOBAL_BATCH).view(-1, num_processes, per_batch)[:, rank]
    return [Batch(torch.stack([_picture(int(i), dtype) for i in row]), torch.zeros_like(row), row, []) for row in rows]


def _picture(index: int, dtype: torch.dtype) -> torch.Tensor:
    return (torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(index)) * 2 - 1).to(dtype)


def _mean(loss: torch.Tensor) -> torch.Tensor:
    """The loss over all processes."""
    if not torch.distributed.is_initialized():
        return loss
    torch.distributed.all_reduce(loss)
    return loss / torch.distributed.get_world_size()


def _note_gradients(update: Update) -> dict[str, torch.Tensor]:
    """A dictionary that gets the gradients of each network's first step."""
    noted: dict[str, torch.Tensor] = {}
    move = Mover.move

    def spy(self: Mover, loss: torch.Tensor) -> Any:
        kind = "vae" if self is update.mover else "discriminator"
        for index, parameter in enumerate(self.parameters):
            noted.setdefault(f"{kind}.{index}", parameter.grad.clone())
        return move(self, loss)

    for mover in (update.mover, update._adversary.mover):
        mover.move = spy.__get__(mover)  # type: ignore[method-assign]
    return noted


if __name__ == "__main__":
    results = {name: run(2, **settings) for name, settings in VARIANTS.items()}
    if torch.distributed.get_rank() == 0:
        torch.save(results, Path(sys.argv[1]))
    torch.distributed.destroy_process_group()
