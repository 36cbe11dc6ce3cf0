"""Memory before the run: one step that is dropped again, and the batch size that fits."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from sd_vae.errors import UserError

from .config import TrainConfig

__all__ = ["ShortageError", "divisors_from", "memory_errors"]


class ShortageError(UserError):
    """A step does not fit into memory."""


@contextmanager
def memory_errors(config: TrainConfig) -> Iterator[None]:
    """Turn running out of memory into one line that names the settings to change.

    Raises:
        ShortageError: A device or the machine has no memory left.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        is_memory = isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)
        if not is_memory:
            raise
        size = config.data.size
        raise ShortageError(
            f"batch_size {config.batch_size} at {size}x{size} does not fit into memory; lower batch_size and raise "
            "gradient_accumulation_steps by as much, which gives the same result and is what --find-batch-size does; "
            "or set model.gradient_checkpointing true, mixed_precision bf16, or a smaller data.size."
        ) from error


def divisors_from(total: int, largest: int) -> list[int]:
    """Return the divisors of `total` up to `largest`, from large to small."""
    return [size for size in range(min(total, largest), 0, -1) if total % size == 0]
