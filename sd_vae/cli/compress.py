"""`sd-vae compress`: pictures as small files of quantised latents."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

import sd_vae
from sd_vae.cli import console
from sd_vae.cli.default_vae import holds_pictures, parse_with_vae
from sd_vae.errors import UserError

if TYPE_CHECKING:
    from sd_vae.autoencoder import AutoencoderKL

__all__ = ["SUFFIX", "Args", "run"]

SUFFIX = ".svae"
"""How the names of compressed pictures end."""


@dataclass(frozen=True, kw_only=True)
class Args:
    """Compress pictures to small files that `sd-vae decompress` and the same VAE turn back; docs/compress.md.

    What a file keeps is what the VAE keeps: fine texture comes back plausible, not exact, and small faces and letters
    change. Keep the originals of what must stay as it is.
    """

    vae: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="VAE")]
    """Folder, file or hub id of a VAE, in any layout, or the name of one that ships; left out, `mini`."""
    images: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="IMAGE...")]
    """Pictures of any size; a folder stands for the pictures in and below it."""
    out: Path
    """Folder to write."""
    quality: float | None = None
    """1 to 100; by default 75, at which quantisation costs about 0.2 dB beside what the VAE loses."""
    bits_per_pixel: float | None = None
    """Instead of --quality: the best that fits into so many bits a pixel."""
    max_bytes: int | None = None
    """Instead of --quality: the best that fits into a file of so many bytes."""
    measure: bool = False
    """Decompress each picture too, and print its PSNR in dB and what of it quantisation cost."""
    config: str | None = None
    """Preset (sd1, sdxl, sd3, flux, mini), config.json or its folder, where the VAE brings none."""
    device: str = "cpu"
    """Where to compute: cpu, cuda, cuda:1, mps."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """What to compute in."""
    overwrite: bool = False
    """Replace pictures that an earlier run compressed."""
    json: bool = False
    """Print the result as one JSON object."""


def run(argv: list[str]) -> None:
    """Compress pictures, and say how small they became.

    Args:
        argv: The command's arguments.

    Raises:
        UserError: As `sd_vae.latents.compression.compress`, a picture cannot be read, or `--out` holds something else.
    """
    args = parse_with_vae(Args, argv, command="compress", lacks_vae=lambda args: holds_pictures(Path(args.vae)))

    from eval.photos import find_files, list_photos
    from sd_vae.cli.reconstruct import output_stems
    from sd_vae.files import atomic_folder, require_own_folder

    paths = find_files(args.images)
    names = [photo.name for photo in list_photos(paths)]
    present = {path.name for path in args.out.iterdir()} if args.out.is_dir() else set()
    own = {name for name in present if name.endswith(SUFFIX)}
    require_own_folder(args.out, own, kind="a folder of compressed pictures", overwrite=args.overwrite)

    from tqdm import tqdm

    vae = sd_vae.load_vae(args.vae, args.config, dtype=args.dtype, device=args.device)
    stems = output_stems(names)
    started = time.perf_counter()
    pictures = []
    with atomic_folder(args.out, overwrite=args.overwrite) as folder:
        for name, path in tqdm(
            zip(names, paths, strict=True), "compressing", len(paths), file=sys.stderr, unit="picture"
        ):
            pictures.append(_compress(vae, path, folder / f"{stems[name]}{SUFFIX}", args))
    result = {"out": str(args.out), "seconds": time.perf_counter() - started, "pictures": pictures}
    if args.json:
        console.print_json(result)
        return
    _print(pictures)
    console.say(f"{args.out}: {len(pictures)} pictures in {result['seconds']:.1f} s; back by sd-vae decompress.")


def _compress(vae: AutoencoderKL, path: Path, target: Path, args: Args) -> dict[str, Any]:
    """Write one picture; returns what is to say of it."""
    from sd_vae.images import to_tensor
    from sd_vae.latents.compression import compress, open_srgb

    picture, note = open_srgb(path)
    x = to_tensor(picture)
    try:
        found = compress(
            vae,
            x,
            quality=args.quality,
            bits_per_pixel=args.bits_per_pixel,
            max_bytes=args.max_bytes,
            note=note,
        )
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    target.write_bytes(found.data)
    told = {
        "picture": str(path),
        "file": target.name,
        "width": picture.width,
        "height": picture.height,
        "bytes": len(found.data),
        "bits_per_pixel": found.bits_per_pixel,
        "level_db": found.level_db,
        "note": note,
    }
    return told | (_measure(vae, x, found.z) if args.measure else {})


def _measure(vae: AutoencoderKL, x: Any, z: Any) -> dict[str, float]:
    """PSNR of the file, of what the VAE alone does, and their difference; 8-bit pictures."""
    import torch

    from eval.metrics import psnr_db
    from sd_vae.images import crop, pad_to_factor, to_pil

    height, width = x.shape[-2:]
    with torch.no_grad():
        unquantised = vae.encode(pad_to_factor(x, vae.factor).to(vae.device, vae.dtype)).latent_dist.mode()
        found = [
            psnr_db(to_pil(crop(vae.decode(latent.to(vae.device, vae.dtype)).sample, height, width)), to_pil(x))
            for latent in (z, unquantised)
        ]
    return {"psnr_db": found[0], "unquantised_psnr_db": found[1], "cost_db": found[1] - found[0]}


def _print(pictures: list[dict[str, Any]]) -> None:
    """A table: one line a picture."""
    has_psnr = "psnr_db" in pictures[0]
    columns = ["file", "pixels", "bytes", "bits/pixel", *(["PSNR dB", "cost dB"] if has_psnr else [])]
    rows = []
    for one in pictures:
        cells = [one["file"], f"{one['width']}x{one['height']}", f"{one['bytes']}", f"{one['bits_per_pixel']:.3f}"]
        rows.append(cells + ([f"{one['psnr_db']:.2f}", f"{one['cost_db']:.2f}"] if has_psnr else []))
    console.print_table("compressed", columns, rows)
    for one in pictures:
        if one["note"]:
            console.say(f"{one['picture']}: {one['note']}.")
