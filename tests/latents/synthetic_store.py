"""Stores without a VAE, of moments that are pure functions of (record, view, mirrored). Also a script:

python synthetic_store.py FOLDER RANK WORLD_SIZE      makes every WORLD_SIZE-th shard, one process of many
python synthetic_store.py FOLDER kill                 makes FOLDER/N, killed at the N-th step, for every N
"""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sd_vae.config import VAEConfig
from sd_vae.latents import Item, LatentStore, Manifest, Numerics, Reject, StoreDescription

NUM_RECORDS = 10
SHARD_ITEMS = 4
REJECTED = (5,)
CHANNELS = 4


def describe(**changes: Any) -> StoreDescription:
    values: dict[str, Any] = {
        "data": "photos",
        "num_records": NUM_RECORDS,
        "shard_items": SHARD_ITEMS,
        "encoder": "0123456789abcdef" * 4,
        "vae": VAEConfig(scaling_factor=0.5, shift_factor=0.25),
        "transform": {"size": 16, "crop": "centre"},
        "numerics": Numerics(device="cpu", cpu="abacus", threads_per_picture=1, versions={"torch": "2.0"}),
    }
    return StoreDescription(**(values | changes))


def item(position: int, view: int = 0, flipped: bool = False, **changes: Any) -> Item:
    values: dict[str, Any] = {
        "position": position,
        "id": f"picture {position}",
        "view": view,
        "flipped": flipped,
        "source": f"photos/{position}.png",
        "sha256": f"{position:064x}",
        "original_size": (40 + position, 30),
        "resized_size": (20, 16),
        "crop": (2, 0, 16, 16),
        "columns": {"caption": f"number {position}", "label": position % 3},
    }
    return Item(**(values | changes))


def reject(position: int) -> Reject:
    return Reject(
        position=position,
        id=f"picture {position}",
        source=f"photos/{position}.png",
        sha256=f"{position:064x}",
        reason="damaged",
        detail="cut off",
    )


def moments_of(item: Item) -> Tensor:
    """(2C, h, w); every third record is of another size."""
    height, width = (2, 4) if item.position % 3 == 2 else (2, 2)
    generator = torch.Generator().manual_seed(item.position * 100 + item.view * 10 + item.flipped)
    return torch.randn(2 * CHANNELS, height, width, generator=generator)


def views_of(position: int, flip: bool, num_views: int) -> Iterator[Item]:
    for view in range(num_views):
        yield item(position, view)
        if flip:
            yield item(position, view, flipped=True)


def fill(store: LatentStore, shards: list[int], *, flip: bool = False, num_views: int = 1) -> None:
    for shard in shards:
        with store.writer(shard) as writer:
            for position in range(shard * SHARD_ITEMS, min((shard + 1) * SHARD_ITEMS, NUM_RECORDS)):
                if position in REJECTED:
                    writer.reject(reject(position))
                    continue
                for one in views_of(position, flip, num_views):
                    writer.add(one, moments_of(one))


def make(folder: Path, *, flip: bool = False, num_views: int = 1, **changes: Any) -> Manifest:
    """Make a store, or go on with one, and finish it."""
    store = LatentStore.create(folder, describe(**changes))
    fill(store, store.unfinished(NUM_RECORDS), flip=flip, num_views=num_views)
    return store.finish(NUM_RECORDS)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, hidden ones too."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def kill_at(step: int, *others: tuple[Any, str]) -> None:
    """End this process with SIGKILL before its `step`-th call that changes the file system, or of one of the others.

    Args:
        step: From 1.
        others: Object and name of the function.
    """
    num_seen = 0

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            nonlocal num_seen
            num_seen += 1
            if num_seen == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments, **options)

        return wrapped

    for owner, name in [*((os, name) for name in ("fsync", "replace", "unlink", "chmod")), *others]:
        setattr(owner, name, counted(getattr(owner, name)))


def run_killed(make: Callable[[Path], Any], root: Path, stride: int, *others: tuple[Any, str]) -> None:
    """Call make(root / "1"), make(root / "2"), ... each in a process that `kill_at` kills `stride` steps later.

    Ends with the first that has no such step.
    """
    for number in range(1, 1000):
        child = os.fork()
        if not child:
            kill_at(number * stride, *others)
            make(root / str(number))
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        if status == 0:
            return
        assert os.WTERMSIG(status) == signal.SIGKILL, status


if __name__ == "__main__":
    torch.set_num_threads(1)
    root, role = Path(sys.argv[1]), sys.argv[2]
    if role == "kill":
        make(root / "0")  # imports what the children would import each for itself
        run_killed(make, root, 1)
    else:
        store = LatentStore.create(root, describe())
        fill(store, store.unfinished(NUM_RECORDS)[int(role) :: int(sys.argv[3])])
