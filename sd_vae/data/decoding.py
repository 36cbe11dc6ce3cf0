"""From the bytes of a picture file to pixels, or to the reason why not; nothing that strangers write stops a run.

What the pixels are does not depend on anything but the bytes, the options and the libraries: see `sd_vae.images.to_rgb`
for each kind of file. Every file of a data set ends as a `Decoded` or as a `Reject` with one of `REASONS`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from sd_vae.errors import UserError
from sd_vae.images import DAMAGE, open_undecoded, to_rgb

if TYPE_CHECKING:
    from PIL import Image

__all__ = [
    "MAX_PIXELS",
    "PILLOW_LIMIT",
    "REASONS",
    "Decoded",
    "Reason",
    "Reject",
    "Size",
    "decode_picture",
    "decoder_versions",
]

Size = tuple[int, int]
"""Height and width in pixels."""

MAX_PIXELS = 89_478_485
"""Pixels above which a picture counts as a decompression bomb: where Pillow begins to warn."""
PILLOW_LIMIT = 2 * MAX_PIXELS
"""Pixels above which Pillow refuses to open a picture."""

Reason = Literal["empty", "not-a-picture", "damaged", "too-large", "unknown-colours", "too-small"]

REASONS: dict[Reason, str] = {
    "empty": "there is no picture: a file of zero bytes, or an empty cell of a table",
    "not-a-picture": "no format is recognised; also pictures that end within their header",
    "damaged": "the file begins like a picture and cannot be decoded: cut off or corrupt",
    "too-large": "more pixels than `max_pixels`: a decompression bomb, or nearly one",
    "unknown-colours": "floats of unknown range, or CMYK with a profile that cannot be used",
    "too-small": "smaller than the crop that is to be taken, and enlarging is not allowed",
}
"""Every reason for which a picture is rejected; the keys are part of the format of `rejects.jsonl`."""

_ORIENTATION = 0x0112  # EXIF tag; values 5 to 8 turn the picture by a quarter


@dataclass(frozen=True)
class Decoded:
    """A picture with the address of its content."""

    image: Image.Image
    """8-bit RGB, upright; smaller than `original_size` where a reduced decode was asked for."""
    sha256: str
    """Of the source bytes."""
    original_size: Size
    """Of the whole upright picture."""
    has_more_frames: bool
    """There is more than one frame (animation, pages, stereo pair), of which this is the first."""


@dataclass(frozen=True)
class Reject:
    """A picture that is not used, and why; the address is None until the picture's place in a source is known."""

    reason: Reason
    """Key of `REASONS`."""
    detail: str
    """What exactly; the same in every run."""
    sha256: str
    """Of the source bytes."""
    position: int | None = None
    """Number of the record."""
    id: str | None = None
    """Name of the record."""
    source: str | None = None
    """File or url, or `archive::member`."""

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values, ready for a line of JSON."""
        return dataclasses.asdict(self)


def decode_picture(
    data: bytes,
    *,
    background: tuple[int, int, int] = (255, 255, 255),
    max_pixels: int = MAX_PIXELS,
    shrink_to: Callable[[Size], Size] | None = None,
) -> Decoded | Reject:
    """Return the picture in a file's bytes as upright 8-bit RGB, or why it cannot be used.

    Args:
        data: The whole file.
        background: Colour behind transparent pixels, RGB bytes.
        max_pixels: Largest number of pixels, at most `PILLOW_LIMIT`.
        shrink_to: From the size of the picture to the size it will be reduced to. Where it is given, JPEG files are
            decoded at 1/2, 1/4 or 1/8 of their size as long as that is at least twice the result in both directions.
            That is faster, and other pixels than those of a whole decode.
    """
    from PIL import Image, UnidentifiedImageError

    sha256 = hashlib.sha256(data).hexdigest()
    if not data:
        return Reject("empty", "0 bytes", sha256)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's remarks on odd files; they are judged by what comes out
            with open_undecoded(io.BytesIO(data)) as image:
                width, height = image.size
                if width * height > max_pixels:
                    detail = f"{height}x{width} is {width * height} pixels, the limit is {max_pixels}"
                    return Reject("too-large", detail, sha256)
                has_more_frames = bool(getattr(image, "is_animated", False))
                full_size = _shrink(image, shrink_to) if shrink_to is not None else None
                rgb = to_rgb(image, background)
                return Decoded(rgb, sha256, full_size or (rgb.height, rgb.width), has_more_frames)
    except UnidentifiedImageError:  # its message holds the address of an object
        return Reject("not-a-picture", "no picture format is recognised", sha256)
    except Image.DecompressionBombError:
        return Reject("too-large", f"more than {PILLOW_LIMIT} pixels", sha256)
    except UserError as error:
        return Reject("unknown-colours", str(error), sha256)
    except DAMAGE as error:
        return Reject("damaged", f"{type(error).__name__}: {' '.join(str(error).split())}", sha256)


def decoder_versions() -> dict[str, str]:
    """Return the versions on which pixels depend: Pillow's, and those of the libraries it was built with."""
    import PIL
    from PIL import features

    names = ("libjpeg_turbo", "zlib", "webp", "avif", "libtiff", "jpg_2000", "littlecms2")
    versions = {name: features.version(name) for name in names}
    return {"pillow": PIL.__version__, **{name: version for name, version in versions.items() if version}}


def _shrink(image: Image.Image, shrink_to: Callable[[Size], Size]) -> Size | None:
    """Have a JPEG file decoded at the smallest scale that is at least twice the target; its upright size before.

    None for other formats, which have no such scales; of TIFF, `size` is upright already.
    """
    if image.format not in ("JPEG", "MPO"):
        return None
    is_turned = image.getexif().get(_ORIENTATION, 1) in (5, 6, 7, 8)
    full_size = (image.width, image.height) if is_turned else (image.height, image.width)
    height, width = shrink_to(full_size)
    image.draft(None, (2 * height, 2 * width) if is_turned else (2 * width, 2 * height))
    return full_size
