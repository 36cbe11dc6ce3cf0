"""The optimizer and its learning rate over the steps."""

from collections.abc import Sequence

from diffusers.optimization import get_scheduler
from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LRScheduler

from .config import OptimConfig

__all__ = ["build_optimizer", "build_schedule"]


def build_optimizer(parameters: Sequence[nn.Parameter], config: OptimConfig) -> AdamW:
    """Return AdamW over the parameters that train."""
    return AdamW(parameters, lr=config.lr, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay)


def build_schedule(optimizer: AdamW, config: OptimConfig, num_steps: int) -> LRScheduler:
    """Return the learning rate's schedule, advanced once an optimizer step.

    Warm-up rises linearly; then the rate is constant, or falls to 0 at `num_steps` along a half cosine.
    """
    name = "cosine" if config.schedule == "cosine" else "constant_with_warmup"
    return get_scheduler(name, optimizer, num_warmup_steps=config.warmup_steps, num_training_steps=num_steps)
