"""`sd-vae encode`: a data set of pictures to a store of latents, on one CPU, several GPUs or a cluster."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from sd_vae.cli import console
from sd_vae.cli.default_vae import parse_with_vae

if TYPE_CHECKING:
    from sd_vae.latents.encode import EncodeConfig, Encoded, Progress, Step
    from sd_vae.latents.processes import Processes

__all__ = ["Args", "run"]


@dataclass(frozen=True, kw_only=True)
class Args:
    """Turn a data set of pictures into latents; the same command goes on where an earlier one was stopped.

    Several processes share the work: `torchrun --nproc_per_node N -m sd_vae encode ...` on CPUs,
    `accelerate launch -m sd_vae encode ...` on GPUs. The bytes do not depend on their number.
    """

    vae: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="VAE")]
    """Folder, file or hub id of a VAE, in any layout, or the name of one that ships; left out, `mini`."""
    data: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DATA")]
    """Folder of pictures, parquet file or folder, WebDataset tars, or hf://DATASET[:SPLIT]."""
    out: Path
    """Folder of the store, new or to go on with."""
    config: str | None = None
    """Preset (sd1, sdxl, sd3, flux, mini), config.json or its folder, where the VAE brings none."""

    size: int | None = None
    """Side of the square that is cut from each picture, centred, after its shorter side was resized to it."""
    random_crops: int = 0
    """Random squares of --size a picture, instead of the centred one."""
    native: bool = False
    """Keep each picture's size, cut to multiples of the VAE's factor; instead of --size."""
    buckets: bool = False
    """Resize to the nearest of many shapes, none larger in area than a square of --size."""
    flip: bool = False
    """Store the mirrored picture's latent too."""
    allow_upscale: bool = False
    """Enlarge pictures that are smaller than the crop, instead of rejecting them."""
    draft: bool = False
    """Decode large JPEG files at a fraction of their size, at least twice what is needed: faster, other pixels."""

    content: Literal["moments", "mode", "sample"] = "moments"
    """What is stored: mean and log-variance, the mean alone, or one draw."""
    dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    """Type of the stored numbers."""
    compute_dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """What the encoder computes in."""
    seed: int = 0
    """Seed of random crops and of draws."""
    shard_items: int = 1024
    """Pictures a shard: what an interruption costs at most, in each process."""
    columns: tuple[str, ...] | None = None
    """Columns to keep, such as caption or label; all that hold plain values by default."""
    image_column: str | None = None
    """Column of a table with the pictures, or kind of file in a tar."""
    streaming: bool = False
    """Read hf://DATASET without downloading it first."""

    strict: bool = False
    """Stop at the first picture that cannot be used, instead of listing it in rejects.jsonl."""
    allow_numeric_drift: bool = False
    """Go on although another CPU, thread count or library version began: the last bits may differ."""
    device: str = "auto"
    """Where to compute: cpu, cuda, cuda:1, mps; auto takes an accelerator where there is one, one a process."""
    engine: Literal["local", "ray"] = "local"
    """local: the processes that were started; ray: a Ray cluster, all of whose nodes see the data and --out."""
    workers: int = 2
    """Processes that read and decode pictures, for each that encodes; 0 for none."""
    parallel: int | None = None
    """Pictures that are encoded at once on the CPU, in each process; by default one a thread (OMP_NUM_THREADS)."""
    threads_per_picture: int = 1
    """Threads that encode one picture on the CPU; part of what fixes the last bits."""
    json: bool = False
    """Print the result as one JSON object on standard output."""


def run(argv: list[str]) -> None:
    """Encode, and say what is in the store.

    Raises:
        UserError: As `sd_vae.latents.encode.encode`, and whatever is wrong with the arguments, the VAE or the data.
        KeyboardInterrupt: Stopped; the finished shards stay.
    """
    args = parse_with_vae(Args, argv, command="encode")

    from sd_vae.latents.processes import joined_processes

    with joined_processes() as processes:
        try:
            _encode(args, processes)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                f"stopped; the finished shards stay in {args.out}, and the same command goes on from there."
            ) from None


