"""`sd-vae augment`: variants of pictures with their labels, as an image folder that `datasets` loads."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

import sd_vae
from sd_vae.cli import console
from sd_vae.cli.default_vae import parse_with_vae
from sd_vae.cli.tools import best_device, note_other_encoder, picture_progress, require_at_least
from sd_vae.errors import UserError

if TYPE_CHECKING:
    from PIL import Image

    from sd_vae.autoencoder import AutoencoderKL
    from sd_vae.latents import LatentDataset
    from sd_vae.latents.augment import AugmentConfig, Variant

__all__ = ["Args", "run"]

METADATA = "metadata.jsonl"
OWN_COLUMNS = ("file_name", "augmented_from", "variant", "mixed_with", "share", "strengths")
"""What a line of the metadata says beside the columns of the data set."""

PER_FOLDER = 1000
"""Pictures whose variants lie in one folder."""

BATCH_SIZE = 8
SHEET_ROWS, SHEET_COLUMNS = 8, 10


@dataclass(frozen=True, kw_only=True)
class Args:
    """Make new variants of pictures: noise of the posterior, mixing within a label, attribute vectors.

    Writes an image folder with metadata.jsonl, every column of the data set carried over:
    datasets.load_dataset("imagefolder", data_dir=DIR). Whether training on it helps depends on the VAE and on the task;
    docs/augment.md has a measurement.
    """

    vae: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="VAE")]
    """Folder, file or hub id of the VAE, or the name of one that ships; left out, `mini`."""
    data: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DATA")]
    """Folder of pictures, parquet file or folder, WebDataset tars, hf://DATASET[:SPLIT], or a latent store."""
    out: Path
    """Folder to write."""
    per_image: int = 10
    """Variants of each picture."""
    strength: float = 1.0
    """Factor of temperature, mix and directions."""
    temperature: float = 1.0
    """Noise, in standard deviations of the posterior. With a VAE of a small KL weight, 1 cannot be seen."""
    mix: float = 0.3
    """Largest share of another picture of the same label; 0 mixes nothing."""
    direction: tuple[Path, ...] = ()
    """Attributes to add, each by a random factor between -1 and 1; of sd-vae latents direction."""
    label: str = "label"
    """Column whose values must agree for two pictures to be mixed; without it, any are."""
    size: int | None = None
    """Centred squares of this side; by default pictures keep their size, cut to multiples of the VAE's factor."""
    allow_upscale: bool = False
    """Enlarge pictures that are smaller than --size, instead of leaving them out."""
    sheet: Path | None = None
    """File for a contact sheet: the first pictures as the VAE sees them, a row each, and their variants."""
    seed: int = 0
    """Seed of all draws."""
    workers: int = 2
    """Processes that read and decode pictures; 0 for none."""
    config: str | None = None
    """Architecture of the VAE where nothing beside it tells: a config.json, its folder, or a preset."""
    device: str = "auto"
    """Where to compute: cpu, cuda, cuda:1, mps; auto takes an accelerator where there is one."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """What to compute in."""
    overwrite: bool = False
    """Replace an earlier run's folder, and the sheet."""
    json: bool = False
    """Print the result as one JSON object."""


def run(argv: list[str]) -> None:
    """Run the command.

    Args:
        argv: Its arguments.

    Raises:
        UserError: Whatever is wrong with the arguments, the VAE, the data or a direction, or `--out` is taken.
    """
    args = parse_with_vae(Args, argv, command="augment")
    require_at_least(args, workers=0)

    from sd_vae.files import atomic_folder, require_writable_target, write_text
    from sd_vae.latents import LatentStore
    from sd_vae.latents.augment import AugmentConfig, posterior_reach, variants
    from sd_vae.latents.direction import load_direction
    from sd_vae.latents.format import STORE

    is_store = (Path(args.data) / STORE).is_file()
    if is_store and (args.size is not None or args.allow_upscale):
        raise UserError(f"{args.data} is a latent store, whose pictures have their size; leave --size out.")
    config = AugmentConfig(
        per_image=args.per_image,
        strength=args.strength,
        temperature=args.temperature,
        mix=args.mix,
        directions=tuple(map(load_direction, args.direction)),
        seed=args.seed,
    )
    _require_target(args)
    if args.sheet is not None:
        require_writable_target(args.sheet, overwrite=args.overwrite)
    vae = sd_vae.load_vae(args.vae, args.config, dtype=args.dtype, device=best_device(args.device))
    for file, move in zip(args.direction, config.directions, strict=True):
        note_other_encoder(str(file), move.encoder, vae, args.vae)
    if is_store:
        from sd_vae.cli.stores import require_encoder

        require_encoder(LatentStore.open(Path(args.data)), vae, args.vae)
    with _store(args, vae, is_store) as store, atomic_folder(args.out, overwrite=args.overwrite) as folder:
        dataset = _open(store)
        _require_columns(dataset)
        labels = dataset.column(args.label) if args.label in dataset.columns else None
        if labels is None and config.mix * config.strength:
            console.say(f"note: {args.data} has no column {args.label!r}, so any two pictures of one size are mixed.")
        writer = _Writer(folder, dataset, config)
        total = len(dataset) * config.per_image
        with picture_progress("augmenting", total) as progress:
            for _, own in groupby(variants(dataset, labels, config), key=lambda variant: variant.index):
                writer.write(vae, list(own))
                progress(len(writer.rows), total)
        write_text(folder / METADATA, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in writer.rows))
        reach = posterior_reach(dataset)
        if args.sheet is not None:
            _write_sheet(args.sheet, vae, dataset, writer)
    result = {
        "out": str(args.out),
        "num_pictures": len(writer.rows),
        "num_originals": len(dataset),
        "num_mixed": sum(row["mixed_with"] is not None for row in writer.rows),
        "columns": list(dataset.columns),
        "posterior_reach": reach,
    }
    if args.json:
        console.print_json(result)
        return
    fields = {
        "written": f"{args.out}, with {METADATA}",
        "pictures": f"{len(writer.rows)} of {len(dataset)}, {result['num_mixed']} of them mixed",
    }
    if reach is not None:
        fields["posterior"] = f"its std is {reach:.2%} of that of z: what --temperature 1 can change"
    console.print_fields(fields)


