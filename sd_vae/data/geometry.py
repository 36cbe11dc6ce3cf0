"""Which part of a picture becomes a tensor, at which size: squares, random squares, whole pictures, or buckets.

`PictureTransform` is the choice as data, `placements` the arithmetic in whole numbers, `views` the pixels. All three
are pure: the same bytes give the same views in every process and every run, whatever is read before or beside them.

Shapes: H W pixels; sizes are (height, width) everywhere.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from sd_vae.data.decoding import MAX_PIXELS, PILLOW_LIMIT, Decoded, Reject, Size
from sd_vae.errors import UserError
from sd_vae.validation import STRICT, from_plain

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["PictureTransform", "Placement", "View", "placements", "views"]

RULES = 1
"""Number of the rules in this file; it changes when the same fields come to mean other pixels."""


@dataclass(frozen=True, kw_only=True)
class PictureTransform:
    """What is cut from each picture. `size` alone is a centred square; the alternatives exclude each other."""

    __pydantic_config__ = STRICT

    size: int | None = None
    """Side of the square crops in pixels; with `buckets`, side of the square whose area no bucket exceeds."""
    random_crops: int = 0
    """Random squares a picture instead of the centred one; their places depend on its bytes and `seed` alone."""
    crop_scale: tuple[float, float] = (0.5, 1.0)
    """Bounds of a random square's side as a fraction of the shorter side; none is taken smaller than `size` pixels."""
    seed: int = 0
    """Seed of the random squares."""
    native: bool = False
    """Keep the size of each picture, and cut it, centred, to multiples of `factor`."""
    buckets: bool = False
    """Resize each picture to cover the rectangle of nearest shape among those of one area, and cut that, centred."""
    bucket_step: int = 64
    """Buckets have sides that are multiples of this many pixels."""
    bucket_max_ratio: float = 2.0
    """Longest side of a bucket over its shortest, at most."""
    factor: int = 8
    """Pixels a latent cell of the autoencoder; every side of a view is a multiple."""
    flip: bool = False
    """Add the mirrored view of each view."""
    allow_upscale: bool = False
    """Enlarge pictures that are smaller than the crop, instead of rejecting them."""
    resize_filter: Literal["bicubic", "lanczos"] = "bicubic"
    """Pillow's antialiased filter, on 8-bit sRGB values."""
    background: tuple[int, int, int] = (255, 255, 255)
    """Colour behind transparent pixels, RGB bytes."""
    max_pixels: int = MAX_PIXELS
    """Pictures of more pixels are rejected as decompression bombs."""
    draft: bool = False
    """Decode JPEG files at 1/2, 1/4 or 1/8 where that is at least twice the size needed: faster, other pixels."""
    rules: int = RULES
    """Number of the rules by which these fields are read."""

    def __post_init__(self) -> None:
        """Check the rules between fields.

        Raises:
            UserError: Lists every rule that is broken, with its values.
        """
        problems = list(self._problems())
        if problems:
            raise UserError("not a usable picture transform: " + "; ".join(problems) + ".")

    def _problems(self) -> list[str]:
        found = []
        if self.native and (self.size is not None or self.buckets or self.random_crops):
            found.append("native keeps every size, so it goes without size, buckets and random_crops")
        if not self.native and self.size is None:
            found.append("size is missing, give the side of the crops in pixels, or choose native")
        if self.buckets and self.random_crops:
            found.append(f"random_crops is {self.random_crops} and buckets are centred, choose one of them")
        for name in ("size", "bucket_step", "factor", "max_pixels"):
            value = getattr(self, name)
            if value is not None and value < 1:
                found.append(f"{name} is {value}, it must be at least 1")
        factor = max(self.factor, 1)
        if self.size is not None and not self.buckets and self.size % factor:
            found.append(f"size is {self.size}, it must be a multiple of factor {factor}")
        if self.buckets and self.bucket_step % factor:
            found.append(f"bucket_step is {self.bucket_step}, it must be a multiple of factor {factor}")
        if self.buckets and self.size is not None and self.size % max(self.bucket_step, 1):
            found.append(f"size is {self.size}, with buckets it must be a multiple of bucket_step {self.bucket_step}")
        if not 1 <= self.bucket_max_ratio < math.inf:
            found.append(f"bucket_max_ratio is {self.bucket_max_ratio}, it must be at least 1 and finite")
        if self.random_crops < 0:
            found.append(f"random_crops is {self.random_crops}, it must be 0 or more")
        smallest, largest = self.crop_scale
        if not 0 < smallest <= largest <= 1:
            found.append(f"crop_scale is ({smallest}, {largest}), it must satisfy 0 < smallest <= largest <= 1")
        if self.seed < 0:
            found.append(f"seed is {self.seed}, it must be 0 or more")
        if self.resize_filter not in ("bicubic", "lanczos"):
            found.append(f"resize_filter is {self.resize_filter!r}, choose bicubic or lanczos")
        if not all(0 <= channel <= 255 for channel in self.background):
            found.append(f"background is {self.background}, every channel must be 0 to 255")
        if self.max_pixels > PILLOW_LIMIT:
            found.append(f"max_pixels is {self.max_pixels}, Pillow opens at most {PILLOW_LIMIT}")
        if self.rules != RULES:
            found.append(f"rules is {self.rules}, this version has rules {RULES}; use the version that wrote it")
        return found

    @property
    def bucket_sizes(self) -> tuple[Size, ...]:
        """Sizes of the buckets, tallest first: for each height, the widest with at most size x size pixels."""
        if not self.buckets or self.size is None:
            return ()
        area, step, ratio = self.size**2, self.bucket_step, self.bucket_max_ratio
        found = set()
        for short in range(step, self.size + 1, step):
            long = area // short // step * step
            if long <= ratio * short:
                found |= {(short, long), (long, short)}
        return tuple(sorted(found, reverse=True))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, source: str = "picture transform") -> PictureTransform:
        """Return the transform that a manifest describes.

        Raises:
            UserError: Unknown fields, values of the wrong type, or broken rules, all at once.
        """
        return from_plain(cls, values, source=source)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values, ready for JSON. Library versions are not among them."""
        return {
            name: list(value) if isinstance(value, tuple) else value for name, value in dataclasses.asdict(self).items()
        }


@dataclass(frozen=True)
class Placement:
    """One rectangle of a resized picture."""

    index: int
    """Number of the rectangle within its picture."""
    resized_size: Size
    """What the whole picture is resized to."""
    crop: tuple[int, int, int, int]
    """Top, left, height, width, in pixels of the resized picture."""


@dataclass(frozen=True)
class View:
    """One rectangle as pixels."""

    x: Tensor
    """(3, H, W), uint8, contiguous; `sd_vae.images.to_unit_range` makes it [-1, 1]."""
    index: int
    """Number of the rectangle within its picture; a view and its mirror image share it."""
    resized_size: Size
    """What the whole picture was resized to."""
    crop: tuple[int, int, int, int]
    """Top, left, height, width, in pixels of the resized picture, before mirroring."""
    flipped: bool
    """Mirrored after cropping."""


def placements(original_size: Size, transform: PictureTransform, sha256: str) -> list[Placement] | Reject:
    """Return where the views of a picture lie.

    A centred square is that of torchvision's `Resize(size)` and `CenterCrop(size)`: the shorter side becomes `size`,
    the longer one is cut down to a whole number. Random squares come from a picture whose shorter side is `size` over
    a random fraction; nothing is enlarged for them. A bucket is the one with the nearest logarithm of its shape.

    Args:
        original_size: Of the whole upright picture.
        transform: What is wanted.
        sha256: Of the source bytes; with the seed and the index it decides a random square.
    """
    height, width = original_size
    if transform.size is None:
        crop_size = (height - height % transform.factor, width - width % transform.factor)
        if not all(crop_size):
            return _too_small(original_size, (transform.factor, transform.factor), sha256)
        return [_centred(original_size, crop_size)]
    if transform.buckets:
        crop_size = min(transform.bucket_sizes, key=lambda size: abs(math.log(height * size[1] / (width * size[0]))))
    else:
        crop_size = (transform.size, transform.size)
    if (height < crop_size[0] or width < crop_size[1]) and not transform.allow_upscale:
        return _too_small(original_size, crop_size, sha256)
    if transform.buckets:
        return [_centred(_cover(original_size, crop_size), crop_size)]
    if transform.random_crops:
        return [_random(index, original_size, transform, sha256) for index in range(transform.random_crops)]
    return [_centred(_shorter_to(original_size, transform.size), crop_size)]


def views(decoded: Decoded, transform: PictureTransform) -> list[View] | Reject:
    """Return the views of a picture, each followed by its mirror image where `flip` is on."""
    import numpy as np
    import torch
    from PIL import Image

    places = placements(decoded.original_size, transform, decoded.sha256)
    if isinstance(places, Reject):
        return places
    resampling = {"bicubic": Image.Resampling.BICUBIC, "lanczos": Image.Resampling.LANCZOS}[transform.resize_filter]
    found = []
    for place in places:
        top, left, height, width = place.crop
        resized = decoded.image.resize(place.resized_size[::-1], resampling)
        cropped = resized.crop((left, top, left + width, top + height))
        x = torch.from_numpy(np.ascontiguousarray(np.asarray(cropped).transpose(2, 0, 1)))
        found.append(View(x, flipped=False, **vars(place)))
        if transform.flip:
            found.append(View(x.flip(-1), flipped=True, **vars(place)))
    return found


def largest_resize(original_size: Size, transform: PictureTransform) -> Size:
    """Return the largest size to which `views` may resize a picture: what a reduced decode has to serve."""
    if transform.random_crops and transform.size is not None:
        shorter = max(transform.size, min(min(original_size), _zoomed(transform.size, transform.crop_scale[0])))
        return _shorter_to(original_size, shorter)
    places = placements(original_size, transform, "")
    return original_size if isinstance(places, Reject) else places[0].resized_size


def _random(index: int, original_size: Size, transform: PictureTransform, sha256: str) -> Placement:
    from sd_vae.data.randomness import sample_rng

    assert transform.size is not None
    rng = sample_rng(transform.seed, index, int(sha256, 16), "crop")
    fraction = rng.uniform(*transform.crop_scale)
    shorter = max(transform.size, min(min(original_size), _zoomed(transform.size, fraction)))
    height, width = _shorter_to(original_size, shorter)
    top = int(rng.integers(0, height - transform.size, endpoint=True))
    left = int(rng.integers(0, width - transform.size, endpoint=True))
    return Placement(index, (height, width), (top, left, transform.size, transform.size))


def _zoomed(size: int, fraction: float) -> int:
    return round(size / fraction)


def _centred(resized_size: Size, crop_size: Size) -> Placement:
    top, left = (round((whole - part) / 2) for whole, part in zip(resized_size, crop_size, strict=True))
    return Placement(0, resized_size, (top, left, *crop_size))


def _shorter_to(size: Size, side: int) -> Size:
    """The size in the same shape whose shorter side is `side`."""
    height, width = size
    return (side, side * width // height) if height <= width else (side * height // width, side)


def _cover(size: Size, target: Size) -> Size:
    """The smallest size in the same shape, to the nearest pixel, that covers the target."""
    height, width = size
    if height * target[1] >= width * target[0]:
        return max(target[0], (2 * height * target[1] + width) // (2 * width)), target[1]
    return target[0], max(target[1], (2 * width * target[0] + height) // (2 * height))


def _too_small(original_size: Size, crop_size: Size, sha256: str) -> Reject:
    (height, width), (crop_height, crop_width) = original_size, crop_size
    return Reject("too-small", f"{height}x{width} is smaller than the crop {crop_height}x{crop_width}", sha256)
