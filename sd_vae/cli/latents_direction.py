"""`sd-vae latents direction`: an attribute vector, from pictures that have it and pictures that lack it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sd_vae.cli import console
from sd_vae.cli.tools import picture_progress
from sd_vae.errors import UserError

__all__ = ["Args", "run"]


@dataclass(frozen=True, kw_only=True)
class Args:
    """Find the way from one group of latents to another: the difference of their means.

    sd-vae interpolate and sd-vae augment take it as --direction and go along it by a --strength; 1 is the whole
    difference. The separation says how much of it is the attribute and how much these very pictures.
    """

    positive: Path
    """Latent store of pictures that have the attribute."""
    negative: Path
    """Latent store, of the same encoder, of pictures that lack it."""
    out: Path
    """File to write, .safetensors."""
    pooled: bool = False
    """One vector for all cells, for pictures that do not lie on one another; by default one for each cell, for those
    that do, as aligned faces."""
    overwrite: bool = False
    """Replace the file that is there."""
    json: bool = False
    """Print the result as one JSON object."""


def run(argv: list[str]) -> None:
    """Run the action.

    Args:
        argv: Its arguments.

    Raises:
        UserError: The stores are of two encoders, `--out` is taken, or as `sd_vae.latents.direction.direction`.
    """
    args = console.parse(Args, argv, command="latents direction")

    from sd_vae.files import require_writable_target
    from sd_vae.latents.direction import direction, save_direction
    from sd_vae.latents.stored_items import StoredModes

    require_writable_target(args.out, overwrite=args.overwrite)
    positive, negative = StoredModes(args.positive), StoredModes(args.negative)
    encoders = [modes.description.encoder for modes in (positive, negative)]
    if encoders[0] != encoders[1]:
        raise UserError(
            f"{args.positive} was made by the encoder {encoders[0][:12]}, {args.negative} by {encoders[1][:12]}; "
            "encode both with one VAE in one dtype."
        )
    with picture_progress("reading") as progress:
        found = direction(positive, negative, pooled=args.pooled, encoder=encoders[0], progress=progress)
    save_direction(args.out, found)
    result: dict[str, Any] = {
        "out": str(args.out),
        "shape": list(found.vector.shape),
        "num_positive": found.num_positive,
        "num_negative": found.num_negative,
        "separation": found.separation,
        "length": float(found.vector.norm()),
    }
    if args.json:
        console.print_json(result)
        return
    console.print_fields(
        {
            "written": args.out,
            "pictures": f"{found.num_positive} with, {found.num_negative} without",
            "shape": "x".join(map(str, found.vector.shape)),
            "separation": f"{found.separation:.3f} AUROC on the half that a direction was not made of; 0.5 is chance",
        }
    )
