"""Whole numbers to few bytes and back: each is coded by how likely the prediction and what is around it make it.

A number's distribution is a Gaussian around its prediction, as wide as the misses of its class were in this picture.
The class is the channel, the stage, and how active its surroundings are. Widths come from a table of 64 that every
machine has to the last bit. The coder is `constriction`'s (asymmetric numeral systems).

Source: Duda, "Asymmetric numeral systems", arXiv 1311.2540; Bamler, "Understanding Entropy Coding With Asymmetric
Numeral Systems", arXiv 2201.01741, by way of the `constriction` package.

Shapes: C latent channels, h w latent cells, n cells of a pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sd_vae.errors import UserError
from sd_vae.latents.compression.prediction import (
    NUM_STAGES,
    ONE,
    Cells,
    Lattice,
    Prediction,
    fit_weights,
    num_weights,
    passes,
    predict,
)

__all__ = ["LARGEST_VALUE", "NUM_CLASSES", "Model", "decode_lattice", "encode_lattice", "model_size"]

LARGEST_VALUE = 1 << 14
"""Numbers are at most this large, of either sign."""

NUM_CLASSES = 8
"""Classes of activity."""

BOUNDS = np.array([12, 18, 27, 40, 60, 90, 140], np.int64)
"""Activities, in sixteenths, at which the next class begins."""

WIDTHS = np.array([(4 + index % 4) / 32 * 2.0 ** (index // 4) for index in range(64)])
"""Standard deviations: 1/8 to 7168, four an octave, exact in binary."""


@dataclass(frozen=True)
class Model:
    """What predicts the numbers of a picture and says how sure that is."""

    weights: tuple[tuple[NDArray[np.int8], ...], ...]
    """Of each channel in each stage, `num_weights` of them."""
    widths: NDArray[np.uint8]
    """Index into `WIDTHS` of each class, (C, `NUM_STAGES`, `NUM_CLASSES`)."""
    low: int
    """Smallest number."""
    high: int
    """Largest number."""

    def to_bytes(self) -> bytes:
        """Return it as `model_size(C)` bytes: weights, widths, then low and high as 16 bits, little-endian."""
        weights = b"".join(array.tobytes() for stages in self.weights for array in stages)
        return weights + self.widths.tobytes() + np.array([self.low, self.high], "<i2").tobytes()

    @classmethod
    def from_bytes(cls, data: bytes, num_channels: int) -> Model:
        """Return the model in `model_size(num_channels)` bytes.

        Raises:
            ValueError: A width that the table lacks, or a range that is none.
        """
        values = np.frombuffer(data[: -num_channels * NUM_STAGES * NUM_CLASSES - 4], np.int8)
        counts = [num_weights(channel, stage) for channel in range(num_channels) for stage in range(NUM_STAGES)]
        arrays = np.split(values, np.cumsum(counts)[:-1])
        weights = tuple(tuple(arrays[start : start + NUM_STAGES]) for start in range(0, len(arrays), NUM_STAGES))
        widths = np.frombuffer(data[len(values) : -4], np.uint8).reshape(num_channels, NUM_STAGES, NUM_CLASSES)
        low, high = (int(value) for value in np.frombuffer(data[-4:], "<i2"))
        if widths.max() >= len(WIDTHS):
            raise ValueError(f"width {widths.max()} of {len(WIDTHS)}")
        if not -LARGEST_VALUE <= low <= high <= LARGEST_VALUE:
            raise ValueError(f"numbers from {low} to {high}")
        return cls(weights, widths, low, high)


def model_size(num_channels: int) -> int:
    """Return the bytes of a model."""
    weights = sum(num_weights(channel, stage) for channel in range(num_channels) for stage in range(NUM_STAGES))
    return weights + num_channels * NUM_STAGES * NUM_CLASSES + 4


def encode_lattice(values: NDArray[np.int32]) -> tuple[Model, bytes]:
    """Return the model and the code of whole numbers.

    Args:
        values: (C, h, w), each at most `LARGEST_VALUE`, of either sign.

    Raises:
        UserError: The package `constriction` is missing.
    """
    constriction = _constriction()
    stages: list[list[Cells]] = [[] for _ in range(NUM_STAGES)]
    order = list(passes(*values.shape[1:]))
    for cells in order:
        stages[cells.stage].append(cells)
    lattice = Lattice(values.shape)
    lattice.values[...] = values
    weights: list[tuple[NDArray[np.int8], ...]] = []
    found: list[list[Prediction]] = []
    squares = np.zeros((len(values), NUM_STAGES, NUM_CLASSES))
    counts = np.zeros_like(squares)
    for channel in range(len(values)):
        weights.append(tuple(fit_weights(lattice, channel, stages)))
        found.append([])
        for cells in order:
            one = predict(lattice, channel, cells, weights[-1][cells.stage])
            numbers = values[channel, cells.rows, cells.columns].reshape(-1)
            lattice.learn_(channel, cells, numbers, one.expected)
            kind, place = _classes(one), (channel, cells.stage)
            miss = numbers - one.expected / ONE
            squares[place] += np.bincount(kind, np.square(miss), NUM_CLASSES)
            counts[place] += np.bincount(kind, minlength=NUM_CLASSES)
            found[-1].append(one)
    model = Model(tuple(weights), _widths(squares, counts), int(values.min()), int(values.max()))
    coder = constriction.stream.stack.AnsCoder()
    family = _family(constriction, model)
    for index, cells in reversed(list(enumerate(order))):
        for channel in reversed(range(len(values))):
            numbers = np.ascontiguousarray(values[channel, cells.rows, cells.columns].reshape(-1))
            coder.encode_reverse(numbers, family, *_gaussians(model, channel, cells, found[channel][index]))
    return model, coder.get_compressed().astype("<u4").tobytes()


def decode_lattice(model: Model, code: bytes, shape: tuple[int, int, int]) -> NDArray[np.int32]:
    """Return the whole numbers (C, h, w) of a code.

    Args:
        model: As `encode_lattice` gave it.
        code: Likewise.
        shape: C, h, w.

    Raises:
        ValueError: The code is not one of so many numbers by this model.
        UserError: The package `constriction` is missing.
    """
    constriction = _constriction()
    coder = constriction.stream.stack.AnsCoder(np.frombuffer(code, "<u4").astype(np.uint32))
    family = _family(constriction, model)
    lattice = Lattice(shape)
    for cells in passes(*shape[1:]):
        for channel in range(shape[0]):
            found = predict(lattice, channel, cells, model.weights[channel][cells.stage])
            numbers = coder.decode(family, *_gaussians(model, channel, cells, found))
            lattice.learn_(channel, cells, numbers, found.expected)
    if not coder.is_empty():
        raise ValueError("the code goes on after the last number")
    return lattice.values


def _constriction() -> Any:
    try:
        import constriction
    except ImportError:
        raise UserError('the entropy coder is missing; pip install "sd-vae[compress]".') from None
    return constriction


def _family(constriction: Any, model: Model) -> Any:
    """Gaussians over all numbers there are; one more than one, or there would be nothing to tell apart."""
    return constriction.stream.model.QuantizedGaussian(model.low, model.high + 1)


def _gaussians(
    model: Model, channel: int, cells: Cells, found: Prediction
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and standard deviation of each number, (n,)."""
    return found.expected / ONE, WIDTHS[model.widths[channel, cells.stage][_classes(found)]]


def _classes(found: Prediction) -> NDArray[np.int64]:
    return np.searchsorted(BOUNDS, found.activity, side="right")


def _widths(squares: NDArray[np.float64], counts: NDArray[np.float64]) -> NDArray[np.uint8]:
    """The index nearest to each class's root mean square; a class that nothing is in gets the first."""
    rms = np.sqrt(squares / np.maximum(counts, 1))
    return np.abs(np.log2(np.maximum(rms, WIDTHS[0]))[..., None] - np.log2(WIDTHS)).argmin(axis=-1).astype(np.uint8)
