"""`sd-vae latents export`: a store in the layout of another trainer."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import tyro

from sd_vae.cli import console
from sd_vae.latents.export.layouts import LAYOUTS, Draw, LayoutName, Values

__all__ = ["Args", "run"]


@dataclass(frozen=True, kw_only=True)
class Args:
    """Write a store in the layout of another trainer, by that trainer's own conventions."""

    store: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="STORE")]
    """Folder of latents, as sd-vae encode makes it."""
    layout: Annotated[LayoutName, tyro.conf.arg(name="format")]
    """Whose layout; docs/exports.md says what each holds."""
    out: Path
    """Folder to write."""
    draw: Draw | None = None
    """sample: one draw from each posterior, the default; mode: its mean. Not for layouts that hold moments."""
    seed: int = 0
    """Seed of the draws."""
    values: Values | None = None
    """scaled or raw, for webdataset and parquet, which have no convention."""
    label: str = "label"
    """Column with the class: a number, or a name; names are numbered in sorted order."""
    unlabelled: bool = False
    """Leave out classes, where the layout can do without."""
    overwrite: bool = False
    """Replace an earlier export."""
    json: bool = False
    """Print the result as one JSON object."""


def run(argv: list[str]) -> None:
    """Run the action.

    Args:
        argv: Its arguments.

    Raises:
        UserError: As `sd_vae.latents.export.export_store`.
    """
    args = console.parse(Args, argv, command="latents export")

    from sd_vae.latents.export import export_store

    with _progress() as progress:
        note = export_store(
            args.store,
            args.out,
            args.layout,
            draw=args.draw,
            seed=args.seed,
            values=args.values,
            label=args.label,
            unlabelled=args.unlabelled,
            overwrite=args.overwrite,
            progress=progress,
        )
    if args.json:
        console.print_json(asdict(note) | {"out": args.out})
        return
    left_out = note.num_mirrored_left_out
    drawn = {"sample": f"one draw a posterior, seed {note.seed}", "mode": "the mean of each posterior"}
    fields = {
        "written": args.out,
        "for": LAYOUTS[args.layout].title,
        "latents": f"{note.num_latents}" + (f", {left_out} mirrored ones left out" if left_out else ""),
        "values": f"{note.scale.values}, {drawn.get(note.draw or '', LAYOUTS[args.layout].holds)}",
    }
    if note.classes:
        fields["classes"] = f"{len(note.classes)}, numbered by name: 0 is {note.classes[0]}"
    console.print_fields(fields)


@contextmanager
def _progress() -> Iterator[Callable[[int, int], None]]:
    """A bar on standard error with rate and time left; yields what moves it to (done, total)."""
    from tqdm import tqdm

    with tqdm(desc="exporting", unit=" latents", file=sys.stderr) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield show
