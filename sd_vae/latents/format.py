"""The words of a latent store: what its files are called and what stands in them.

docs/latent_format.md is the specification. Everything here is plain data, checked when it is made, and imports neither
torch nor diffusers. A store holds raw z, never scaled latents; the scale is part of its description.

Shapes: C latent channels, H W pixels, h w latent cells.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from sd_vae.config import VAEConfig
from sd_vae.errors import UserError
from sd_vae.validation import STRICT, from_plain

__all__ = [
    "DEFAULT_SHARD_ITEMS",
    "FORMAT",
    "LOGVAR_RANGE",
    "MANIFEST",
    "REJECTS",
    "STORE",
    "TENSORS",
    "VERSION",
    "Content",
    "Difference",
    "Item",
    "Numerics",
    "Reject",
    "StoreDescription",
    "StoreDtype",
    "affine_of",
    "latents_file",
    "leaves",
    "record_file",
    "rows_file",
    "size_name",
]

FORMAT, VERSION = "sd-vae latents", 1
STORE, MANIFEST, REJECTS = "store.json", "manifest.json", "rejects.jsonl"

Content = Literal["moments", "mode", "sample"]
StoreDtype = Literal["float16", "bfloat16", "float32"]

TENSORS: dict[Content, tuple[str, ...]] = {"moments": ("mean", "logvar"), "mode": ("mean",), "sample": ("z",)}
"""What is stored of each item, (C, h, w) each."""

LOGVAR_RANGE = (-30.0, 20.0)
"""Clamp of the stored log-variance: that of `sd_vae.posterior`, whose import costs diffusers; a test compares them."""

DEFAULT_SHARD_ITEMS = 1024
"""Source records a shard: 64 MiB of float16 moments at 512x512, and what a crash can cost."""

_DECODER_FIELDS = frozenset({"out_channels", "up_block_types", "use_post_quant_conv", "sample_size", "force_upcast"})
"""Config fields that encoding does not read, so that another decoder changes nothing."""


def latents_file(folder: Path, shard: int) -> Path:
    """Return the path of a shard's tensors."""
    return folder / f"shard-{shard:05d}.safetensors"


def rows_file(folder: Path, shard: int) -> Path:
    """Return the path of a shard's rows: one item each, an Arrow stream."""
    return folder / f"shard-{shard:05d}.arrow"


def record_file(folder: Path, shard: int) -> Path:
    """Return the path of a shard's completion record, written last of the three."""
    return folder / f"shard-{shard:05d}.json"


def size_name(height: int, width: int) -> str:
    """Return how a latent size is written, height first: 64x96."""
    return f"{height}x{width}"


@dataclass(frozen=True, kw_only=True)
class Item:
    """Where one latent comes from: which picture, and what was cut out of it. Sizes are (height, width) in pixels."""

    position: int
    """Number of the source record, from 0, in the source's own order."""
    id: str
    """Name of the source record, unique in the source."""
    source: str
    """Path or URL that the picture was read from."""
    sha256: str
    """Checksum of the source's bytes, before decoding."""
    original_size: tuple[int, int]
    """Size of the upright picture."""
    resized_size: tuple[int, int]
    """Size it was resized to before the crop."""
    crop: tuple[int, int, int, int]
    """Top, left, height, width of the crop in the resized picture."""
    view: int = 0
    """Number of the crop where a picture has several."""
    flipped: bool = False
    """Mirrored left to right before encoding. Such an item stands right behind the one that it mirrors."""
    columns: dict[str, Any] = field(default_factory=dict)
    """What the user keeps of the record: caption, label and the like."""

    def __str__(self) -> str:
        """Return what to call the item in an error."""
        view = f" view {self.view}" if self.view else ""
        return f"{self.id}{view}{' mirrored' if self.flipped else ''}"


@dataclass(frozen=True, kw_only=True)
class Reject:
    """A source record that has no latent, and why."""

    __pydantic_config__ = STRICT

    position: int
    """Number of the source record."""
    id: str
    """Its name."""
    source: str
    """Path or URL that it was read from."""
    sha256: str
    """Checksum of the source's bytes."""
    reason: str
    """Why it was left out, in a word that does not change."""
    detail: str
    """What exactly; the same in every run."""


@dataclass(frozen=True, kw_only=True)
class Numerics:
    """What may change the last bits of a latent, though nobody asked for another result."""

    __pydantic_config__ = STRICT

    device: str
    """cpu, or the name of the accelerator."""
    cpu: str
    """Model of the CPU and the instruction set that torch uses on it."""
    threads_per_picture: int
    """Threads that encode one picture."""
    versions: dict[str, str]
    """Library to version."""


