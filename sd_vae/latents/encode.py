"""A data set of pictures to a latent store: by one process, by several, on a Ray cluster, again after a crash.

The bytes follow from the pictures, the VAE and the store's description alone: how many processes, threads and loader
workers there are, and where an earlier run was stopped, leaves them as they are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

import torch

from sd_vae.config import VAEConfig
from sd_vae.data import PictureTransform, Records, decoder_versions, open_records, prepare
from sd_vae.data import Reject as Unusable
from sd_vae.errors import UserError
from sd_vae.latents.encoder import ViewEncoder, threads_of_torch
from sd_vae.latents.fingerprint import encoder_fingerprint, numerics_of
from sd_vae.latents.format import DEFAULT_SHARD_ITEMS, REJECTS, Content, Item, StoreDescription, StoreDtype
from sd_vae.latents.processes import Processes
from sd_vae.latents.records import Manifest, read_record
from sd_vae.latents.share import NOT_FINITE, Progress, Share, Step, StreamShare, encode_share
from sd_vae.latents.store import LatentStore

if TYPE_CHECKING:
    from torch import Tensor

    from sd_vae.autoencoder import AutoencoderKL

__all__ = ["NOT_FINITE", "EncodeConfig", "Encoded", "Progress", "Step", "describe", "encode", "reencoder"]


@dataclass(frozen=True, kw_only=True)
class EncodeConfig:
    """How a data set is encoded. The first six fields decide what is stored, the others how it is made."""

    transform: PictureTransform
    """What is cut from each picture."""
    content: Content = "moments"
    """What is stored: moments (mean and log-variance), mode (the mean), or sample (one draw)."""
    dtype: StoreDtype = "float16"
    """Type of the stored numbers."""
    seed: int = 0
    """Seed of the draws where content is sample."""
    shard_items: int = DEFAULT_SHARD_ITEMS
    """Records a shard: what an interruption costs at most."""
    threads_per_picture: int = 1
    """Threads that encode one picture on the CPU."""
    num_parallel: int | None = None
    """Pictures that are encoded at once on the CPU; by default as many as torch's threads allow."""
    num_workers: int = 2
    """Processes that read and decode pictures; 0 does it in this one."""
    strict: bool = False
    """Stop at the first picture that cannot be used, instead of listing it in rejects.jsonl."""
    allow_numeric_drift: bool = False
    """Go on with a store that another CPU, thread count or library version began."""

    def __post_init__(self) -> None:
        """Check the values that nothing else checks.

        Raises:
            UserError: Lists every value that is out of range.
        """
        lowest = {"threads_per_picture": 1, "num_parallel": 1, "num_workers": 0, "seed": 0}
        problems = [
            f"{name} is {getattr(self, name)}, it must be at least {least}"
            for name, least in lowest.items()
            if getattr(self, name) is not None and getattr(self, name) < least
        ]
        if problems:
            raise UserError("cannot encode like this: " + "; ".join(problems) + ".")

    @property
    def parallel(self) -> int:
        """Pictures that are encoded at once on the CPU, in this process."""
        return self.num_parallel or max(1, torch.get_num_threads() // self.threads_per_picture)


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """A finished store and what this run did for it."""

    manifest: Manifest
    num_done: int
    """Records that this run encoded or rejected; the others were there already."""
    reasons: dict[str, int]
    """Rejected records of the whole store, by reason."""


def encode(
    vae: AutoencoderKL,
    records: Records,
    folder: Path | str,
    config: EncodeConfig,
    *,
    processes: Processes | None = None,
    engine: Literal["local", "ray"] = "local",
    progress: Progress | None = None,
) -> Encoded | None:
    """Encode a data set into a store, or what is missing of it, and return what came of it.

    Args:
        vae: The model, on its device and in the dtype to compute in.
        records: The pictures.
        folder: The store, new or to be gone on with.
        config: What is stored, and how it is made.
        processes: This process among those that call this together; each does its share.
        engine: local computes in these processes, ray on a Ray cluster whose nodes see `folder` and the pictures.
        progress: Called as records are done; with several processes, for the share of this one.

    Returns:
        None in all processes but the first.

    Raises:
        UserError: The VAE does not fit the transform, another store is there, ray is not installed or given a stream,
            a picture cannot be used where `strict`, a file has vanished, the disk is full, or no picture can be used.
    """
    processes = processes or Processes()
    progress = progress or (lambda step: None)
    store = open_store(vae, records, folder, config)
    if engine == "ray":
        from sd_vae.latents.on_ray import encode_on_ray

        num_done, num_records = encode_on_ray(vae, records, store, config, progress), records.num_records
    else:
        share = _share(records, store, processes)
        num_done = run_share(vae, share, store, config, progress)
        num_records = share.end if isinstance(share, StreamShare) else records.num_records
    num_done = sum(processes.gather(num_done))
    if not processes.is_first:
        return None
    if not num_records:
        raise UserError(f"{records.spec} holds no records, so there is nothing to encode; give another data set.")
    manifest = store.finish(num_records)
    reasons = _reasons(store, manifest)
    if not manifest.num_items:
        found = ", ".join(f"{reason} {count}" for reason, count in reasons.items())
        raise UserError(
            f"none of the {num_records} records of {records.spec} could be encoded ({found}); {store.folder / REJECTS} "
            "says why."
        )
    return Encoded(manifest=manifest, num_done=num_done, reasons=reasons)


def describe(vae: AutoencoderKL, records: Records, config: EncodeConfig) -> StoreDescription:
    """Return the description of the store that these make on this machine.

    Raises:
        UserError: The VAE takes something else than RGB, or its factor is not the transform's.
    """
    if vae.config.in_channels != 3:
        raise UserError(f"the VAE takes {vae.config.in_channels} channels, pictures have 3; use one for RGB.")
    if config.transform.factor != vae.factor:
        raise UserError(
            f"the transform has factor {config.transform.factor}, the VAE {vae.factor}; give the transform the VAE's."
        )
    return StoreDescription(
        data=records.spec,
        num_records=records.num_records,
        shard_items=config.shard_items,
        content=config.content,
        seed=config.seed if config.content == "sample" else None,
        dtype=config.dtype,
        compute_dtype=_dtype_of(vae),
        encoder=encoder_fingerprint(vae),
        vae=VAEConfig.from_dict(dict(vae.config), source="the VAE"),
        transform=config.transform.to_dict(),
        numerics=numerics_of(vae.device, config.threads_per_picture, decoder_versions()),
    )


def open_store(vae: AutoencoderKL, records: Records, folder: Path | str, config: EncodeConfig) -> LatentStore:
    """Return the store to write to, on this machine; several processes and machines may do this at once.

    Raises:
        UserError: As `describe` and `LatentStore.create`.
    """
    description = describe(vae, records, config)
    return LatentStore.create(Path(folder), description, allow_numeric_drift=config.allow_numeric_drift)


def run_share(
    vae: AutoencoderKL, share: Share | StreamShare, store: LatentStore, config: EncodeConfig, progress: Progress
) -> int:
    """Encode a share in this process and return the number of its records.

    Raises:
        UserError: As `encode_share`.
    """
    num_parallel = config.parallel
    with threads_of_torch(config.threads_per_picture):
        return encode_share(
            ViewEncoder(vae),
            share,
            store,
            config.transform,
            num_parallel=num_parallel,
            num_workers=config.num_workers,
            strict=config.strict,
            progress=progress,
        )


def reencoder(vae: AutoencoderKL, data: str | Records | None, store: LatentStore) -> Callable[[Item], Tensor]:
    """Return what encodes the picture of an item anew, as `verify` asks for it: item to moments (2C, h, w).

    It raises `UserError` where the picture is gone, has changed, or cannot be encoded.

    Args:
        vae: The model that made the store.
        data: The data set, or where it is now; by default where the store says.
        store: The store.

    Raises:
        UserError: The VAE runs in another dtype than the store was made in, or there is no such data.
    """
    description = store.description
    if _dtype_of(vae) != description.compute_dtype:
        raise UserError(
            f"the VAE is {_dtype_of(vae)}, {store.folder} was encoded in {description.compute_dtype}; load it in that."
        )
    transform = PictureTransform.from_dict(description.transform, source=str(store.folder))
    spec = description.data if data is None else data
    records = open_records(spec, columns=()) if isinstance(spec, str) else spec
    encoder = ViewEncoder(vae)

    def reencode(item: Item) -> Tensor:
        record = next(iter(records.read(item.position, item.position + 1)), None)
        if record is None:
            raise UserError(f"{item} is gone: {records.spec} has no record {item.position}; restore the data set.")
        picture = prepare(record, transform)
        if picture.id != item.id or picture.sha256 != item.sha256:
            raise UserError(
                f"{item} has changed: record {item.position} of {records.spec} is {picture.id} with sha256 "
                f"{picture.sha256[:12]}, it was {item.id} with {item.sha256[:12]}; restore the picture."
            )
        if isinstance(picture, Unusable):
            raise UserError(f"{item} is {picture.reason}: {picture.detail.rstrip('.')}; it had a latent before.")
        view = next(view for view in picture.views if (view.index, view.flipped) == (item.view, item.flipped))
        with threads_of_torch(description.numerics.threads_per_picture):
            (moments,) = encoder([view.x])
        if moments is None:
            raise UserError(f"{item} encodes to NaN or infinity; it had a finite latent before, check the VAE.")
        return moments

    return reencode


def _share(records: Records, store: LatentStore, processes: Processes) -> Share | StreamShare:
    """What this process does; agreed upon before anybody begins."""
    if records.num_records is None:
        processes.gather(None)
        return StreamShare(records, store, processes)
    shards = processes.from_first(store.unfinished(records.num_records))
    # A run of neighbours each: they are read in one pass.
    first, end = (len(shards) * rank // processes.count for rank in (processes.rank, processes.rank + 1))
    return Share(records, shards[first:end], store.description.shard_items)


def _dtype_of(vae: AutoencoderKL) -> StoreDtype:
    return cast("StoreDtype", str(vae.dtype).removeprefix("torch."))


def _reasons(store: LatentStore, manifest: Manifest) -> dict[str, int]:
    """Rejected records by reason, the most frequent first."""
    rejects = [reject for record in manifest.shards for reject in read_record(store.folder, record.shard)[1]]
    return dict(Counter(reject.reason for reject in rejects).most_common())
