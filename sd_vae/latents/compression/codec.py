"""Pictures as small files of quantised latents, and back: `compress(vae, x)` and `decompress(vae, file)`.

Shapes: C latent channels, H W pixels, h w latent cells.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from sd_vae.errors import UserError
from sd_vae.images import crop, pad_to_factor
from sd_vae.latents.compression.container import MAX_NOTE_BYTES, MAX_PIXELS, Container
from sd_vae.latents.compression.entropy import LARGEST_VALUE, decode_lattice, encode_lattice
from sd_vae.latents.compression.steps import DEFAULT_QUALITY, level_of_quality, probe, sensitivity
from sd_vae.latents.fingerprint import decoder_fingerprint

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from sd_vae.autoencoder import AutoencoderKL

__all__ = ["Compressed", "Held", "compress", "decompress", "dequantise", "quantise", "read"]

LEVELS_DB = tuple(step / 4 for step in range(-160, 121))
"""Levels that a search for a size tries: -40 to 30 dB."""

FINGERPRINT_DIGITS = 32
"""Hexadecimal digits of the VAE's fingerprint that a file keeps."""


@dataclass(frozen=True)
class Compressed:
    """A picture as a file."""

    data: bytes
    """The file."""
    z: Tensor
    """What it holds: (1, C, h, w), raw and quantised, float32."""
    level_db: float
    """Expected squared error of quantisation over that of the VAE."""
    bits_per_pixel: float
    """Of the whole file."""


def compress(
    vae: AutoencoderKL,
    x: Tensor,
    *,
    quality: float | None = None,
    bits_per_pixel: float | None = None,
    max_bytes: int | None = None,
    note: str = "",
) -> Compressed:
    """Return a picture as a small file.

    Args:
        vae: The VAE; what decompresses needs the same decoder.
        x: (1, 3, H, W) in [-1, 1], of any size.
        quality: 1 to 100; at 75, the default, quantisation costs about 0.2 dB, and more or less by 0.4 dB of its own
            error for each step.
        bits_per_pixel: Instead: the best that fits into so many.
        max_bytes: Instead: the best that fits into a file of so many.
        note: What was done to the picture before, for the file.

    Raises:
        UserError: More than one rate, one out of its range or too small for the picture, x is not one picture, the note
            is too long, the latents are not finite, or the package `constriction` is missing.
    """
    if x.dim() != 4 or x.shape[:2] != (1, 3) or not x.numel():
        raise UserError(f"x has shape {tuple(x.shape)}, it must be (1, 3, H, W); compress one picture at a time.")
    if len(note.encode()) > MAX_NOTE_BYTES:
        raise UserError(f"the note has {len(note.encode())} bytes, at most {MAX_NOTE_BYTES} are kept; shorten it.")
    height, width = x.shape[-2:]
    rate = _Rate.of(quality, bits_per_pixel, max_bytes, height * width)
    found = sensitivity(vae, probe(x, vae.factor))
    with torch.no_grad():
        z = vae.encode(pad_to_factor(x, vae.factor).to(vae.device, vae.dtype)).latent_dist.mode().float().cpu()
    decoder = decoder_fingerprint(vae)[:FINGERPRINT_DIGITS]

    def at(level_db: float) -> Compressed:
        steps = np.array(found.steps(level_db), np.float32)
        values = quantise(z, steps)
        model, code = encode_lattice(values)
        data = Container(
            width=width,
            height=height,
            factor=vae.factor,
            vae=decoder,
            steps=tuple(steps.tolist()),
            note=note,
            model=model,
            code=code,
        ).to_bytes()
        return Compressed(data, dequantise(values, steps), level_db, 8 * len(data) / (height * width))

    if rate.quality is not None:
        return at(level_of_quality(rate.quality))
    return _best_within(rate.max_bytes, at)


def decompress(
    vae: AutoencoderKL,
    data: bytes,
    *,
    name: str = "the file",
    max_pixels: int = MAX_PIXELS,
    allow_other_vae: bool = False,
) -> Tensor:
    """Return the picture in a file, (1, 3, H, W), around [-1, 1] and unclamped, on the VAE's device.

    Args:
        vae: A VAE with the decoder of the one that compressed.
        data: The file.
        name: What to call it in errors.
        max_pixels: Largest picture to accept.
        allow_other_vae: Decode with another decoder for the same latents, such as a fine-tuned or a smaller one.

    Raises:
        UserError: The file is none, damaged, cut off or too large, its VAE is another, or `constriction` is missing.
    """
    container = Container.from_bytes(data, name=name, max_pixels=max_pixels)
    channels = int(vae.config.latent_channels)
    if (len(container.steps), container.factor) != (channels, vae.factor):
        raise UserError(
            f"{name} holds latents of {len(container.steps)} channels and factor {container.factor}, this VAE has "
            f"{channels} and {vae.factor}; give the VAE that compressed it."
        )
    digits = decoder_fingerprint(vae)[:FINGERPRINT_DIGITS]
    if digits != container.vae and not allow_other_vae:
        raise UserError(
            f"{name} was compressed for the decoder {container.vae[:12]}, this VAE has {digits[:12]}; give the VAE "
            "that compressed it, or allow another one."
        )
    z = _numbers(container, name)
    with torch.no_grad():
        x = vae.decode(z.to(vae.device, vae.dtype)).sample
    return crop(x, container.height, container.width)


