"""`--find-batch-size`: the largest batch that fits into memory, with as many pictures a step as were asked for."""

import dataclasses
import gc
import logging

import torch

from sd_vae.errors import UserError

from .config import TrainConfig
from .rehearsal import ShortageError, divisors_from
from .trainer import Trainer

__all__ = ["find_batch_size"]

logger = logging.getLogger(__name__)


def find_batch_size(config: TrainConfig, *, overwrite: bool = False) -> TrainConfig:
    """Return the config with the largest batch that fits, and accumulation that makes up for it.

    Sizes are tried from `batch_size` down, by a step that is dropped, so that a step's pictures and its result stay the
    same. On several devices all take the largest that fits on every one.

    Args:
        config: The run.
        overwrite: As for `training.train`.

    Raises:
        UserError: Not even one picture fits, or what `training.train` raises before it begins.
    """
    total = config.batch_size * config.gradient_accumulation_steps
    for size in divisors_from(total, config.batch_size):
        trial = dataclasses.replace(config, batch_size=size, gradient_accumulation_steps=total // size)
        if _fits(trial, overwrite=overwrite):
            logger.info("batch_size %d fits, with gradient_accumulation_steps %d", size, total // size)
            return trial
        logger.info("batch_size %d does not fit", size)
    raise UserError(
        f"not even one picture of {config.data.size}x{config.data.size} fits into memory; set "
        "model.gradient_checkpointing true, mixed_precision bf16, or a smaller data.size."
    )


def _fits(config: TrainConfig, *, overwrite: bool) -> bool:
    """Whether a step fits on every process's device."""
    trainer = Trainer(config, overwrite=overwrite)
    fits = True
    try:
        trainer.update.rehearse()
    except ShortageError:
        fits = False
    accelerator = trainer.accelerator
    failed = torch.tensor(float(not fits), device=accelerator.device)
    failed = accelerator.reduce(failed, "sum") if accelerator.num_processes > 1 else failed
    del trainer
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return float(failed) == 0
