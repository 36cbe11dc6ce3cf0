"""`sd-vae latents preview`: pictures of a store through the decoder, and a matrix from latents to colours."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from sd_vae.cli import console
from sd_vae.cli.stores import load_encoder, require_encoder
from sd_vae.errors import UserError

__all__ = ["Args", "run"]

_FILES = ("decoded.png", "linear.png", "preview.json")


@dataclass(frozen=True)
class Args:
    """Decode some pictures of a store to a contact sheet, and fit a linear preview.

    That is what samplers show while they run: RGB as a sum of latent channels, printed as ComfyUI's latent formats have
    it, and measured against the decoder.
    """

    store: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="STORE")]
    """Folder of latents."""
    vae: str
    """VAE that made it, or one with the same encoder: a folder, a file or a hub id."""
    out: Path
    """Folder to write: decoded.png, linear.png (the same pictures from the matrix) and preview.json."""
    config: str | None = None
    """Architecture of the VAE where nothing beside it tells: a config.json, its folder, or a preset."""
    pictures: int = 16
    """How many, at random."""
    seed: int = 0
    """Which of them."""
    side: int = 256
    """Largest side of a picture on the sheets, in pixels."""
    device: str = "cpu"
    """Where to decode: cpu, cuda, cuda:1, mps."""
    overwrite: bool = False
    """Replace an earlier preview."""
    json: bool = False
    """Print the result as one JSON object."""


def run(argv: list[str]) -> None:
    """Run the action.

    Args:
        argv: Its arguments.

    Raises:
        UserError: Another encoder made the store, a number below its least, `--out` is taken, or as `load_vae` and
            `sd_vae.latents.preview.preview`.
    """
    args = console.parse(Args, argv, command="latents preview")
    for name, least in (("pictures", 2), ("side", 1)):
        if getattr(args, name) < least:
            raise UserError(f"--{name} is {getattr(args, name)}, it must be at least {least}.")

    from sd_vae.files import atomic_folder, require_own_folder, write_json
    from sd_vae.latents import LatentStore

    store = LatentStore.open(args.store)
    store.manifest()  # says that the store is not finished, before the VAE is loaded
    require_own_folder(args.out, _FILES, kind="a preview", overwrite=args.overwrite)

    from tqdm import tqdm

    from sd_vae.latents.preview import contact_sheet, preview

    vae = load_encoder(store, args.vae, args.config, args.device)
    require_encoder(store, vae, args.vae)
    with tqdm(desc="decoding", unit=" pictures", file=sys.stderr) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        found = preview(args.store, vae, num_pictures=args.pictures, seed=args.seed, progress=show)
    result: dict[str, Any] = {"out": str(args.out), "items": found.indices, **asdict(found.fit)}
    result["latent_rgb_factors"], result["latent_rgb_factors_bias"] = result.pop("preview").values()
    with atomic_folder(args.out, overwrite=args.overwrite) as folder:
        for name, pictures in (("decoded", found.decoded), ("linear", found.linear)):
            contact_sheet(pictures, side=args.side).save(folder / f"{name}.png")
        write_json(folder / "preview.json", result)
    if args.json:
        console.print_json(result)
        return
    print(found.fit.preview.comfyui())
    console.say(
        f"from scaled latents to [-1, 1]; R^2 {found.fit.r2:.3f}, PSNR {found.fit.psnr_db:.1f} dB to the decoder's "
        "pictures averaged over each cell; "
        f"fitted to {found.fit.num_fitted}, measured on {found.fit.num_held_out} others"
    )
    console.say(f"{args.out / 'decoded.png'}, {args.out / 'linear.png'}: {len(found.indices)} pictures each.")
