"""What moves a network: its optimizer, the learning rate over the steps, and the guard in front of both."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LRScheduler

from sd_vae.errors import UserError
from sd_vae.muon import Muon

from .config import OptimConfig

__all__ = ["Mover", "build_optimizer", "build_schedule"]


def build_optimizer(
    parameters: Sequence[nn.Parameter], config: OptimConfig, *, undecayed: Sequence[nn.Parameter] = ()
) -> AdamW:
    """Return the optimizer over the parameters that train; those in `undecayed` without weight decay."""
    groups: list[dict[str, Any]] = [{"params": list(parameters)}]
    if undecayed:
        groups.append({"params": list(undecayed), "weight_decay": 0.0})
    kind = Muon if config.name == "muon" else AdamW
    return kind(
        groups,
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=config.fused or None,
    )


def build_schedule(optimizer: AdamW, config: OptimConfig, num_steps: int) -> LRScheduler:
    """Return the learning rate's schedule, advanced once an optimizer step.

    Warm-up rises linearly; then the rate is constant, or falls to 0 at `num_steps` along a half cosine.
    """
    name = "cosine" if config.schedule == "cosine" else "constant_with_warmup"
    return get_scheduler(name, optimizer, num_warmup_steps=config.warmup_steps, num_training_steps=num_steps)


class Mover:
    """Takes the steps of one network: clips its gradients, moves its weights, and refuses what is not finite.

    Args:
        accelerator: The process's Accelerator.
        parameters: What moves; those in `undecayed` too.
        config: Optimizer, schedule and clipping.
        num_steps: Steps of the schedule.
        undecayed: Parameters without weight decay.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        parameters: Sequence[nn.Parameter],
        config: OptimConfig,
        num_steps: int,
        *,
        undecayed: Sequence[nn.Parameter] = (),
    ) -> None:
        self.accelerator = accelerator
        self.parameters = [*parameters, *undecayed]
        optimizer = build_optimizer(parameters, config, undecayed=undecayed)
        self.schedule = build_schedule(optimizer, config, num_steps)
        self.optimizer: Any = accelerator.prepare_optimizer(optimizer)
        self.max_grad_norm = config.max_grad_norm or math.inf
        self.lr = 0.0

    def move(self, loss: Tensor) -> tuple[bool, Tensor]:
        """Take a step with the gradients that are there, unless they or the loss are not finite; then drop them.

        Args:
            loss: The step's loss on this process; all processes decide alike.

        Returns:
            Whether the step was taken, and the gradients' norm before clipping.

        Raises:
            UserError: The learning rate is beyond all numbers.
        """
        self.accelerator.unscale_gradients(self.optimizer)
        grad_norm = nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm)
        is_finite = grad_norm.isfinite() & loss.isfinite()
        if self.accelerator.num_processes > 1:  # gradients are the same everywhere, the loss is each process's own
            is_finite = self.accelerator.reduce(is_finite.float(), "sum") == self.accelerator.num_processes
        is_taken = bool(is_finite)
        self.lr = float(self.schedule.get_last_lr()[0])
        if is_taken:
            self._step()
            self.schedule.step()
        elif self.accelerator.scaler is not None:
            self.accelerator.scaler.update()  # half precision overflowed: a smaller scale for the next step
        self.optimizer.zero_grad(set_to_none=True)
        return is_taken, grad_norm

    def _step(self) -> None:
        try:
            self.optimizer.step()
        except RuntimeError as error:
            if "without overflow" not in str(error):
                raise
            raise UserError(f"optim.lr is {self.lr:g}, beyond the range of the weights' numbers; lower it.") from error

    def state(self, prefix: str = "") -> dict[str, Any]:
        """Return what a checkpoint holds of it, by name."""
        return {f"{prefix}optimizer": self.optimizer, f"{prefix}schedule": self.schedule}


def discriminator_config(config: OptimConfig) -> OptimConfig:
    """The same for the discriminator, with its own learning rate where one is given."""
    return dataclasses.replace(config, lr=config.discriminator_lr or config.lr)
