"""Latents from a store, or from the files of any trainer in `sd_vae.latents.export`, as raw z.

What the files are and by which scale their values were multiplied is taken from the note of an export, or from their
layout where that settles it. Where neither does, the user says; nothing is guessed from numbers.

Shapes: C latent channels, h w latent cells.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from sd_vae.config import VAEConfig
from sd_vae.errors import UserError
from sd_vae.latents.export import dit, edm2, lightningdit, mds, parquet, tars
from sd_vae.latents.export.arrays import StoredLatent, read_npz
from sd_vae.latents.export.exporting import family_of
from sd_vae.latents.export.layouts import LayoutName, Values, find_layout
from sd_vae.latents.export.note import Scale, find_note
from sd_vae.latents.format import STORE, affine_of

if TYPE_CHECKING:
    from torch import Tensor

    from sd_vae.latents.store import LatentStore

__all__ = ["LatentFiles", "RawLatent", "open_latents", "recognise"]


@dataclass(frozen=True)
class RawLatent:
    """One latent as a decoder takes it."""

    name: str
    """What to call it: the item's id, or the file with a number where it holds several."""
    z: Tensor
    """(C, h, w), float32, raw; the mean where there is a posterior."""
    is_mirrored: bool
    """Whether it is of the mirrored picture."""


@dataclass(frozen=True)
class LatentFiles:
    """Latents on disk, and what they are."""

    path: Path
    """File or folder."""
    layout: LayoutName | Literal["store"]
    """Whose layout it is."""
    scale: Scale
    """raw or scaled, as they lie there, and by what."""
    encoder: str | None
    """Fingerprint of the encoder; None where the files do not say."""
    encoder_dtype: str | None
    """Number format that it ran in; None where the files do not say."""
    num_latents: int | None
    """How many, mirrored ones not counted; None where only reading tells."""

    def __iter__(self) -> Iterator[RawLatent]:
        """Yield the latents in order.

        Raises:
            UserError: A file is missing or damaged, or holds other channels.
        """
        if self.layout == "store":
            yield from _read_store(self.path)
            return
        layout = find_layout(self.layout)
        found = False
        for stored in family_of(layout).read(self.path):
            found = True
            yield RawLatent(stored.name, self._to_raw(stored, layout.num_parts), stored.is_mirrored)
        if not found:
            raise UserError(f"{self.path} holds no latents of the format {self.layout}; check the path or --format.")

    def _to_raw(self, stored: StoredLatent, num_parts: int) -> Tensor:
        import torch

        num_channels = len(self.scale.factor)
        if len(stored.values) != num_parts * num_channels:
            raise UserError(
                f"{stored.name} has {len(stored.values)} channels, {self.layout} of this VAE has "
                f"{num_parts * num_channels}; check --format, or load the VAE that the latents belong to."
            )
        z = stored.values[:num_channels]
        if self.scale.values == "raw":
            return z
        offset, factor = (torch.tensor(numbers).view(-1, 1, 1) for numbers in (self.scale.offset, self.scale.factor))
        return z / factor + offset


