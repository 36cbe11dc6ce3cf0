"""Whole numbers that look like quantised latents, and a file of them."""

import numpy as np

from sd_vae.latents.compression import Container
from sd_vae.latents.compression.entropy import encode_lattice


def numbers(*shape: int, seed: int = 0) -> np.ndarray:
    """Noise summed along both axes: smooth, as latents are, of some tens at most."""
    drawn = np.random.default_rng(seed).normal(size=shape).cumsum(axis=1).cumsum(axis=2)
    return np.rint(drawn / max(np.abs(drawn).max(), 1.0) * 40).astype(np.int32)


def container(width: int = 30, height: int = 22, factor: int = 2, channels: int = 4, note: str = "") -> Container:
    """A file of such numbers."""
    model, code = encode_lattice(numbers(channels, -(-height // factor), -(-width // factor)))
    return Container(
        width=width,
        height=height,
        factor=factor,
        vae="00" * 16,
        steps=(0.25,) * channels,
        note=note,
        model=model,
        code=code,
    )
