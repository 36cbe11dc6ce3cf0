"""`sd-vae latents verify`: is a store still what was written?"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import tyro

from sd_vae.cli import console
from sd_vae.cli.stores import load_encoder, shard_progress
from sd_vae.errors import UserError

__all__ = ["Args", "run"]


@dataclass(frozen=True)
class Args:
    """Read a store from end to end and name every damage: checksums, counts, shapes, finiteness.

    With --vae also check that its encoder made the store, with --data encode some of the pictures again and compare.
    Exit code 0 means intact, 2 damaged.
    """

    store: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="STORE")]
    """Folder of latents."""
    vae: str | None = None
    """VAE that made it: a folder, a file or a hub id."""
    config: str | None = None
    """Architecture of the VAE where nothing beside it tells: a config.json, its folder, or a preset."""
    data: str | None = None
    """Where the pictures are: a folder, a parquet file or folder, WebDataset tars, or hf://DATASET[:SPLIT]; needs
    --vae."""
    samples: int = 16
    """Latents, at random, whose pictures are encoded again."""
    seed: int = 0
    """Which of them."""
    device: str = "cpu"
    """Where to encode: cpu, cuda, cuda:1, mps."""
    json: bool = False
    """Print the result as one JSON object."""


def run(argv: list[str]) -> None:
    """Run the action.

    Args:
        argv: Its arguments.

    Raises:
        UserError: The store is damaged or is none, --data without --vae, or as `load_vae` and `open_records`.
    """
    args = console.parse(Args, argv, command="latents verify")
    if args.data is not None and args.vae is None:
        raise UserError("--data is given and --vae is not; say with --vae which VAE encodes the pictures again.")
    if args.samples < 1:
        raise UserError(f"--samples is {args.samples}, it must be at least 1.")

    from sd_vae.latents import LatentStore, verify
    from sd_vae.latents.encode import reencoder

    store = LatentStore.open(args.store)
    vae = None if args.vae is None else load_encoder(store, args.vae, args.config, args.device)
    reencode = None if vae is None or args.data is None else reencoder(vae, args.data, store)
    with shard_progress(store, "verifying") as progress:
        found = verify(args.store, vae, reencode, num_samples=args.samples, seed=args.seed, progress=progress)
    if args.json:
        console.print_json(asdict(found) | {"ok": found.ok})
    else:
        for damage in found.damages:
            print(damage)
        print(f"{found.num_shards} shards with {found.num_items:,} latents read from end to end")
        if found.largest_difference is not None:
            difference = f"largest difference {found.largest_difference:.1e} of the latent's magnitude"
            print(f"{found.num_reencoded} pictures encoded again, {difference}")
    if not found.ok:
        count = len(found.damages)
        raise UserError(
            f"{args.store} is damaged: {count} damage{'s' * (count > 1)}, listed on standard output; do what they say."
        )
    console.say(f"{args.store} is intact.")
