"""The photos that are evaluated: found, named so that no two share a name, and brought to size one at a time."""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageOps

from sd_vae.errors import UserError
from sd_vae.images import list_images, open_image, to_rgb

__all__ = ["Photo", "find_files", "list_photos", "load_photo"]


@dataclass(frozen=True)
class Photo:
    """A photo that is opened when its turn comes."""

    name: str
    """Unique within the list it belongs to."""
    source: Path | Image.Image
    """File, or the picture itself."""


def list_photos(data: str | Path | Sequence[str | Path] | Mapping[str, Image.Image]) -> list[Photo]:
    """Return the photos that `data` stands for, in its order.

    Args:
        data: A folder (searched below too, sorted by path), a file, a sequence of files and folders, or named pictures.

    Returns:
        Photos named by their file names; of files with the same name, by as much of the path as tells them apart.

    Raises:
        UserError: There are none, a folder holds none, a path does not exist, or a path is given twice.
    """
    if isinstance(data, Mapping):
        photos = [Photo(name, picture) for name, picture in data.items()]
    else:
        paths = find_files(data)
        photos = [Photo(name, path) for name, path in zip(_names(paths), paths, strict=True)]
    if not photos:
        raise UserError("there are no photos to evaluate; give a folder, files, or named pictures.")
    return photos


def load_photo(photo: Photo, size: int | None = None) -> Image.Image:
    """Return a photo as upright 8-bit RGB.

    Args:
        photo: What to open.
        size: Resize the short side to this many pixels (bicubic) and keep the central square; None leaves the size.

    Raises:
        UserError: The file cannot be read as a picture.
    """
    image = open_image(photo.source) if isinstance(photo.source, Path) else to_rgb(photo.source)
    return image if size is None else ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)


def find_files(data: str | Path | Sequence[str | Path]) -> list[Path]:
    """Return the files that paths stand for: a folder is the pictures in it and below, sorted by path.

    Raises:
        UserError: A path does not exist, or a folder holds no pictures.
    """
    return [path for given in ([data] if isinstance(data, str | Path) else data) for path in _expand(Path(given))]


def _expand(path: Path) -> list[Path]:
    """A folder's pictures, or the file itself."""
    if path.is_dir():
        return list_images(path)
    if not path.exists():
        raise UserError(f"there is no picture or folder {path}; check the path.")
    return [path]


def _names(paths: Sequence[Path]) -> list[str]:
    """File names, with parent folders in front where two files share one."""
    parts = [Path(os.path.abspath(path)).parts for path in paths]
    for path, times in Counter(parts).items():
        if times > 1:
            raise UserError(f"{Path(*path)} is given {times} times; give it once.")
    names = [path[-1] for path in parts]
    length = 1
    while len(times_used := Counter(names)) < len(names):
        length += 1
        names = [
            "/".join(path[-length:]) if times_used[name] > 1 else name for name, path in zip(names, parts, strict=True)
        ]
    return names
