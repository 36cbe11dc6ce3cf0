"""Pictures one after another as a film: GIF, WebP or MP4."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sd_vae.errors import UserError
from sd_vae.files import atomic_file

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["FILM_SUFFIXES", "MAX_FPS", "save_film"]

FILM_SUFFIXES = (".gif", ".webp", ".mp4")
"""How the names of films end."""

MAX_FPS = 50
"""Pictures a second, at most: a GIF counts hundredths of a second, and viewers slow down what has one of them."""


def save_film(path: Path | str, pictures: Sequence[Image.Image], *, fps: int = 12) -> None:
    """Write pictures as a film that runs there and back, whole or not at all; GIF and WebP repeat for ever.

    Args:
        path: File; its ending says what is written. A GIF has 256 colours a picture. MP4 is H.264, whose sides are
            even: a last odd row or column is left out.
        pictures: At least one, RGB, all of one size.
        fps: Pictures a second, 1 to 50.

    Raises:
        UserError: Another ending, another pace, MP4 without PyAV, or the file cannot be written.
    """
    path = Path(path)
    kind = path.suffix.lower()
    if kind not in FILM_SUFFIXES:
        raise UserError(f"{path} does not end like a film; choose one of: {', '.join(FILM_SUFFIXES)}.")
    if not 1 <= fps <= MAX_FPS:
        raise UserError(f"fps is {fps}, it must be from 1 to {MAX_FPS}.")
    frames = [*pictures, *pictures[-2:0:-1]]
    if kind == ".mp4":
        _save_mp4(path, frames, fps)
        return
    options = {"quality": 90} if kind == ".webp" else {}
    with atomic_file(path) as temporary:
        frames[0].save(
            temporary,
            format=kind.removeprefix("."),
            save_all=True,
            append_images=frames[1:],
            duration=round(1000 / fps),
            loop=0,
            **options,
        )


def _save_mp4(path: Path, frames: Sequence[Image.Image], fps: int) -> None:
    try:
        import av
    except ModuleNotFoundError:
        raise UserError(
            f'{path} needs PyAV, which is not installed; pip install "sd-vae[video]", or write .gif or .webp.'
        ) from None
    width, height = (side - side % 2 for side in frames[0].size)
    with atomic_file(path) as temporary, av.open(str(temporary), "w", format="mp4") as file:
        stream = file.add_stream("libx264", rate=fps, options={"crf": "18"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for frame in frames:
            file.mux(stream.encode(av.VideoFrame.from_image(frame.crop((0, 0, width, height)))))
        file.mux(stream.encode())