@dataclass(frozen=True)
class Held:
    """What a file holds, without a VAE."""

    z: Tensor
    """(1, C, h, w), raw and quantised, float32."""
    width: int
    """Of the picture, in pixels."""
    height: int
    """Of the picture, in pixels."""
    factor: int
    """Pixels a latent cell, along each side."""
    vae: str
    """First digits of the fingerprint of its decoder."""
    note: str
    """What was done to the picture before."""


def read(data: bytes, *, name: str = "the file", max_pixels: int = MAX_PIXELS) -> Held:
    """Return what a file holds, checked from end to end.

    Args:
        data: The file.
        name: What to call it in errors.
        max_pixels: Largest picture to accept; memory is proportional to the picture.

    Raises:
        UserError: The file is none, damaged, cut off or too large, or `constriction` is missing.
    """
    container = Container.from_bytes(data, name=name, max_pixels=max_pixels)
    z = _numbers(container, name)
    return Held(z, container.width, container.height, container.factor, container.vae, container.note)


def _numbers(container: Container, name: str) -> Tensor:
    """The latents (1, C, h, w) of a file."""
    try:
        values = decode_lattice(container.model, container.code, container.shape)
    except ValueError as error:
        raise UserError(f"{name} breaks the format ({error}); write it anew.") from None
    return dequantise(values, np.array(container.steps, np.float32))


def quantise(z: Tensor, steps: NDArray[np.float32]) -> NDArray[np.int32]:
    """Return z (1, C, h, w) as multiples of its channels' steps, (C, h, w), rounded to nearest.

    Raises:
        UserError: A multiple is larger than the format holds.
    """
    values = np.rint(z[0].double().numpy() / steps[:, None, None].astype(np.float64))
    largest = float(np.abs(values).max())
    if not largest <= LARGEST_VALUE:
        raise UserError(
            f"a latent is {largest:.3g} steps large, the format holds {LARGEST_VALUE}; choose a lower quality, "
            "and look at the VAE, whose latents are far from usual or not finite."
        )
    return values.astype(np.int32)


def dequantise(values: NDArray[np.int32], steps: NDArray[np.float32]) -> Tensor:
    """Return z (1, C, h, w), float32, of multiples of its channels' steps."""
    return torch.from_numpy(values.astype(np.float32) * steps[:, None, None])[None]


@dataclass(frozen=True)
class _Rate:
    """How large a file may become: by quality, or by its size."""

    quality: float | None
    max_bytes: int

    @classmethod
    def of(cls, quality: float | None, bits_per_pixel: float | None, max_bytes: int | None, num_pixels: int) -> _Rate:
        given = {"quality": quality, "bits per pixel": bits_per_pixel, "a size in bytes": max_bytes}
        named = [f"{name} ({value})" for name, value in given.items() if value is not None]
        if len(named) > 1:
            raise UserError(f"{' and '.join(named)} are given; choose one of them.")
        if quality is not None and not 1 <= quality <= 100:
            raise UserError(f"quality is {quality}, it must be from 1 to 100; the default is {DEFAULT_QUALITY:g}.")
        for name, value in (("bits per pixel", bits_per_pixel), ("a size in bytes", max_bytes)):
            if value is not None and not 0 < value < float("inf"):
                raise UserError(f"{name} is {value}, it must be above 0.")
        if bits_per_pixel is not None:
            return cls(None, int(bits_per_pixel * num_pixels / 8))
        return cls(DEFAULT_QUALITY if quality is None and max_bytes is None else quality, max_bytes or 0)


def _best_within(max_bytes: int, at: Callable[[float], Compressed]) -> Compressed:
    """The finest of `LEVELS_DB` whose file has at most so many bytes, by bisection.

    Raises:
        UserError: Not even the coarsest fits.
    """
    low, high = 0, len(LEVELS_DB)  # below low too large, from high on small enough
    best = None
    while low < high:
        middle = (low + high) // 2
        tried = at(LEVELS_DB[middle])
        if len(tried.data) <= max_bytes:
            best, high = tried, middle
        else:
            low = middle + 1
    if best is None:
        raise UserError(
            f"the smallest file of this picture has {len(tried.data)} bytes, more than {max_bytes}; allow more."
        )
    return best
