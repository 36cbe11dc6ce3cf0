"""Stores to export: square latents with labels and mirror images, and what is expected of each of their items."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import synthetic_store as synthetic
import torch
from torch import Tensor

from sd_vae.config import VAEConfig
from sd_vae.latents import Item, LatentStore, StoreDescription
from sd_vae.latents.writer import stored_values

SIZE = 2
NUM_ITEMS = 9
"""Ten records, one of them rejected."""
VAE = replace(VAEConfig.from_preset("sd1"), shift_factor=0.25)
"""Factor 8, Stable Diffusion's scale, and a shift so that forgetting it shows."""


def describe(**changes: Any) -> StoreDescription:
    return synthetic.describe(**({"vae": VAE, "dtype": "float32"} | changes))


def moments_of(item: Item) -> Tensor:
    generator = torch.Generator().manual_seed(item.position * 100 + item.view * 10 + item.flipped)
    return torch.randn(2 * synthetic.CHANNELS, SIZE, SIZE, generator=generator)


def items(*, label: bool = True, **changes: Any) -> list[Item]:
    """The items of `make`, without mirrored ones."""
    found = []
    for position in range(synthetic.NUM_RECORDS):
        if position not in synthetic.REJECTED:
            columns = {"caption": f"number {position}"} | ({"label": position % 3} if label else {})
            found.append(synthetic.item(position, id=f"{position % 2}/{position}.png", columns=columns, **changes))
    return found


def make(folder: Path, chosen: list[Item] | None = None, *, flip: bool = True, **changes: Any) -> Path:
    """Make a store of `items()` or of the given ones, and return its folder."""
    store = LatentStore.create(folder, describe(**changes))
    by_position = {item.position: item for item in (items() if chosen is None else chosen)}
    for shard in store.unfinished(synthetic.NUM_RECORDS):
        with store.writer(shard) as writer:
            for position in range(shard * synthetic.SHARD_ITEMS, (shard + 1) * synthetic.SHARD_ITEMS):
                if position >= synthetic.NUM_RECORDS:
                    break
                if position not in by_position:
                    writer.reject(synthetic.reject(position))
                    continue
                for item in [by_position[position], replace(by_position[position], flipped=True)][: 1 + flip]:
                    writer.add(item, moments_of(item))
    store.finish(synthetic.NUM_RECORDS)
    return folder


def mean_of(item: Item) -> Tensor:
    return moments_of(item)[: synthetic.CHANNELS]


def logvar_of(item: Item) -> Tensor:
    return moments_of(item)[synthetic.CHANNELS :]


def draw_of(item: Item, seed: int = 0) -> Tensor:
    """What a store of samples would hold."""
    return stored_values(describe(content="sample", seed=seed), item, moments_of(item))["z"]


def scaled(z: Tensor) -> Tensor:
    return (z - 0.25) * 0.18215


def flipped(item: Item) -> Item:
    return replace(item, flipped=True)
