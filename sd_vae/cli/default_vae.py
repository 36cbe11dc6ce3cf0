"""Commands whose VAE may be left out: they run the one that ships, and say so."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from sd_vae.cli.console import parse, say
from sd_vae.errors import UserError
from sd_vae.weights import DEFAULT_VAE, shipped_folder

__all__ = ["holds_pictures", "parse_with_vae"]

T = TypeVar("T")

_MARKS = ("config.json", "vae/config.json", "*.safetensors", "*.bin")  # of a folder with a VAE


def parse_with_vae(
    arguments_type: type[T], argv: Sequence[str], *, command: str, lacks_vae: Callable[[T], bool] = lambda args: False
) -> T:
    """Return a command's arguments; its first positional one is a VAE, by default the one that ships.

    A VAE is left out where the arguments are incomplete without one in front of them and complete with it.

    Args:
        arguments_type: As in `parse`.
        argv: As in `parse`.
        command: As in `parse`.
        lacks_vae: Whether complete arguments have something else in the VAE's place.

    Raises:
        UserError: As `parse`, or the weights that would run are not installed or are damaged.
    """
    try:
        args = parse(arguments_type, argv, command=command)
    except UserError as error:
        complaint = error
    else:
        if not lacks_vae(args):
            return args
        complaint = UserError("no VAE is given.")
    try:
        parse(arguments_type, [DEFAULT_VAE, *argv], command=command)
    except UserError:
        raise complaint from None
    try:
        folder = shipped_folder(DEFAULT_VAE)
    except UserError as error:
        raise UserError(f"{complaint} Without a VAE, {DEFAULT_VAE} would run, but {error}") from None
    say(f"no VAE is given: taking {DEFAULT_VAE}, which ships with sd-vae.")
    return parse(arguments_type, [str(folder), *argv], command=command)


def holds_pictures(path: Path) -> bool:
    """Whether a path is a picture, by how it ends, or a folder without anything that a VAE's folder has."""
    from sd_vae.images import IMAGE_SUFFIXES

    if path.is_dir():
        return not any(next(path.glob(pattern), None) for pattern in _MARKS)
    return path.suffix.lower() in IMAGE_SUFFIXES