def open_latents(
    path: Path | str, vae: VAEConfig, *, layout: str | None = None, values: Values | None = None
) -> LatentFiles:
    """Return the latents in a file or folder; nothing but what they are is read.

    Args:
        path: A store, a folder of one of the layouts, or one of its files.
        vae: Config of the VAE that will decode; its scale is undone where latents are scaled and nothing says by what.
        layout: Whose layout it is, where the files do not tell.
        values: raw or scaled, where neither the files nor their layout tell.

    Raises:
        UserError: Nothing is there, it is not told what it is, or an option contradicts what the files say.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"there are no latents at {path}; check the path.")
    if layout not in (None, "store"):
        find_layout(str(layout))
    if (path / STORE).is_file():
        return _open_store(path, layout, values)
    note = find_note(path)
    name = recognise(path, asked=layout) if note is None else note.layout
    if layout not in (None, name):
        raise UserError(f"--format is {layout} and {path} says that it is of {name}; leave out --format.")
    return LatentFiles(
        path,
        name,
        _settle_scale(path, note.scale if note else _said_scale(path, name, vae), values, vae),
        encoder=note.encoder if note else None,
        encoder_dtype=note.encoder_dtype if note else None,
        num_latents=note.num_latents if note and path.is_dir() else None,
    )


def recognise(path: Path, *, asked: str | None = None) -> LayoutName:
    """Return the layout of files that have no note, by their names and keys.

    Args:
        path: A folder or a file.
        asked: What the user says that it is; taken where nothing else tells.

    Raises:
        UserError: The files do not tell and the user does not say.
    """
    found = _of_folder(path) if path.is_dir() else _of_file(path)
    if found is None and asked is not None:
        for name in _known():
            if name == asked:
                return name
    if found is None:
        raise UserError(f"{path} does not tell what it is; pass --format, one of: {', '.join(_known())}.")
    return found


def _said_scale(path: Path, layout: LayoutName, vae: VAEConfig) -> Scale | None:
    """What files without a note say of their scale, or what their layout settles."""
    if layout == "webdataset":
        return tars.scale_of(path)
    if layout == "parquet":
        return parquet.scale_of(path)
    return _scale_by(vae, "raw") if find_layout(layout).values == "raw" else None


def _settle_scale(path: Path, said: Scale | None, asked: Values | None, vae: VAEConfig) -> Scale:
    """The scale that the files say, or else the user."""
    if said is not None:
        if asked not in (None, said.values):
            raise UserError(f"--values is {asked} and {path} holds {said.values} latents; leave out --values.")
        return said
    if asked is None:
        raise UserError(
            f"{path} does not say whether its latents are scaled; pass --values scaled where they were multiplied by "
            "the VAE's scaling factor, --values raw where they were not."
        )
    return _scale_by(vae, asked)


def _scale_by(vae: VAEConfig, values: Values) -> Scale:
    offset, factor = affine_of(vae)
    return Scale(values=values, offset=tuple(offset), factor=tuple(factor))


def _known() -> tuple[LayoutName, ...]:
    from sd_vae.latents.export.layouts import LAYOUTS

    return tuple(LAYOUTS)


def _of_folder(path: Path) -> LayoutName | None:
    if (path / dit.FEATURES).is_dir():
        return "dit"
    if (path / edm2.FOLDER / edm2.DATASET).is_file():
        return "repa"
    if any(path.glob(f"*/{edm2.PATTERN}")):
        return "edm2"
    if (path / edm2.ARCHIVE).is_file():
        return "edm2-zip"
    if any(path.glob(lightningdit.PATTERN)):
        return "lightningdit"
    if mds.is_mds(path):
        return "mds"
    suffixes: dict[str, LayoutName] = {"*.tar": "webdataset", "*.parquet": "parquet", "*.latent": "comfyui"}
    for pattern, name in suffixes.items():
        if any(path.glob(pattern)):
            return name
    archive = next(iter(sorted(path.rglob("*.npz"))), None)
    return _of_file(archive) if archive else None


def _of_file(path: Path) -> LayoutName | None:
    suffixes: dict[str, LayoutName] = {".tar": "webdataset", ".parquet": "parquet", ".latent": "comfyui"}
    if path.suffix in suffixes:
        return suffixes[path.suffix]
    if path.suffix == ".npz":
        names = read_npz(path).keys()
        return "kohya" if "latents" in names else "mar" if "moments" in names else None
    if path.match(edm2.PATTERN):
        return "edm2"
    if path.match(lightningdit.PATTERN):
        return "lightningdit"
    if path.suffix == ".zip" and zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            return "edm2-zip" if edm2.DATASET in archive.namelist() else None
    return None


def _open_store(path: Path, layout: str | None, values: Values | None) -> LatentFiles:
    from sd_vae.latents.store import LatentStore

    if layout not in (None, "store"):
        raise UserError(f"--format is {layout} and {path} is a latent store; leave out --format.")
    if values == "scaled":
        raise UserError(f"--values is scaled and {path} is a latent store, which holds raw z; leave out --values.")
    store: LatentStore = LatentStore.open(path)
    manifest = store.manifest()
    description, num_latents = store.description, manifest.num_items - manifest.num_flipped
    scale = _scale_by(description.vae, "raw")
    return LatentFiles(path, "store", scale, description.encoder, description.compute_dtype, num_latents)


def _read_store(path: Path) -> Iterator[RawLatent]:
    import torch

    from sd_vae.latents.store import LatentStore

    store = LatentStore.open(path)
    for record in store.manifest().shards:
        reader = store.reader(record)
        for row in range(len(reader)):
            item = reader.item(row)
            yield RawLatent(str(item), reader.latents(row)[0].to(torch.float32, copy=True), item.flipped)
