"""`sd-vae decompress`: files of `sd-vae compress` back to pictures."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

import sd_vae
from sd_vae.cli import console
from sd_vae.cli.compress import SUFFIX
from sd_vae.cli.default_vae import parse_with_vae
from sd_vae.errors import UserError

__all__ = ["LISTING", "Args", "run"]

LISTING = "decompressed.jsonl"
"""Which picture came from which file, one JSON object a line."""


@dataclass(frozen=True, kw_only=True)
class Args:
    """Turn compressed pictures back to PNG, with the VAE that compressed them."""

    vae: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="VAE")]
    """Folder, file or hub id of the VAE, or the name of one that ships; left out, `mini`."""
    files: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="FILE...")]
    """Files of `sd-vae compress`; a folder stands for those in and below it."""
    out: Path
    """Folder to write."""
    allow_other_vae: bool = False
    """Decode although the decoder is not the one that compressed: a fine-tuned or distilled one of the same latents."""
    max_pixels: int | None = None
    """Largest picture to accept; by default 89,478,485 pixels, where Pillow warns of a decompression bomb."""
    config: str | None = None
    """Preset (sd1, sdxl, sd3, flux, mini), config.json or its folder, where the VAE brings none."""
    device: str = "cpu"
    """Where to compute: cpu, cuda, cuda:1, mps."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """What to compute in."""
    overwrite: bool = False
    """Replace pictures that an earlier run decompressed."""
    json: bool = False
    """Print the result as one JSON object."""


def run(argv: list[str]) -> None:
    """Decompress files, and say what they hold.

    Args:
        argv: The command's arguments.

    Raises:
        UserError: As `sd_vae.latents.compression.decompress`, or `--out` holds something else.
    """
    args = parse_with_vae(Args, argv, command="decompress", lacks_vae=lambda args: _holds_files(Path(args.vae)))

    from sd_vae.cli.reconstruct import output_stems
    from sd_vae.files import atomic_folder, require_own_folder, write_text

    if args.max_pixels is not None and args.max_pixels < 1:
        raise UserError(f"--max-pixels is {args.max_pixels}, it must be at least 1.")
    paths = _find(args.files)
    present = {path.name for path in args.out.iterdir()} if args.out.is_dir() else set()
    own = {name for name in present if name.endswith(".png")} | {LISTING} if LISTING in present else set()
    require_own_folder(args.out, own, kind="a folder of decompressed pictures", overwrite=args.overwrite)

    from tqdm import tqdm

    vae = sd_vae.load_vae(args.vae, args.config, dtype=args.dtype, device=args.device)
    stems = output_stems(map(str, paths))
    lines = []
    with atomic_folder(args.out, overwrite=args.overwrite) as folder:
        for path in tqdm(paths, "decompressing", file=sys.stderr, unit="picture"):
            lines.append(_decompress(vae, path, folder / f"{stems[str(path)]}.png", args))
        write_text(folder / LISTING, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    if args.json:
        console.print_json({"out": str(args.out), "pictures": lines})
        return
    for line in lines:
        note = f" ({line['note']})" if line["note"] else ""
        print(f"{line['file']}  {line['width']}x{line['height']}{note}")


def _decompress(vae: sd_vae.AutoencoderKL, path: Path, target: Path, args: Args) -> dict[str, str | int]:
    """Write one picture; returns its line of the listing."""
    from PIL.PngImagePlugin import PngInfo

    from sd_vae.files import file_errors
    from sd_vae.images import to_pil
    from sd_vae.latents.compression import Container, decompress
    from sd_vae.latents.compression.container import MAX_PIXELS

    limit = args.max_pixels or MAX_PIXELS
    with file_errors("read", path):
        data = path.read_bytes()
    x = decompress(vae, data, name=str(path), max_pixels=limit, allow_other_vae=args.allow_other_vae)
    held = Container.from_bytes(data, name=str(path), max_pixels=limit)
    chunks = PngInfo()
    chunks.add(b"sRGB", b"\0")  # perceptual intent
    if held.note:
        chunks.add_itxt("Comment", held.note)
    to_pil(x).save(target, pnginfo=chunks)
    return {"file": target.name, "from": str(path), "width": held.width, "height": held.height, "note": held.note}


def _find(given: tuple[Path, ...]) -> list[Path]:
    """The files, and those in folders.

    Raises:
        UserError: There are none.
    """
    found: list[Path] = []
    for path in given:
        inside = sorted(path.rglob(f"*{SUFFIX}")) if path.is_dir() else [path]
        if not inside:
            raise UserError(f"{path} holds no compressed pictures (*{SUFFIX}); give a folder that does.")
        found += inside
    if not found:
        raise UserError("no files are given; name some, or a folder of them.")
    return found


def _holds_files(path: Path) -> bool:
    """Whether a path is a compressed picture or a folder of them, rather than a VAE."""
    return path.suffix == SUFFIX or (path.is_dir() and next(path.rglob(f"*{SUFFIX}"), None) is not None)