class _Writer:
    """Decodes variants to files, and keeps what the metadata says of them and the first for the sheet."""

    def __init__(self, folder: Path, dataset: LatentDataset, config: AugmentConfig) -> None:
        self.rows: list[dict[str, Any]] = []
        self.shown: list[list[Image.Image]] = []
        self._folder, self._dataset, self._config = folder, dataset, config

    def write(self, vae: AutoencoderKL, own: list[Variant]) -> None:
        """Decode and save the variants of one item."""
        item = self._dataset.item(own[0].index)
        place = Path(f"{own[0].index // PER_FOLDER:03d}")
        (self._folder / place).mkdir(exist_ok=True)
        pictures = [
            picture for start in range(0, len(own), BATCH_SIZE) for picture in _decode(vae, own[start:][:BATCH_SIZE])
        ]
        for variant, picture in zip(own, pictures, strict=True):
            name = place / f"{variant.index:06d}_{variant.number:03d}.png"
            picture.save(self._folder / name)
            partner = None if variant.partner is None else self._dataset.item(variant.partner).id
            values = (name.as_posix(), item.id, variant.number, partner, variant.share, list(variant.strengths))
            self.rows.append(dict(zip(OWN_COLUMNS, values, strict=True)) | item.columns)
        if len(self.shown) < SHEET_ROWS:
            self.shown.append(pictures[: SHEET_COLUMNS - 1])


def _decode(vae: AutoencoderKL, own: list[Variant]) -> list[Image.Image]:
    import torch

    from sd_vae.images import to_pil

    z = torch.stack([variant.z for variant in own]).to(vae.device, vae.dtype)
    with torch.no_grad():
        return [to_pil(x) for x in vae.decode(z).sample]


def _write_sheet(path: Path, vae: AutoencoderKL, dataset: LatentDataset, writer: _Writer) -> None:
    """The first pictures through the VAE as they are, each in front of its variants."""
    import torch

    from sd_vae.files import atomic_file
    from sd_vae.images import to_pil
    from sd_vae.latents.preview import contact_sheet

    shown = []
    for index, pictures in enumerate(writer.shown):
        z = dataset.sample(index)[: dataset.description.vae.latent_channels]
        with torch.no_grad():
            shown += [to_pil(vae.decode(z[None].to(vae.device, vae.dtype)).sample), *pictures]
    with atomic_file(path) as temporary:
        sheet = contact_sheet(shown, columns=1 + len(writer.shown[0]), side=192)
        sheet.save(temporary, format="JPEG" if path.suffix.lower() in (".jpg", ".jpeg") else "PNG", quality=90)


@contextmanager
def _store(args: Args, vae: AutoencoderKL, is_store: bool) -> Iterator[Path]:
    """The latents: those that are given, or the pictures', encoded for the while."""
    if is_store:
        yield Path(args.data)
        return
    from sd_vae.data import PictureTransform, open_records
    from sd_vae.latents.encode import EncodeConfig, encode

    transform = PictureTransform(
        size=args.size, native=args.size is None, allow_upscale=args.allow_upscale, factor=vae.factor
    )
    config = EncodeConfig(transform=transform, dtype="float32", num_workers=args.workers)
    records = open_records(args.data)
    with tempfile.TemporaryDirectory(prefix=f".{args.out.name}.", suffix=".tmp", dir=args.out.parent) as folder:
        with picture_progress("encoding", records.num_records) as progress:
            encoded = encode(
                vae,
                records,
                Path(folder) / "store",
                config,
                progress=lambda step: progress(step.num_done, step.num_records or step.num_done),
            )
        assert encoded is not None, "there is one process"
        if encoded.reasons:
            listed = ", ".join(f"{count} {reason}" for reason, count in encoded.reasons.items())
            console.say(f"note: {sum(encoded.reasons.values())} pictures are left out ({listed}).")
        yield Path(folder) / "store"


def _open(store: Path) -> LatentDataset:
    from sd_vae.latents import LatentDataset, LatentStore

    return LatentDataset(store, content=LatentStore.open(store).description.content)


def _require_columns(dataset: LatentDataset) -> None:
    """Check that no column of the data set has the name of one of ours.

    Raises:
        UserError: One has.
    """
    taken = [name for name in dataset.columns if name in OWN_COLUMNS]
    if taken:
        raise UserError(
            f"the data has a column {taken[0]!r}, which is what the metadata calls its own; rename it, or encode with "
            "--columns and give the store."
        )


def _require_target(args: Args) -> None:
    """Check that `--out` may be made, in place of at most an earlier run's."""
    from sd_vae.files import require_own_folder

    names = {path.name for path in args.out.iterdir()} if args.out.is_dir() else set()
    own = {name for name in names if len(name) == 3 and name.isdecimal()} | {METADATA} if METADATA in names else set()
    require_own_folder(args.out, own, kind="a folder of variants", overwrite=args.overwrite)
