"""Pictures to tensors and back: every kind of file that people have, as RGB in [-1, 1].

Shapes: B batch, H W pixels.
"""

from __future__ import annotations

import io
import struct
import warnings
from pathlib import Path
from typing import IO, TYPE_CHECKING

from sd_vae.errors import UserError

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

__all__ = [
    "DAMAGE",
    "IMAGE_SUFFIXES",
    "crop",
    "list_images",
    "open_image",
    "open_undecoded",
    "pad_to_factor",
    "to_pil",
    "to_rgb",
    "to_tensor",
    "to_unit_range",
]

IMAGE_SUFFIXES = frozenset(
    {".apng", ".avif", ".bmp", ".gif", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".jpx", ".pbm", ".pgm"}
    | {".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp"}
)
"""How the names of files end that are taken for pictures."""

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000")
"""Formats that are decoded. Pillow knows others: for EPS it would start Ghostscript on what a stranger wrote."""

DAMAGE = (OSError, ValueError, SyntaxError, EOFError, IndexError, OverflowError, RuntimeError, struct.error)
"""What Pillow raises on damaged files, found by feeding it 20,000 of them; a full memory is not among them."""


def open_image(source: Path | IO[bytes], name: str | None = None) -> Image.Image:
    """Return a picture as RGB, upright.

    Args:
        source: File name or open binary file.
        name: What to call it in the error; the file name by default.

    Raises:
        UserError: Missing, not a picture, cut off, or large enough to be a decompression bomb.
    """
    from PIL import Image

    name = name or str(source)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with open_undecoded(source) as image:
                return to_rgb(image)
    except FileNotFoundError:
        raise UserError(f"there is no picture {name}; check the path.") from None
    except (*DAMAGE, Image.DecompressionBombError) as error:
        raise UserError(f"cannot read the picture {name}: {error}; convert it or leave it out.") from None
    except Image.DecompressionBombWarning as error:
        raise UserError(f"cannot read the picture {name}: {error}; make it smaller.") from None


def open_undecoded(source: Path | IO[bytes]) -> Image.Image:
    """Return a picture of which only the header has been read, in a format that is safe to decode.

    Raises:
        Exception: One of `DAMAGE`, or Pillow's decompression bomb error or warning.
    """
    from PIL import Image

    Image.init()  # an old Pillow has not every format
    return Image.open(source, formats=[name for name in FORMATS if name in Image.OPEN])


def to_rgb(image: Image.Image, background: tuple[int, int, int] = (255, 255, 255)) -> Image.Image:
    """Return a picture as 8-bit RGB, turned upright by its EXIF orientation.

    Greyscale is repeated, palettes are looked up, 16-bit grey is scaled to 8 bits, transparency is laid over the
    background, and of an animation the first frame is taken. CMYK is converted to sRGB by its embedded profile, or by
    Pillow's formula where it has none. Profiles of RGB pictures are left alone, as in the training data of published
    VAEs.

    Args:
        image: Picture of any mode.
        background: Colour behind transparent pixels, RGB bytes.

    Raises:
        UserError: The picture holds floats, whose range nobody knows, or a CMYK profile that cannot be used.
    """
    from PIL import Image, ImageOps

    image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise UserError("a picture of floats has no known range; save it with 8 or 16 bits a channel.")
    if image.mode in ("I;16", "I;16B", "I;16L", "I"):
        # 16-bit grey: `convert` would clip to 255 instead of scaling. Pillow cuts off; the half rounds to nearest.
        image = image.point(lambda value: value * (1 / 257) + 0.5).convert("L")
    if image.mode == "CMYK" and image.info.get("icc_profile"):
        return _by_profile(image)
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, background), rgba)
    return image.convert("RGB")


def _by_profile(image: Image.Image) -> Image.Image:
    """A CMYK picture as sRGB by its embedded profile: relative colorimetric, black point compensated."""
    from PIL import ImageCms

    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(image.info["icc_profile"]))
        converted = ImageCms.profileToProfile(
            image,
            profile,
            ImageCms.createProfile("sRGB"),
            renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
            outputMode="RGB",
            flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
    except (OSError, ValueError, ImageCms.PyCMSError) as error:
        raise UserError(f"its CMYK profile cannot be used ({error}); save it as RGB.") from None
    assert converted is not None  # None only when converted in place
    return converted


def to_tensor(image: Image.Image) -> Tensor:
    """Return a picture as (1, 3, H, W), float32 in [-1, 1]; 0 becomes -1, 255 becomes 1."""
    import numpy as np
    import torch

    pixels = torch.from_numpy(np.array(to_rgb(image)))  # (H, W, 3), uint8; a copy, so writable
    return to_unit_range(pixels.permute(2, 0, 1).unsqueeze(0))


def to_unit_range(pixels: Tensor) -> Tensor:
    """Return bytes of any shape as float32 in [-1, 1], on their device; 0 becomes -1, 255 becomes 1."""
    return pixels.float() / 127.5 - 1.0


def to_pil(x: Tensor) -> Image.Image:
    """Return one image as an 8-bit RGB picture: clamped to [-1, 1], rounded to nearest.

    Args:
        x: (1, 3, H, W) or (3, H, W), around [-1, 1].

    Raises:
        UserError: Another shape.
    """
    import torch
    from PIL import Image

    if x.dim() == 4 and len(x) == 1:
        x = x[0]
    if x.dim() != 3 or x.shape[0] != 3:
        raise UserError(
            f"x has shape {tuple(x.shape)}, it must be (1, 3, H, W) or (3, H, W); pass one image at a time."
        )
    pixels = (x.detach().float().clamp(-1.0, 1.0) * 127.5 + 127.5).round().to("cpu", torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())


def pad_to_factor(x: Tensor, factor: int) -> Tensor:
    """Return x (B, 3, H, W) padded at the right and bottom to multiples of `factor`, by reflection.

    `crop(x, height, width)` undoes it exactly. A side too short to reflect is padded by repeating its edge.

    Raises:
        UserError: x holds no pixel, or the factor is no positive whole number.
    """
    import torch.nn.functional as F

    height, width = x.shape[-2:]
    if not isinstance(factor, int) or factor < 1 or not height or not width:
        raise UserError(
            f"a picture of {height}x{width} pixels cannot be padded to multiples of {factor!r}; give some pixels, and "
            "a factor of 1 or more, such as vae.factor."
        )
    bottom, right = -height % factor, -width % factor
    if not bottom and not right:
        return x
    mode = "reflect" if bottom < height and right < width else "replicate"
    return F.pad(x, (0, right, 0, bottom), mode=mode)


def crop(x: Tensor, height: int, width: int) -> Tensor:
    """Return the upper left `height` x `width` pixels of x (B, 3, H, W).

    Raises:
        UserError: x does not hold so many.
    """
    if not (0 < height <= x.shape[-2] and 0 < width <= x.shape[-1]):
        raise UserError(
            f"{height}x{width} pixels cannot be cropped from {x.shape[-2]}x{x.shape[-1]}; give a size within it."
        )
    return x[..., :height, :width]


def list_images(folder: Path) -> list[Path]:
    """Return the pictures in a folder and the folders below it, sorted by path.

    Raises:
        UserError: No such folder, or no file in it ends like a picture.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; give a folder of pictures.")
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())
    if not paths:
        kinds = ", ".join(sorted(suffix.removeprefix(".") for suffix in IMAGE_SUFFIXES))
        raise UserError(f"{folder} holds no pictures ({kinds}); give a folder that does.")
    return paths
