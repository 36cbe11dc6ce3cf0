"""Small real photos, and a perceptual distance that needs no network."""

from collections.abc import Callable

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image


@pytest.fixture
def photos() -> dict[str, Image.Image]:
    """Three photos of different, odd sizes."""
    return {
        "cat": Image.fromarray(skimage.data.chelsea()).resize((37, 25)),
        "astronaut": Image.fromarray(skimage.data.astronaut()).resize((32, 32)),
        "coffee": Image.fromarray(skimage.data.coffee()).resize((30, 21)),
    }


@pytest.fixture
def noisy() -> Callable[[Image.Image], Image.Image]:
    """Return a function that adds noise to a picture, the same on every call."""

    def add(picture: Image.Image) -> Image.Image:
        pixels = np.asarray(picture, np.float64)
        noise = np.random.default_rng(0).normal(0.0, 12.0, pixels.shape)
        return Image.fromarray(np.clip(pixels + noise, 0, 255).astype(np.uint8))

    return add


class MeanDifference(torch.nn.Module):
    """Stands in for a perceptual network."""

    name = "mean_difference"

    def forward(self, recon: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Return the mean absolute difference of each item (B,)."""
        return (recon - x).abs().mean(dim=(1, 2, 3))


@pytest.fixture
def perceptual() -> MeanDifference:
    """A perceptual distance under the name mean_difference."""
    return MeanDifference()
