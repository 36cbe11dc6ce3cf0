"""Yardsticks that everybody knows: JPEG and WebP at the size of the latents."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from PIL import Image

from sd_vae.errors import UserError

__all__ = ["BITS_PER_VALUE", "CODECS", "EQUAL_BITS", "Coded", "compress", "encode"]

BITS_PER_VALUE = 16
"""What a latent value counts as, as it is stored: float16."""

EQUAL_BITS = " at equal bits"
"""Behind a codec's name: the row of what it makes of the bits that the first VAE spends."""

CODECS: dict[str, tuple[Literal["JPEG", "WEBP"], dict[str, int | bool]]] = {
    "JPEG": ("JPEG", {"optimize": True}),
    "WebP": ("WEBP", {"method": 4}),
}
"""Name to Pillow's format and options; chroma at half resolution, Pillow's default."""


@dataclass(frozen=True)
class Coded:
    """A picture through a codec and back."""

    recon: Image.Image
    """What comes back."""
    num_bytes: int
    """Size of the file, headers and all."""
    quality: int
    """The codec's setting, 0 to 100."""


def compress(picture: Image.Image, codec: str, num_bits: float) -> Coded:
    """Return a picture coded in the number of bits nearest to `num_bits` that a quality setting gives.

    Args:
        picture: 8-bit RGB.
        codec: One of `CODECS`.
        num_bits: Size to meet. Below the codec's smallest file the smallest is taken, above its largest the largest.

    Raises:
        UserError: No such codec.
    """
    files: dict[int, bytes] = {}

    def size(quality: int) -> int:
        if quality not in files:
            files[quality] = _file(picture, codec, quality)
        return len(files[quality])

    above = _first(lambda quality: 8 * size(quality) > num_bits)
    quality = min({max(above - 1, 0), above}, key=lambda quality: abs(8 * size(quality) - num_bits))
    return _coded(files[quality], quality)


def encode(picture: Image.Image, codec: str, quality: int) -> Coded:
    """Return a picture coded in a quality, 0 to 100.

    Raises:
        UserError: No such codec.
    """
    return _coded(_file(picture, codec, quality), quality)


def _file(picture: Image.Image, codec: str, quality: int) -> bytes:
    if codec not in CODECS:
        raise UserError(f"unknown codec {codec!r}; choose one of: {', '.join(CODECS)}.")
    kind, options = CODECS[codec]
    buffer = io.BytesIO()
    picture.save(buffer, kind, quality=quality, **options)
    return buffer.getvalue()


def _coded(file: bytes, quality: int) -> Coded:
    with Image.open(io.BytesIO(file)) as opened:
        return Coded(opened.convert("RGB"), len(file), quality)


def _first(is_above: Callable[[int], bool]) -> int:
    """The lowest quality that is above, by bisection; 100 where none is."""
    low, high = 0, 100
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if is_above(middle) else (middle + 1, high)
    return low