class Difference(NamedTuple):
    """One field in which two descriptions differ."""

    field: str
    """Its name, dotted."""
    here: Any
    """Its value in the description that was asked; `absent` where there is none."""
    there: Any
    """Its value in the other."""
    is_numeric: bool
    """Whether it only moves the last bits."""


@dataclass(frozen=True, kw_only=True)
class StoreDescription:
    """Everything that the bytes of a store follow from, but for the pictures."""

    __pydantic_config__ = STRICT

    data: str
    """Where the pictures come from, as the user called it."""
    num_records: int | None = None
    """Source records; None where only the end of a stream tells."""
    shard_items: int = DEFAULT_SHARD_ITEMS
    """Source records a shard: shard k covers [k * shard_items, (k + 1) * shard_items)."""
    content: Content = "moments"
    """moments (mean and logvar), mode (the mean alone) or sample (one fixed draw)."""
    seed: int | None = None
    """Seed of the draws where content is sample, else None."""
    dtype: StoreDtype = "float16"
    """Type of the stored numbers."""
    compute_dtype: StoreDtype = "float32"
    """Type that the encoder ran in."""
    encoder: str
    """`encoder_fingerprint` of the VAE; another decoder leaves it as it is."""
    vae: VAEConfig
    """The VAE's config, with its scaling and shift factors."""
    transform: dict[str, Any]
    """What was done to each picture before encoding, as the data side describes it."""
    numerics: Numerics
    """What may change the last bits."""

    def __post_init__(self) -> None:
        """Check the rules.

        Raises:
            UserError: Lists every rule that is broken, with its values.
        """
        problems = [
            f"{name} is {getattr(self, name)!r}, choose from {', '.join(get_args(kinds))}"
            for name, kinds in (("content", Content), ("dtype", StoreDtype), ("compute_dtype", StoreDtype))
            if getattr(self, name) not in get_args(kinds)
        ]
        if not self.data:
            problems.append("data is empty, say where the pictures come from")
        if self.num_records is not None and self.num_records < 0:
            problems.append(f"num_records is {self.num_records}, it must be 0 or more")
        if self.shard_items < 1:
            problems.append(f"shard_items is {self.shard_items}, it must be at least 1")
        if (self.content == "sample") != (self.seed is not None) or (self.seed or 0) < 0:
            problems.append(
                f"seed is {self.seed} with content {self.content}, it must be 0 or more for sample and None otherwise"
            )
        if not re.fullmatch("[0-9a-f]{64}", self.encoder):
            problems.append(f"encoder is {self.encoder!r}, it must be a sha256 in hexadecimal")
        if self.numerics.threads_per_picture < 1:
            problems.append(f"threads_per_picture is {self.numerics.threads_per_picture}, it must be at least 1")
        if problems:
            raise UserError("not a usable store description: " + "; ".join(problems) + ".")

    @property
    def digest(self) -> str:
        """The sha256 that ties a shard to this description."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()

    @property
    def affine(self) -> tuple[list[float], list[float]]:
        """(offset, factor), one of each a channel: latents = (z - offset) * factor."""
        return affine_of(self.vae)

    def differences(self, other: "StoreDescription") -> list[Difference]:
        """Return the fields whose values differ; those that only a decoder reads are left out."""
        ours, theirs = dict(leaves(self.to_dict())), dict(leaves(other.to_dict()))
        names = [name for name in {**ours, **theirs} if name not in {f"vae.{field}" for field in _DECODER_FIELDS}]
        return [
            Difference(name, ours.get(name, "absent"), theirs.get(name, "absent"), name.startswith("numerics."))
            for name in names
            if ours.get(name, "absent") != theirs.get(name, "absent")
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON's own values, ready to write and to compare."""
        plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return plain

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, source: str) -> "StoreDescription":
        """Return the description that `to_dict` made.

        Raises:
            UserError: Unknown or missing fields, wrong types, broken rules, all at once.
        """
        return from_plain(cls, values, source=source)


def affine_of(config: VAEConfig) -> tuple[list[float], list[float]]:
    """Return (offset, factor) of a VAE, one of each a channel: latents = (z - offset) * factor."""
    if config.latents_mean is not None and config.latents_std is not None:
        return list(config.latents_mean), [config.scaling_factor / std for std in config.latents_std]
    return [config.shift_factor or 0.0] * config.latent_channels, [config.scaling_factor] * config.latent_channels


def leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the values of nested dictionaries by dotted name."""
    for name, value in values.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
