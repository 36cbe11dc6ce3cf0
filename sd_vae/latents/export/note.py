"""The note that lies beside exported latents: what the consumers' own layouts cannot say.

None of them records by which scale its values were multiplied, nor which encoder made them. The note's name begins with
a dot and ends in no suffix that a consumer looks for.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sd_vae.errors import UserError
from sd_vae.files import read_json, write_json
from sd_vae.latents.export.layouts import Draw, LayoutName, Values
from sd_vae.validation import STRICT, from_plain

__all__ = ["NOTE", "Note", "Scale", "find_note", "write_note"]

NOTE = ".sd-vae-export.json"
FORMAT, VERSION = "sd-vae export", 1


@dataclass(frozen=True, kw_only=True)
class Scale:
    """By what latents were multiplied, if they were."""

    __pydantic_config__ = STRICT

    values: Values
    """raw z, or scaled: latents = (z - offset) * factor."""
    offset: tuple[float, ...]
    """Of the VAE, one a channel."""
    factor: tuple[float, ...]
    """Of the VAE, one a channel."""


@dataclass(frozen=True, kw_only=True)
class Note:
    """Where exported latents come from and what was done to them."""

    __pydantic_config__ = STRICT

    layout: LayoutName
    """Whose layout it is."""
    scale: Scale
    """raw or scaled, and by what."""
    draw: Draw | None
    """sample or mode; None where moments are kept."""
    seed: int | None
    """Seed of the samples; None where nothing was drawn."""
    encoder: str
    """Fingerprint of the encoder."""
    encoder_dtype: str
    """Number format that it ran in; another has another fingerprint."""
    store: str
    """Digest of the store's description."""
    num_latents: int
    """Latents, mirrored ones not counted."""
    num_mirrored_left_out: int
    """Mirrored encodings of the store that the layout has no place for."""
    classes: tuple[str, ...] | None
    """Name of each class where the labels were names; None where they were numbers or are not kept."""
    files: tuple[str, ...] = ()
    """What lies beside the note."""


def write_note(folder: Path, note: Note) -> None:
    """Write the note of a finished export."""
    files = tuple(sorted(path.name for path in folder.iterdir()))
    write_json(folder / NOTE, {"format": FORMAT, "version": VERSION, **dataclasses.asdict(note), "files": files})


def find_note(path: Path) -> Note | None:
    """Return the note in a folder, or beside a file; None where there is none.

    Raises:
        UserError: The note is damaged, or of a newer version.
    """
    place = (path if path.is_dir() else path.parent) / NOTE
    if not place.is_file():
        return None
    values: Any = read_json(place)
    if not isinstance(values, dict) or values.pop("format", None) != FORMAT:
        raise UserError(f"{place} does not say that it is of the format {FORMAT!r}; remove it or export again.")
    version = values.pop("version", None)
    if version != VERSION:
        raise UserError(f"{place} is of version {version}, this program reads {VERSION}; update sd-vae.")
    return from_plain(Note, values, source=str(place))
