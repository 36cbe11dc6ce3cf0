"""Pictures as sRGB, with a note of what was done to them: a compressed file keeps neither profile nor transparency."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

from sd_vae.errors import UserError
from sd_vae.images import open_image, open_undecoded

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["open_srgb"]

MAX_NAME = 100
"""Characters of a profile's name that a note keeps."""


def open_srgb(path: Path) -> tuple[Image.Image, str]:
    """Return a picture as upright 8-bit sRGB, and what was done to its colours; an empty note for nothing.

    The colours of an RGB picture with a profile other than sRGB are converted by it, relative colorimetric with black
    point compensation. Everything else is as in `sd_vae.images.to_rgb`.

    Args:
        path: Picture file.

    Raises:
        UserError: As `sd_vae.images.open_image`, or a profile that cannot be used.
    """
    image = open_image(path)
    with open_undecoded(path) as header:
        profile, mode = header.info.get("icc_profile"), header.mode
        is_clear = mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in header.info
    notes = ["transparency laid over white"] if is_clear else []
    if mode.startswith("I;16") or mode == "I":
        notes.append("16 bits rounded to 8")
    if profile and mode == "CMYK":
        notes.append("CMYK converted to sRGB by its profile")
    elif profile and mode in ("RGB", "RGBA", "P", "PA"):
        image, name = _by_profile(image, profile, path)
        notes += [f"colours converted from {name!r} to sRGB"] if name else []
    return image, "; ".join(notes)


def _by_profile(image: Image.Image, profile: bytes, path: Path) -> tuple[Image.Image, str]:
    """The picture in sRGB and its profile's name, which is empty where that is sRGB already."""
    from PIL import ImageCms

    try:
        given = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        name = ImageCms.getProfileDescription(given).strip()[:MAX_NAME] or "unnamed profile"
        if "srgb" in name.lower():
            return image, ""
        converted = ImageCms.profileToProfile(
            image,
            given,
            ImageCms.createProfile("sRGB"),
            renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
            flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
    except (OSError, ValueError, ImageCms.PyCMSError) as error:
        raise UserError(f"the colour profile of {path} cannot be used ({error}); save it as sRGB.") from None
    assert converted is not None  # None only when converted in place
    return converted, name
