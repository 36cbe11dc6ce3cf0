"""The ways a picture can go: through a VAE, through a codec, or through a box average; a row of the report each.

Shapes: C latent channels, h w latent cells.
"""

from __future__ import annotations

import hashlib
import math
import time
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from PIL import Image
from torch import Tensor

from sd_vae.errors import UserError

from .baselines import box_average
from .codecs import BITS_PER_VALUE, EQUAL_BITS, compress
from .latent_stats import LatentSums
from .models import weights_fingerprint
from .protocols import Protocol as EvaluationProtocol
from .roundtrip import decode_picture, encode_picture

__all__ = ["BoxRoute", "CodecRoute", "Passed", "Route", "VaeRoute", "photo_generator"]


@dataclass(frozen=True, kw_only=True)
class Passed:
    """A picture that has gone one way."""

    recon: Image.Image
    """What came back, 8-bit RGB of the same size."""
    num_bits: float | None = None
    """What stood in between, in bits; None where that has no meaning."""
    z: Tensor | None = None
    """Raw latents (1, C, h, w) as they were decoded; None where there are none."""
    latents: LatentSums | None = None
    """What it adds to the statistics of latents."""
    seconds: float = 0.0
    """Wall time of encoding and decoding."""


class Route(Protocol):
    """One way of reconstruction."""

    @property
    def name(self) -> str:
        """What its row is called."""

    @property
    def kind(self) -> Literal["vae", "codec", "box_average"]:
        """What it is."""

    @property
    def fingerprint(self) -> str | None:
        """sha256 of its weights, where it has any."""

    def __call__(self, x: Image.Image, photo: str, num_bits: float | None) -> Passed:
        """Return what becomes of a picture.

        Args:
            x: 8-bit RGB.
            photo: Its name, which fixes the noise.
            num_bits: What the first VAE spent on it.
        """


class VaeRoute:
    """Encode to the posterior, decode its mode or one draw.

    Args:
        name: What the row is called.
        vae: Any of `eval.models.AUTOENCODERS`.
        protocol: Mode or sample, seed, rounding.
    """

    kind: Literal["vae"] = "vae"

    def __init__(self, name: str, vae: Any, protocol: EvaluationProtocol) -> None:
        self.name = name
        self.vae = vae
        self.protocol = protocol
        self.fingerprint = weights_fingerprint(vae)
        vectors = vae.config.get("num_vq_embeddings")
        self._bits_per_cell = math.log2(vectors) if vectors else None

    def __call__(self, x: Image.Image, photo: str, num_bits: float | None = None) -> Passed:
        """Return the picture through the VAE and back."""
        del num_bits
        generator = photo_generator(self.protocol.seed, photo)
        started = time.perf_counter()
        encoded = encode_picture(self.vae, x)
        z = encoded.z
        if encoded.posterior is not None and self.protocol.latents == "sample":
            with torch.inference_mode():
                z = encoded.posterior.sample(generator=generator)
        recon = decode_picture(self.vae, z, x.size, rounding=self.protocol.rounding, generator=generator)
        seconds = time.perf_counter() - started
        per_cell = self._bits_per_cell or BITS_PER_VALUE * z.shape[1]
        return Passed(
            recon=recon,
            num_bits=per_cell * z.shape[2] * z.shape[3],
            z=z,
            latents=LatentSums.of_point(z) if encoded.posterior is None else LatentSums.of(encoded.posterior),
            seconds=seconds,
        )


class CodecRoute:
    """JPEG or WebP in as many bits as the first VAE's latents take.

    Args:
        codec: One of `eval.codecs.CODECS`.
    """

    kind: Literal["codec"] = "codec"
    fingerprint = None

    def __init__(self, codec: str) -> None:
        self.codec = codec
        self.name = codec + EQUAL_BITS

    def __call__(self, x: Image.Image, photo: str, num_bits: float | None) -> Passed:
        """Return the picture through the codec and back.

        Raises:
            UserError: No VAE says how many bits.
        """
        del photo
        if num_bits is None:
            raise UserError(f"{self.name} needs a VAE to say how many bits; evaluate at least one.")
        coded = compress(x, self.codec, num_bits)
        return Passed(recon=coded.recon, num_bits=8 * coded.num_bytes)


class BoxRoute:
    """Blocks of the picture's mean colour.

    Args:
        block: Side of a block in pixels.
    """

    kind: Literal["box_average"] = "box_average"
    fingerprint = None

    def __init__(self, block: int) -> None:
        self.block = block
        self.name = f"{block}x{block} box average"

    def __call__(self, x: Image.Image, photo: str, num_bits: float | None) -> Passed:
        """Return the picture's block averages."""
        del photo, num_bits
        return Passed(recon=box_average(x, self.block))


def photo_generator(seed: int, photo: str) -> torch.Generator:
    """Return the source of a photo's noise: of the seed and its name alone, so order and processes do not count."""
    digest = hashlib.sha256(f"{seed} {photo}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
