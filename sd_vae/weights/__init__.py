"""Weights that ship in the package: trained by this project, found by name, checked before they are read.

Each name is a folder here with the digests of its files in `SHA256SUMS`, in the format of the program `sha256sum`; that
of a VAE is in diffusers layout, with a model card. `docs/mini.md` says how they are made.
"""

import hashlib
from pathlib import Path

from sd_vae.errors import UserError
from sd_vae.files import read_text

__all__ = ["DEFAULT_VAE", "MAKERS", "SHIPPED_VAES", "SUMS", "shipped_folder"]

MAKERS = {
    "mini": "sd-vae train --config mini --data.train PHOTOS --out RUN",
    "distilled": "python -m benchmarks.mini_distill PHOTOS --out FOLDER in a checkout of sd-vae",
}
"""Name of what ships, and the command that makes one's own."""
SHIPPED_VAES = ("mini",)
"""Those of them that `load_vae` takes."""
DEFAULT_VAE = "mini"
"""What a command runs that is given no VAE."""

SUMS = "SHA256SUMS"

_ROOT = Path(__file__).parent


def shipped_folder(name: str, root: Path = _ROOT) -> Path:
    """Return the folder of weights that ship, with every file as it was released.

    Args:
        name: Key of `MAKERS`.
        root: Folder that holds a folder of that name.

    Raises:
        UserError: This installation lacks the weights, or a file is not what was released.
    """
    folder = root / name
    sums = folder / SUMS
    if not sums.is_file():
        raise UserError(
            f"this installation of sd-vae has no weights for {name!r} (there is no {sums}); install a release that "
            f"brings them, name a file or folder with others, or train your own: {MAKERS[name]}."
        )
    for digest, file in _released(sums):
        if not file.is_file():
            raise UserError(f"{file} is missing, though {SUMS} beside it lists it; install sd-vae again.")
        found = hashlib.sha256(file.read_bytes()).hexdigest()
        if found != digest:
            raise UserError(f"{file} is damaged: its sha256 is {found}, {SUMS} says {digest}; install sd-vae again.")
    return folder


def _released(sums: Path) -> list[tuple[str, Path]]:
    """Digest and file of every line."""
    lines = [line.split(maxsplit=1) for line in read_text(sums).splitlines()]
    return [(digest, sums.parent / name) for digest, name in lines]