def _encode(args: Args, processes: Processes) -> None:
    import sd_vae
    from sd_vae.data import open_records
    from sd_vae.latents.encode import encode

    config = _config(args)
    device = _device(args.device, processes)
    if processes.is_first:
        console.say(_headline(args, config, device, processes))
    records = open_records(args.data, columns=args.columns, image_column=args.image_column, streaming=args.streaming)
    vae = sd_vae.load_vae(args.vae, args.config, dtype=args.compute_dtype, device=device)
    config = replace(config, transform=replace(config.transform, factor=vae.factor))
    started = time.perf_counter()
    with _progress(processes) as progress:
        encoded = encode(vae, records, args.out, config, processes=processes, engine=args.engine, progress=progress)
    if encoded is None:
        return
    summary = _summary(args, encoded, processes, time.perf_counter() - started)
    if args.json:
        console.print_json(summary)
    else:
        console.print_fields(_fields(summary))


def _config(args: Args) -> EncodeConfig:
    """What the arguments say, checked before anything is read; the factor is the VAE's and comes later."""
    from sd_vae.data import PictureTransform
    from sd_vae.latents.encode import EncodeConfig

    transform = PictureTransform(
        size=args.size,
        random_crops=args.random_crops,
        native=args.native,
        buckets=args.buckets,
        flip=args.flip,
        allow_upscale=args.allow_upscale,
        draft=args.draft,
        seed=args.seed if args.random_crops else 0,
        factor=1,
    )
    return EncodeConfig(
        transform=transform,
        content=args.content,
        dtype=args.dtype,
        seed=args.seed,
        shard_items=args.shard_items,
        threads_per_picture=args.threads_per_picture,
        num_parallel=args.parallel,
        num_workers=args.workers,
        strict=args.strict,
        allow_numeric_drift=args.allow_numeric_drift,
    )


def _device(name: str, processes: Processes) -> str:
    """The device of this process."""
    import torch

    if name != "auto":
        return name
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return "cpu"
    return f"cuda:{processes.local_rank}" if accelerator.type == "cuda" else accelerator.type


def _headline(args: Args, config: EncodeConfig, device: str, processes: Processes) -> str:
    if args.engine == "ray":
        return f"encoding {args.data} on Ray, from 1 process."
    many = f"{processes.count} process{'es' if processes.count > 1 else ''}"
    at_once = f", {config.parallel} pictures at once in each" if device == "cpu" else ""
    return f"encoding {args.data} in {many} on {device.partition(':')[0]}{at_once}."


@contextmanager
def _progress(processes: Processes) -> Iterator[Progress]:
    """A bar on the first process's standard error, for its share: pictures/s, time left, rejects so far."""
    from tqdm import tqdm

    label = f"encoding, process 1 of {processes.count}" if processes.count > 1 else "encoding"
    with tqdm(desc=label, unit="picture", file=sys.stderr, disable=not processes.is_first, smoothing=0.05) as bar:

        def show(step: Step) -> None:
            if bar.total != step.num_records:
                bar.total = step.num_records
                bar.refresh()
            if step.num_rejects:
                bar.set_postfix_str(f"{step.num_rejects} rejected", refresh=False)
            bar.update(step.num_done - bar.n)

        yield show


def _summary(args: Args, encoded: Encoded, processes: Processes, seconds: float) -> dict[str, Any]:
    manifest = encoded.manifest
    return {
        "out": str(args.out),
        "num_records": manifest.num_records,
        "num_latents": manifest.num_items,
        "num_flipped": manifest.num_flipped,
        "num_rejects": manifest.num_rejects,
        "rejects": encoded.reasons,
        "sizes": manifest.sizes,
        "columns": list(manifest.columns),
        "content": manifest.description.content,
        "dtype": manifest.description.dtype,
        "rounding": {name: asdict(rounding) for name, rounding in manifest.rounding.items()},
        "num_done": encoded.num_done,
        "num_processes": processes.count,
        "seconds": seconds,
        "pictures_per_s": encoded.num_done / seconds,
    }


def _fields(summary: dict[str, Any]) -> dict[str, str]:
    """The summary as text by name."""
    rejects = ", ".join(f"{count} {reason}" for reason, count in summary["rejects"].items())
    listed = f" ({rejects}), listed in {Path(summary['out']) / 'rejects.jsonl'}" if rejects else ""
    sizes = ", ".join(f"{count} of {size}" for size, count in summary["sizes"].items())
    rounding = ", ".join(f"{name} {value['max']:.1e}" for name, value in summary["rounding"].items())
    return {
        "store": summary["out"],
        "pictures": f"{summary['num_records']}, of which {summary['num_done']} now, {summary['pictures_per_s']:.2f} a "
        f"second",
        "latents": f"{summary['num_latents']} ({sizes})",
        "rejected": f"{summary['num_rejects']}{listed}",
        "stored": f"{summary['content']} in {summary['dtype']}, rounded by at most {rounding}",
    }
