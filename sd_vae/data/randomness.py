"""Addressable randomness: every random number of training is a pure function of (seed, epoch, sample index, purpose).

Nothing here holds state, so neither workers nor processes nor a resumed run can disagree about a crop or a noise. The
numbers are numpy's PCG64 streams; the same numpy version gives the same bits.

Shapes: B batch, C latent channels, h w latent cells.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from sd_vae.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["epoch_permutation", "posterior_noise", "sample_rng", "stream_rng"]

Purpose = Literal["order", "crop", "posterior", "window", "mixture", "replacement"]

_STREAMS: dict[Purpose, int] = {
    "order": 0,
    "crop": 1,
    "posterior": 2,
    "window": 3,
    "mixture": 4,
    "replacement": 5,
}
"""Number of each purpose's stream; changing one changes every run."""


def sample_rng(seed: int, epoch: int, index: int, purpose: Purpose) -> np.random.Generator:
    """Return the generator of one sample in one epoch for one purpose, independent of all others.

    Raises:
        UserError: `seed` is negative.
    """
    return stream_rng(seed, purpose, epoch, index)


def stream_rng(seed: int, purpose: Purpose, *key: int) -> np.random.Generator:
    """Return the generator of one purpose and key, independent of all others.

    Raises:
        UserError: `seed` is negative.
    """
    if seed < 0:
        raise UserError(f"seed is {seed}, it must be 0 or more; choose another.")
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(_STREAMS[purpose], *key)))


def epoch_permutation(seed: int, epoch: int, num_samples: int, source: int = 0) -> NDArray[np.int64]:
    """Return the order of an epoch, a permutation of 0 ... num_samples - 1, for one source of several."""
    return sample_rng(seed, epoch, source, "order").permutation(num_samples)


def posterior_noise(seed: int, epochs: Iterable[Any], indices: Iterable[Any], shape: Sequence[int]) -> Tensor:
    """Return eps ~ N(0, I) for each sample of a batch, float32 on the CPU.

    Args:
        seed: Seed of the run.
        epochs: Epoch of each sample, (B,).
        indices: Index of each sample, (B,).
        shape: Shape of one sample's z, (C, h, w).

    Returns:
        Noise (B, C, h, w); row i depends on (seed, epochs[i], indices[i]) alone, not on the batch around it.
    """
    import torch

    rows = [
        sample_rng(seed, int(epoch), int(index), "posterior").standard_normal(tuple(shape), dtype=np.float32)
        for epoch, index in zip(epochs, indices, strict=True)
    ]
    return torch.from_numpy(np.stack(rows))
