"""The file: what a picture's quantised latents need to become a picture again, and checksums over all of it.

docs/svae_format.md is its specification. Nothing in a file is believed before its checksum is right, and nothing is
allocated for a picture that is larger than the reader accepts.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

from sd_vae.errors import UserError
from sd_vae.latents.compression.entropy import Model, model_size

__all__ = ["MAGIC", "MAX_CHANNELS", "MAX_FACTOR", "MAX_NOTE_BYTES", "MAX_PIXELS", "VERSION", "Container"]

MAGIC = b"\x89SVAE\r\n\x1a"
"""First bytes; the line end and the byte above 127 betray a file that was sent as text."""

VERSION = 1
"""Of the format."""

MAX_PIXELS = 89_478_485
"""Pixels of a picture that a reader accepts by default: above it Pillow warns of a decompression bomb."""

MAX_CHANNELS = 64
"""Latent channels at most."""

MAX_FACTOR = 64
"""Pixels a latent cell at most, along each side."""

MAX_NOTE_BYTES = 1024
"""Length of the note at most."""

_HEAD = struct.Struct("<8sBBBBIIBBHI16s")
"""Magic, version, channels, factor, zero, width, height, padding right and below, lengths of note and code, VAE."""

_SUM = struct.Struct("<I")
"""A CRC-32."""


@dataclass(frozen=True, kw_only=True)
class Container:
    """What a file holds."""

    width: int
    """Of the picture, in pixels."""
    height: int
    """Of the picture, in pixels."""
    factor: int
    """Pixels a latent cell, along each side."""
    vae: str
    """First 32 hexadecimal digits of `decoder_fingerprint`."""
    steps: tuple[float, ...]
    """z is this times the whole number, one a channel; float32."""
    note: str
    """What was done to the picture's colours before; empty for nothing."""
    model: Model
    """What the code was written by."""
    code: bytes
    """The whole numbers."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """C, h, w of the latents."""
        return len(self.steps), -(-self.height // self.factor), -(-self.width // self.factor)

    def to_bytes(self) -> bytes:
        """Return the file."""
        note = self.note.encode()
        head = _HEAD.pack(
            MAGIC,
            VERSION,
            len(self.steps),
            self.factor,
            0,
            self.width,
            self.height,
            -self.width % self.factor,
            -self.height % self.factor,
            len(note),
            len(self.code),
            bytes.fromhex(self.vae),
        )
        head += struct.pack(f"<{len(self.steps)}f", *self.steps)
        body = note + self.model.to_bytes() + self.code
        return head + _SUM.pack(zlib.crc32(head)) + body + _SUM.pack(zlib.crc32(body))

    @classmethod
    def from_bytes(cls, data: bytes, *, name: str = "the file", max_pixels: int = MAX_PIXELS) -> Container:
        """Return what a file holds.

        Args:
            data: The file.
            name: What to call it in errors.
            max_pixels: Most pixels to accept, and most numbers.

        Raises:
            UserError: Not such a file, of another version, cut off, damaged, or with a picture that is too large.
        """
        if data[: len(MAGIC)] != MAGIC:
            raise UserError(f"{name} is not a compressed picture of sd-vae, or was sent as text; see sd-vae compress.")
        version = data[len(MAGIC)] if len(data) > len(MAGIC) else VERSION
        if version != VERSION:
            raise UserError(f"{name} has format version {version}, this sd-vae reads {VERSION}; update sd-vae.")
        _require_length(data, _HEAD.size, name)
        _, _, channels, factor, zero, width, height, right, below, note_size, code_size, vae = _HEAD.unpack_from(data)
        head_size = _HEAD.size + 4 * channels
        body_size = note_size + model_size(channels) + code_size
        _require_length(data, head_size + _SUM.size, name)
        _require_sum(data, 0, head_size, "header", name)
        _require_length(data, head_size + body_size + 2 * _SUM.size, name)
        if len(data) > head_size + body_size + 2 * _SUM.size:
            raise UserError(
                f"{name} goes on after its end at byte {head_size + body_size + 2 * _SUM.size}; cut it there."
            )
        body_at = head_size + _SUM.size
        _require_sum(data, body_at, body_size, "latents", name)
        numbers = channels * -(-height // max(factor, 1)) * -(-width // max(factor, 1))
        if max(width * height, numbers) > max_pixels:
            raise UserError(
                f"{name} holds a picture of {width}x{height} pixels and {numbers} numbers, more than the {max_pixels} "
                "that are accepted; allow more if you trust it."
            )
        steps = struct.unpack_from(f"<{channels}f", data, _HEAD.size)
        body = memoryview(data)[body_at : body_at + body_size]
        try:
            problems = list(_problems(channels, factor, zero, width, height, right, below, note_size, code_size, steps))
            if problems:
                raise ValueError(problems[0])
            return cls(
                width=width,
                height=height,
                factor=factor,
                vae=vae.hex(),
                steps=steps,
                note=bytes(body[:note_size]).decode(),
                model=Model.from_bytes(bytes(body[note_size : body_size - code_size]), channels),
                code=bytes(body[body_size - code_size :]),
            )
        except ValueError as error:  # what a program wrote that is not ours: the checksums are right
            raise UserError(f"{name} breaks the format ({error}); write it anew.") from None


def _problems(
    channels: int,
    factor: int,
    zero: int,
    width: int,
    height: int,
    right: int,
    below: int,
    note_size: int,
    code_size: int,
    steps: tuple[float, ...],
) -> Iterator[str]:
    """What a header says that no writer may say."""
    if not 0 < channels <= MAX_CHANNELS:
        yield f"{channels} latent channels, of at most {MAX_CHANNELS}"
    if not 0 < factor <= MAX_FACTOR:
        yield f"a factor of {factor}, of at most {MAX_FACTOR}"
    elif (right, below) != (-width % factor, -height % factor):
        yield f"a padding of {right} and {below} pixels at {width}x{height}"
    if not width or not height:
        yield f"a picture of {width}x{height} pixels"
    if zero:
        yield f"flags {zero:#x}"
    if note_size > MAX_NOTE_BYTES:
        yield f"a note of {note_size} bytes, of at most {MAX_NOTE_BYTES}"
    if code_size % 4:
        yield f"a code of {code_size} bytes, not a multiple of 4"
    if not all(math.isfinite(step) and step > 0 for step in steps):
        yield "steps that are not finite and above 0"


def _require_length(data: bytes, size: int, name: str) -> None:
    if len(data) < size:
        raise UserError(f"{name} is cut off: it has {len(data)} bytes of at least {size}; get it again.")


def _require_sum(data: bytes, start: int, size: int, part: str, name: str) -> None:
    """Check the CRC-32 that stands behind a part."""
    if zlib.crc32(data[start : start + size]) != _SUM.unpack_from(data, start + size)[0]:
        raise UserError(f"{name} is damaged: the checksum of its {part} is wrong; get it again.")
