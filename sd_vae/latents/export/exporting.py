"""Writing a whole export: everything is checked first, then a folder is built beside its place and moved there.

The same store and the same options give the same bytes.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol, cast

from sd_vae.files import atomic_folder, require_own_folder
from sd_vae.latents.export.arrays import StoredLatent
from sd_vae.latents.export.items import ExportItems
from sd_vae.latents.export.layouts import Draw, Layout, LayoutName, Values
from sd_vae.latents.export.note import NOTE, Note, find_note, write_note

__all__ = ["Family", "export_store", "family_of"]


class Family(Protocol):
    """What the module of a family has."""

    def write(self, items: ExportItems, folder: Path, progress: Callable[[int, int], None] | None) -> None:
        """Write the items into an empty folder."""

    def read(self, path: Path) -> Iterator[StoredLatent]:
        """Yield the arrays that `write` wrote, in order."""


def family_of(layout: Layout) -> Family:
    """Return the module that writes and reads a layout."""
    return cast("Family", importlib.import_module(f"sd_vae.latents.export.{layout.module}"))


def export_store(
    store: Path | str,
    out: Path | str,
    layout: LayoutName,
    *,
    draw: Draw | None = None,
    seed: int = 0,
    values: Values | None = None,
    label: str = "label",
    unlabelled: bool = False,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Note:
    """Write a finished store in the layout of another trainer and return the note that lies beside it.

    Args:
        store: Its folder.
        out: Folder to write.
        layout: Whose; see `LAYOUTS`.
        draw: sample (one draw from each posterior; the default) or mode (the mean), where the layout holds one latent.
        seed: Seed of the draws.
        values: raw or scaled, where the layout has no convention.
        label: The user's column with the class.
        unlabelled: Leave out labels, where the layout can do without.
        overwrite: Replace an earlier export.
        progress: Called with (done, total) items.

    Raises:
        UserError: The store lacks what the layout needs, an option contradicts it, or the folder cannot be written.
    """
    out = Path(out)
    _require_target(out, overwrite=overwrite)
    items = ExportItems(store, layout, draw=draw, seed=seed, values=values, label=label, unlabelled=unlabelled)
    note = Note(
        layout=layout,
        scale=items.scale,
        draw=items.draw,
        seed=items.seed,
        encoder=items.description.encoder,
        encoder_dtype=items.description.compute_dtype,
        store=items.description.digest,
        num_latents=len(items),
        num_mirrored_left_out=0 if items.keeps_mirrored else items.manifest.num_flipped,
        classes=items.classes,
    )
    with atomic_folder(out, overwrite=overwrite) as folder:
        family_of(items.layout).write(items, folder, progress)
        write_note(folder, note)
    return note


def _require_target(out: Path, *, overwrite: bool) -> None:
    """Check that `out` may be made, in place of at most an earlier export.

    Raises:
        UserError: As `sd_vae.files.require_own_folder`.
    """
    earlier = find_note(out) if out.is_dir() else None
    own = {NOTE, *earlier.files} if earlier else set()
    require_own_folder(out, own, kind="an export of latents", overwrite=overwrite)
