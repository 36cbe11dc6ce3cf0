"""`sd-vae decode`: latents back to pictures, from a store or from what any trainer reads."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

import sd_vae
from sd_vae.cli import console
from sd_vae.cli.default_vae import parse_with_vae
from sd_vae.errors import UserError
from sd_vae.latents.export.layouts import LayoutName, Values

if TYPE_CHECKING:
    from sd_vae.autoencoder import AutoencoderKL
    from sd_vae.latents.importing import LatentFiles, RawLatent

__all__ = ["LISTING", "Args", "run"]

LISTING = "decoded.jsonl"
"""Which picture came from which latent, one JSON object a line."""


@dataclass(frozen=True, kw_only=True)
class Args:
    """Decode latents to PNG: of a store, or of the files of any trainer that `latents export` writes for."""

    vae: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="VAE")]
    """Folder, file or hub id of the VAE, or the name of one that ships; left out, `mini`."""
    latents: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="LATENTS")]
    """Latent store, or a folder or file of another layout. Of a posterior the mean is decoded."""
    out: Path
    """Folder to write."""
    layout: Annotated[LayoutName | None, tyro.conf.arg(name="format")] = None
    """Whose layout it is, where the files do not tell."""
    values: Values | None = None
    """scaled or raw, where the files do not tell."""
    mirrored: bool = False
    """Decode the mirror images too, where there are any."""
    limit: int | None = None
    """Decode only the first so many; by default all."""
    batch_size: int = 8
    """Latents decoded at once, where neighbours are of one size."""
    config: str | None = None
    """Architecture of the VAE where nothing beside it tells: a config.json, its folder, or a preset."""
    device: str = "cpu"
    """Where to decode: cpu, cuda, cuda:1, mps."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """What to decode in."""
    overwrite: bool = False
    """Replace pictures that an earlier run decoded."""
    json: bool = False
    """Print the result as one JSON object."""


def run(argv: list[str]) -> None:
    """Run the command.

    Args:
        argv: Its arguments.

    Raises:
        UserError: As `sd_vae.latents.importing.open_latents` and `sd_vae.load_vae`; a latent is not finite; or --out
            holds something else.
    """
    args = parse_with_vae(Args, argv, command="decode")
    for name in ("limit", "batch_size"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} is {value}, it must be at least 1.")
    _require_target(args)

    from sd_vae.config import VAEConfig
    from sd_vae.files import atomic_folder, write_text
    from sd_vae.latents.importing import open_latents

    vae = sd_vae.load_vae(args.vae, args.config, dtype=args.dtype, device=args.device)
    config = VAEConfig.from_dict(dict(vae.config), source=args.vae)
    files = open_latents(args.latents, config, layout=args.layout, values=args.values)
    same_encoder = _is_same_encoder(vae, files, args)
    chosen = _Chosen(files, mirrored=args.mirrored, limit=args.limit)
    with atomic_folder(args.out, overwrite=args.overwrite) as folder:
        lines = _decode(vae, chosen, folder, args.batch_size)
        write_text(folder / LISTING, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    result = {
        "out": str(args.out),
        "format": files.layout,
        "values": files.scale.values,
        "num_pictures": len(lines),
        "num_mirrored_left_out": chosen.num_mirrored_left_out,
        "same_encoder": same_encoder,
    }
    if args.json:
        console.print_json(result)
        return
    left_out = f", {chosen.num_mirrored_left_out} mirrored ones left out" if chosen.num_mirrored_left_out else ""
    console.print_fields(
        {"written": args.out, "pictures": f"{len(lines)}{left_out}", "from": f"{files.layout}, {files.scale.values}"}
    )


class _Chosen:
    """The latents that are decoded, and how many are not."""

    def __init__(self, files: LatentFiles, *, mirrored: bool, limit: int | None) -> None:
        self._files, self._mirrored, self._limit = files, mirrored, limit
        self.num_mirrored_left_out = 0
        self.total = None if files.num_latents is None or mirrored else min(files.num_latents, limit or sys.maxsize)

    def __iter__(self) -> Iterator[RawLatent]:
        return islice(self._wanted(), self._limit)

    def _wanted(self) -> Iterator[RawLatent]:
        for latent in self._files:
            if latent.is_mirrored and not self._mirrored:
                self.num_mirrored_left_out += 1
            else:
                yield latent


def _decode(vae: AutoencoderKL, latents: _Chosen, folder: Path, batch_size: int) -> list[dict[str, Any]]:
    """Decode and save; returns the lines of the listing."""
    import torch
    from tqdm import tqdm

    from sd_vae.images import to_pil

    lines: list[dict[str, Any]] = []
    with tqdm(desc="decoding", total=latents.total, unit=" pictures", file=sys.stderr) as bar, torch.inference_mode():
        for batch in _batches(latents, batch_size):
            z = torch.stack([latent.z for latent in batch]).to(vae.device, vae.dtype)
            for latent, x in zip(batch, vae.decode(z).sample, strict=True):
                name = f"{len(lines):06d}_{_stem(latent.name)}.png"
                to_pil(x).save(folder / name)
                height, width = x.shape[-2:]
                mirrored = {"mirrored": True} if latent.is_mirrored else {}
                lines.append({"file": name, "latent": latent.name, "height": height, "width": width} | mirrored)
                bar.update()
    return lines


def _batches(latents: _Chosen, batch_size: int) -> Iterator[list[RawLatent]]:
    """Neighbours of one size, so many at a time.

    Raises:
        UserError: A latent is not finite.
    """
    batch: list[RawLatent] = []
    for latent in latents:
        if not bool(latent.z.isfinite().all()):
            raise UserError(
                f"the latent {latent.name} holds values that are not finite; make it anew, or stop before it with "
                "--limit."
            )
        if batch and (len(batch) == batch_size or batch[0].z.shape != latent.z.shape):
            yield batch
            batch = []
        batch.append(latent)
    if batch:
        yield batch


def _stem(name: str) -> str:
    """What a file is called after a latent: the end of its name, without characters that some file systems refuse."""
    return re.sub(r"[^\w.-]+", "-", PurePosixPath(name).stem)[-80:]


def _is_same_encoder(vae: AutoencoderKL, files: LatentFiles, args: Args) -> bool | None:
    """Whether the VAE's encoder made the latents; None where nothing tells. Says so where it did not."""
    from sd_vae.latents import encoder_fingerprint

    if files.encoder is None or files.encoder_dtype != args.dtype:
        return None
    given = encoder_fingerprint(vae)
    if given != files.encoder:
        console.say(
            f"note: the latents were made by the encoder {files.encoder[:12]}, {args.vae} has {given[:12]}; its "
            "decoder shows them right only if both share one latent space."
        )
    return given == files.encoder


def _require_target(args: Args) -> None:
    """Check that `--out` may be made, in place of at most what an earlier run decoded."""
    from sd_vae.files import require_own_folder

    out = args.out
    names = {path.name for path in out.iterdir()} if out.is_dir() else set()
    own = {name for name in names if name.endswith(".png")} | {LISTING} if LISTING in names else set()
    require_own_folder(out, own, kind="a folder of decoded latents", overwrite=args.overwrite)
