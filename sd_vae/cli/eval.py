"""`sd-vae eval`: how good is this VAE, and is it better than that one, by a named protocol, as a report."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

import sd_vae
from sd_vae.cli.console import print_json, print_table, say
from sd_vae.cli.default_vae import parse_with_vae
from sd_vae.errors import UserError

if TYPE_CHECKING:
    from eval.protocols import Protocol
    from eval.results import Evaluation
    from sd_vae.latents.processes import Processes

__all__ = ["Args", "run"]


@dataclass(frozen=True, kw_only=True)
class Args:
    """Measure how well a VAE reconstructs photos, beside others, and write report.html, report.json, per_image.csv.

    Several processes share the photos: `torchrun --nproc_per_node N -m eval ...` on CPUs, `accelerate launch -m eval
    ...` on GPUs. The numbers do not depend on how many.
    """

    vae: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="VAE")]
    """Folder, file or hub id of a VAE, in any layout; NAME=VAE says what to call it."""
    data: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DATA")]
    """Folder of pictures, parquet file or folder, WebDataset tars, or hf://DATASET[:SPLIT]."""
    out: Path
    """Folder to write."""
    baseline: tuple[str, ...] = ()
    """More VAEs to stand beside: any layout, or any image autoencoder of diffusers; NAME=VAE says what to call one."""
    codecs: tuple[Literal["JPEG", "WebP"], ...] = ("JPEG", "WebP")
    """Codecs to stand beside, at as many bits as VAE's latents take; give none to leave them out."""
    box_blocks: tuple[int, ...] = ()
    """Sides in pixels of block averages to stand beside."""
    config: str | None = None
    """Preset (sd1, sdxl, sd3, flux, mini), config.json or its folder, where VAE brings none."""

    protocol: str = "native"
    """How it is measured: native, coco5k-256, imagenet50k-256, sd-512 or pixels; see docs/evaluation.md."""
    metrics: tuple[str, ...] | None = None
    """What to measure, instead of what the protocol names."""
    size: int | None = None
    """Another size than the protocol's; the numbers are then not the protocol's, and the report says so."""
    weights: tuple[str, ...] = ()
    """Files of metric networks: vgg=FILE, alex=FILE, squeeze=FILE, inception=FILE; else the torch hub cache."""

    round_trips: int = 0
    """Send each VAE's output through it again, this many trips in all: what repeated editing costs."""
    sizes: tuple[int, ...] = ()
    """Evaluate central squares of these sides in pixels too: quality over resolution."""
    dtype_check: bool = False
    """Try VAE in bfloat16 and float16 beside float32."""
    tiling_check: bool = False
    """Try VAE with tiling beside without."""
    rates: bool = False
    """Draw the codecs over the rate too, in five qualities, beside VAEs as points."""
    worst: int = 6
    """How many of the worst photos to show."""
    strict: bool = False
    """Stop at the first photo that cannot be read, instead of listing it in the report."""
    device: str = "auto"
    """Where to compute: cpu, cuda, cuda:1, mps; auto takes an accelerator where there is one, one a process."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """What to compute in."""
    overwrite: bool = False
    """Replace the folder that is there."""
    json: bool = False
    """Print the report as one JSON object on standard output."""


def run(argv: list[str]) -> None:
    """Evaluate, and write the report.

    Raises:
        UserError: Whatever is wrong with the arguments, the VAEs or the data.
    """
    args = parse_with_vae(Args, argv, command="eval")

    from sd_vae.latents.processes import joined_processes

    with joined_processes() as processes:
        _evaluate(args, processes)


def _evaluate(args: Args, processes: Processes) -> None:
    from eval import evaluate
    from eval.deeper import Deeper
    from eval.protocols import get_protocol
    from eval.report import OWN, write_report
    from sd_vae.files import atomic_folder, read_json, require_own_folder

    protocol = get_protocol(args.protocol, size=args.size, metrics=args.metrics)
    weights = _weights(args.weights)
    require_own_folder(args.out, OWN, kind="an evaluation", overwrite=args.overwrite)
    device = _device(args.device, processes)
    vaes = _load(args, device)
    if processes.is_first:
        many = f"{processes.count} process{'es' if processes.count > 1 else ''}"
        say(f"evaluating {args.data} by {protocol.name} in {many} on {device.partition(':')[0]}.")
    with _progress(processes) as progress:
        evaluation = evaluate(
            vaes,
            args.data,
            protocol=protocol,
            weights=weights,
            codecs=args.codecs,
            box_blocks=args.box_blocks,
            deeper=Deeper(
                round_trips=args.round_trips,
                sizes=args.sizes,
                dtypes=("bfloat16", "float16") if args.dtype_check else (),
                tiling=args.tiling_check,
                rates=args.codecs if args.rates else (),
            ),
            strict=args.strict,
            worst=args.worst,
            progress=progress,
            processes=processes,
        )
    if not processes.is_first:
        return
    with atomic_folder(args.out, overwrite=args.overwrite) as folder:
        write_report(
            folder,
            evaluation,
            title=f"{next(iter(vaes))}: reconstruction",
            summary=_summary(evaluation, protocol),
            provenance=_provenance(args, device),
            worst=args.worst,
        )
    if args.json:
        print_json(read_json(args.out / "report.json"))
    else:
        _print_numbers(evaluation)
    for check in evaluation.checks:
        facts = "; ".join(f"{name}: {value}" for name, value in check.facts.items())
        say(f"{'passed' if check.passed else 'NOT PASSED'}: {check.row}, {check.title}: {facts}.")
    for reject in evaluation.rejects[:3]:
        say(f"left out: {reject.reason}")
    if evaluation.rejects:
        say(f"{len(evaluation.rejects)} photos could not be evaluated and are listed in the report.")
    speed = next(iter(evaluation.speed.values()))
    say(f"{evaluation.rows[0].name}: {speed.photos_per_s:.2f} photos/s, {speed.megapixels_per_s:.2f} megapixels/s.")
    say(f"report: {args.out / 'report.html'}")


def _load(args: Args, device: str) -> dict[str, Any]:
    """The VAEs by name, on their device."""
    from eval.models import display_name, load_autoencoder

    given = [_named(text) for text in (args.vae, *args.baseline)]
    vaes: dict[str, Any] = {}
    for index, (name, path) in enumerate(given):
        vae = load_autoencoder(path, args.config if index == 0 else None, dtype=args.dtype, device=device)
        name = name or display_name(path)
        if name in vaes:
            raise UserError(f"two VAEs are called {name!r}; tell them apart by NAME=VAE, such as other={path}.")
        vaes[name] = vae
    return vaes


def _named(text: str) -> tuple[str | None, str]:
    """The name and the place in NAME=VAE; a path that exists is one as it stands."""
    name, equals, place = text.partition("=")
    return (name, place) if equals and name and not Path(text).exists() else (None, text)


def _weights(given: Sequence[str]) -> dict[str, str]:
    """Network to file."""
    found: dict[str, str] = {}
    for text in given:
        net, equals, file = text.partition("=")
        if not equals:
            raise UserError(f"--weights is {text!r}, it must be NETWORK=FILE, such as alex={text}.")
        if net in found:
            raise UserError(f"--weights names {net} twice, {found[net]} and {file}; give it once.")
        found[net] = file
    return found


def _device(name: str, processes: Processes) -> str:
    """The device of this process."""
    import torch

    if name != "auto":
        return name
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return "cpu"
    return f"cuda:{processes.local_rank}" if accelerator.type == "cuda" else accelerator.type


def _summary(evaluation: Evaluation, protocol: Protocol) -> list[str]:
    """The result in a few sentences."""
    first = evaluation.rows[0]
    numbers = ", ".join(
        f"{metric.label} {metric.format(first.means[name])}{' ' + metric.unit if metric.unit else ''}"
        for name, metric in evaluation.metrics.items()
        if metric.higher_is_better is not None
    )
    lines = [f"{first.name} on {len(evaluation.photos)} photos by {protocol.name}: {numbers}."]
    for other in evaluation.rows[1:]:
        verdicts = {
            verdict: [evaluation.metrics[one.metric].label for one in evaluation.comparisons
                      if one.against == other.name and one.verdict == verdict]
            for verdict in ("better", "worse", "not distinguishable")
        }  # fmt: skip
        told = "; ".join(f"{verdict} in {', '.join(labels)}" for verdict, labels in verdicts.items() if labels)
        lines.append(f"Against {other.name}: {told}.")
    return lines


def _provenance(args: Args, device: str) -> dict[str, str]:
    """How the report came about, without anything that differs between two runs."""
    import platform

    import diffusers
    import torch

    return {
        "VAE": args.vae,
        **({"Baselines": ", ".join(args.baseline)} if args.baseline else {}),
        "Data": args.data,
        "Computed in": f"{args.dtype} on {device.partition(':')[0]}",
        "Versions": f"sd-vae {sd_vae.__version__}, torch {torch.__version__}, diffusers {diffusers.__version__}, "
        f"Python {platform.python_version()}",
    }


@contextmanager
def _progress(processes: Processes) -> Iterator[Callable[[int, int], None]]:
    """A bar on the first process's standard error, for its share, with rate and time left."""
    from tqdm import tqdm

    label = f"evaluating, process 1 of {processes.count}" if processes.count > 1 else "evaluating"
    with tqdm(desc=label, unit="photo", file=sys.stderr, disable=not processes.is_first, smoothing=0.05) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield show


def _print_numbers(evaluation: Evaluation) -> None:
    """The means on standard output, a line a metric: there are more of them than a terminal has columns."""
    from eval.metrics import METRICS

    pooled = dict.fromkeys(name for row in evaluation.rows for name in row.pooled)
    table = {**evaluation.metrics, **{name: METRICS[name] for name in pooled}}
    numbers = [{**row.means, **row.pooled} for row in evaluation.rows]
    lines = [[metric.heading, *(metric.format(row[name]) for row in numbers)] for name, metric in table.items()]
    print_table("means over photos", ["", *(row.name for row in evaluation.rows)], lines)
