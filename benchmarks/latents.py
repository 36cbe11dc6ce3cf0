"""Reading a latent store at random: `python -m benchmarks.latents`, one core, 64x64x4 latents, bar 5,000 a second.

Makes a store of random moments through the store's own writer in a temporary folder (64 KiB each, float16), then reads
all of its items in a random order, several times, in every way that training reads them. The verdict goes by the time
that one core spent in the fastest pass, which on an idle machine is the wall time; the latents are in the page cache.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from sd_vae.config import PRESETS
from sd_vae.latents import Item, LatentDataset, LatentStore, StoreDescription, numerics_of

SIDE, CHANNELS = 64, 4
BAR = 5000


def make_store(folder: Path, num_items: int) -> None:
    """Write a store of random moments."""
    description = StoreDescription(
        data="random numbers", encoder="0" * 64, vae=PRESETS["sd1"], transform={}, numerics=numerics_of("cpu")
    )
    store = LatentStore.create(folder, description)
    generator = torch.Generator().manual_seed(0)
    for shard in store.unfinished(num_items):
        with store.writer(shard) as writer:
            for position in range(writer.start, min(writer.start + description.shard_items, num_items)):
                item = Item(
                    position=position,
                    id=str(position),
                    source=f"{position}.png",
                    sha256="0" * 64,
                    original_size=(512, 512),
                    resized_size=(512, 512),
                    crop=(0, 0, 512, 512),
                    columns={"caption": f"noise number {position}", "label": position % 1000},
                )
                writer.add(item, torch.randn(2 * CHANNELS, SIDE, SIDE, generator=generator))
    store.finish(num_items)


def rates(read: Callable[[int], object], order: list[int], repeats: int) -> tuple[float, float]:
    """Return the items a second of processor time and of wall time, of the fastest pass each."""
    passes: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats):
        cpu, wall = time.process_time(), time.perf_counter()
        for index in order:
            read(index)
        passes[0].append(len(order) / (time.process_time() - cpu))
        passes[1].append(len(order) / (time.perf_counter() - wall))
    return max(passes[0]), max(passes[1])


def main() -> None:
    """Measure, print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--items", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "store"
        start = time.perf_counter()
        make_store(folder, options.items)
        print(f"written: {options.items / (time.perf_counter() - start):,.0f} items/s with checksums\n")
        order = torch.randperm(options.items, generator=torch.Generator().manual_seed(1)).tolist()
        generator = torch.Generator().manual_seed(2)
        mode, sample, scaled, moments = (
            LatentDataset(folder, content="mode"),
            LatentDataset(folder),
            LatentDataset(folder, scaled=True),
            LatentDataset(folder, content="moments"),
        )
        ways: dict[str, Callable[[int], object]] = {
            "mode": mode.sample,
            "moments": moments.sample,
            "sample(i, generator)": lambda index: sample.sample(index, generator),
            "sample(i, generator), scaled": lambda index: scaled.sample(index, generator),
            "dataset[i], scaled, caption and label": scaled.__getitem__,
        }
        print(f"| read | items a second of one core | of wall time | bar {BAR:,} |\n|---|--:|--:|---|")
        for name, read in ways.items():
            per_core, per_wall = rates(read, order, options.repeats)
            print(f"| {name} | {per_core:,.0f} | {per_wall:,.0f} | {'met' if per_core >= BAR else 'missed'} |")


if __name__ == "__main__":
    main()
