"""What `inspect --probe` and `convert --fp16-safe` share: the pictures to probe with, and a bar."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from sd_vae.cli import console

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["probe_pictures", "probe_progress"]


def probe_pictures(spec: str, factor: int, *, limit: int, size: int) -> list[Tensor]:
    """Return pictures of a data set to probe a VAE with, and say which.

    Args:
        spec: Folder, parquet file or folder, or hf://DATASET[:SPLIT].
        factor: Pixels a latent cell.
        limit: Pictures at most.
        size: Longest side in pixels.

    Raises:
        UserError: As `sd_vae.data.open_source` and `sd_vae.half_precision.load_pictures`.
    """
    from sd_vae.data import open_source
    from sd_vae.half_precision import load_pictures

    source = open_source(spec)
    pictures = load_pictures(source, factor, limit=limit, size=size)
    console.say(
        f"probing with {len(pictures)} of {len(source)} pictures in {spec}, evenly spread; of each the middle, up to "
        f"{size}x{size} pixels."
    )
    return pictures


@contextmanager
def probe_progress(label: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on standard error with rate and time left; yields what moves it to (done, total)."""
    from tqdm import tqdm

    with tqdm(desc=label, unit="run", file=sys.stderr) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield show
