"""The photos that are evaluated: found, named so that no two share a name, and brought to size one at a time."""

from __future__ import annotations

import functools
import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from sd_vae.data import Images, PictureTransform, Record, Records, decode_picture, open_records
from sd_vae.data.decoding import Reject
from sd_vae.data.geometry import Placement, placements
from sd_vae.errors import UserError
from sd_vae.images import list_images, open_image, to_rgb

__all__ = [
    "Data",
    "Photo",
    "PhotoSet",
    "Pictures",
    "find_files",
    "fit_photo",
    "list_photos",
    "numbered_photos",
    "open_photos",
    "photo_digest",
    "place",
    "read_photo",
]

Pictures = str | Path | Sequence[str | Path] | Mapping[str, Image.Image]
"""A folder, a file, several files and folders, or named pictures."""

RESAMPLING = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


@dataclass(frozen=True)
class Photo:
    """A photo that is opened when its turn comes."""

    name: str
    """Unique within the set it belongs to."""
    source: Path | Image.Image | Record | Callable[[], Image.Image]
    """File, the picture itself, a record of a data set, or what returns the picture as upright RGB."""
    columns: Mapping[str, Any] = field(default_factory=dict)
    """What else the data says of it, such as boxes."""


class PhotoSet:
    """Photos in a fixed order, read a stretch at a time; a table's pictures are not held in memory.

    Args:
        source: Photos, or the records of a data set.
    """

    def __init__(self, source: Sequence[Photo] | Records) -> None:
        self._source = source
        num_photos = len(source) if isinstance(source, Sequence) else source.num_records
        assert num_photos is not None, "only a stream, which is not opened here, does not know its end"
        self.num_photos = num_photos

    def read(self, start: int, stop: int) -> Iterator[Photo]:
        """Yield the photos from `start` to before `stop`."""
        if isinstance(self._source, Sequence):
            yield from self._source[start:stop]
            return
        for record in self._source.read(start, stop):
            yield Photo(record.id, record, record.columns)


Data = Pictures | PhotoSet
"""What photos are taken from: pictures, or a data set; or what `open_photos` has opened."""


def open_photos(data: Data) -> PhotoSet:
    """Return the photos that `data` stands for.

    Args:
        data: A folder (with the folders below it, and `metadata.jsonl` or `metadata.csv`), a parquet file or a folder
            of them, WebDataset tars, `hf://DATASET[:SPLIT]`, or what `list_photos` takes.

    Raises:
        UserError: There are none, or the data cannot be opened.
    """
    if isinstance(data, PhotoSet):
        return data
    if isinstance(data, str | Path) and not _is_picture_file(Path(data)):
        return PhotoSet(open_records(str(data)))
    return PhotoSet(list_photos(data))


def numbered_photos(images: Images) -> PhotoSet:
    """Return the pictures of a source that knows them by number, named by the ends of the names it gives them."""
    names = _names([Path(images.name(index)) for index in range(len(images))])
    return PhotoSet([Photo(name, functools.partial(images.load, index)) for index, name in enumerate(names)])


def list_photos(data: Pictures) -> list[Photo]:
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


def read_photo(photo: Photo) -> Image.Image:
    """Return a photo as upright 8-bit RGB in its own size.

    Raises:
        UserError: It cannot be read as a picture.
    """
    if isinstance(photo.source, Path):
        return open_image(photo.source)
    if isinstance(photo.source, Image.Image):
        return to_rgb(photo.source)
    if not isinstance(photo.source, Record):
        return photo.source()
    decoded = decode_picture(photo.source.data)
    if isinstance(decoded, Reject):
        raise UserError(f"cannot read the picture {photo.source.source}: {decoded.detail}; convert it or leave it out.")
    return decoded.image


def fit_photo(
    image: Image.Image, size: int | None, resize_filter: Literal["bilinear", "bicubic", "lanczos"] = "bicubic"
) -> Image.Image:
    """Return a picture's central square of `size` pixels, or the picture itself for None.

    The shorter side is resized first, with antialiasing; the arithmetic is that of torchvision's `Resize` and
    `CenterCrop`.
    """
    if size is None:
        return image
    placement = place((image.height, image.width), size)
    height, width = placement.resized_size
    top, left, *_ = placement.crop
    return image.resize((width, height), RESAMPLING[resize_filter]).crop((left, top, left + size, top + size))


def place(original_size: tuple[int, int], size: int) -> Placement:
    """Return where the central square lies in a picture of (height, width) whose shorter side becomes `size`."""
    placed = placements(original_size, PictureTransform(size=size, factor=1, allow_upscale=True), "")
    assert not isinstance(placed, Reject), "enlarging is allowed, so every picture has a central square"
    return placed[0]


def photo_digest(image: Image.Image) -> str:
    """Return the sha256 of a picture's size and 8-bit RGB pixels, whatever file they were decoded from."""
    return hashlib.sha256(f"{image.width}x{image.height}\n".encode() + image.tobytes()).hexdigest()


def _is_picture_file(path: Path) -> bool:
    """Whether a path is one file, other than a table or a tar."""
    return path.is_file() and path.suffix not in (".parquet", ".tar")


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
