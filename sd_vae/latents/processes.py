"""The processes that make one store together: which one this is, how many there are, and where they wait.

`torchrun` and `accelerate launch` start them and say so in the environment. They exchange a few numbers and no tensors,
so they speak gloo on any device, and the wait is as long as the slowest needs.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

__all__ = ["Processes", "joined_processes"]

T = TypeVar("T")

PATIENCE = timedelta(days=30)
"""How long one process may wait for the slowest; a launcher ends all of them when one fails."""


@dataclass(frozen=True, kw_only=True)
class Processes:
    """This process among those that work together; alone by default."""

    rank: int = 0
    """Number of this process."""
    count: int = 1
    """Processes that really run."""
    local_rank: int = 0
    """Number of this process on its machine."""

    @property
    def is_first(self) -> bool:
        """Whether this process speaks for all."""
        return self.rank == 0

    def from_first(self, value: T) -> T:
        """Return the first process's value, when all have come here."""
        if self.count == 1:
            return value
        import torch.distributed

        box = [value]
        torch.distributed.broadcast_object_list(box, src=0)
        return box[0]

    def gather(self, value: T) -> list[T]:
        """Return the value of every process, by rank, when all have come here."""
        if self.count == 1:
            return [value]
        import torch.distributed

        values = [value] * self.count
        torch.distributed.all_gather_object(values, value)
        return values


@contextmanager
def joined_processes() -> Iterator[Processes]:
    """Yield this process among those that a launcher started; leave them at the end of the block."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Processes()
        return
    import torch.distributed as dist

    dist.init_process_group("gloo", timeout=PATIENCE)
    try:
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        yield Processes(rank=dist.get_rank(), count=dist.get_world_size(), local_rank=local_rank)
    finally:
        dist.destroy_process_group()
