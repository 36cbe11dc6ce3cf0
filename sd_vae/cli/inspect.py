"""`sd-vae inspect`: what is in a checkpoint, and what is wrong with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated

import tyro

from sd_vae.cli import console
from sd_vae.cli.default_vae import parse_with_vae
from sd_vae.cli.probing import probe_pictures, probe_progress
from sd_vae.errors import UserError

if TYPE_CHECKING:
    from sd_vae.checkpoints import Inspection
    from sd_vae.half_precision import LayerRange, ProbeReport

__all__ = ["Args", "run"]

_SHOWN = 8  # names of a kind; --json has them all
_LAYERS = 16  # rows of the probe's table, unless more overflow
_LOW_MARGIN = 4.0


@dataclass(frozen=True)
class Args:
    """Tell what is in a checkpoint: layout, config, dtype, parameters, scale, metadata, and what is wrong with it."""

    path: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="VAE")]
    """Checkpoint: a folder, a pipeline folder, a file (full checkpoints too), a hub id, or a name that ships; left out,
    `mini`."""
    config: str | None = None
    """Architecture where nothing beside the file tells: a config.json, its folder, or a preset."""
    probe: str | None = None
    """Run photos through every layer in float32 and show which results float16 would not hold: a folder, a parquet file
    or folder, or hf://DATASET[:SPLIT]."""
    probe_pictures: int = 8
    """How many of them, evenly spread."""
    probe_size: int = 512
    """Longest side in pixels; each photo's middle is taken up to this, in multiples of the VAE's factor."""
    json: bool = False
    """Print the result as one JSON object."""


def run(argv: list[str]) -> None:
    """Run the command.

    Args:
        argv: Its arguments.

    Raises:
        UserError: As `sd_vae.checkpoints.inspect_checkpoint`, with --probe as `load_vae` and
            `sd_vae.half_precision.probe`, and what belongs to --probe was given without it.
    """
    args = parse_with_vae(Args, argv, command="inspect")
    if args.probe is None and (args.probe_pictures, args.probe_size) != (Args.probe_pictures, Args.probe_size):
        raise UserError("--probe-pictures and --probe-size choose from photos that --probe DATA names; give it too.")

    from sd_vae.checkpoints import inspect_checkpoint

    found = inspect_checkpoint(args.path, args.config)
    report = _probe(args) if args.probe is not None else None
    if args.json:
        console.print_json(asdict(found) | ({"probe": asdict(report)} if report else {}))
        return
    console.print_fields(_fields(found))
    if report:
        _print_ranges(report)


def _probe(args: Args) -> ProbeReport:
    """The ranges of the layers over the pictures that the arguments name."""
    from sd_vae import load_vae
    from sd_vae.half_precision import probe

    assert args.probe is not None
    vae = load_vae(args.path, args.config)
    pictures = probe_pictures(args.probe, vae.factor, limit=args.probe_pictures, size=args.probe_size)
    with probe_progress("probing") as progress:
        return probe(vae, pictures, progress=progress)


def _print_ranges(report: ProbeReport) -> None:
    """The table of the layers, worst first, and what follows from it."""
    shown = max(_LAYERS, len(report.overflowing))
    console.print_table(
        f"largest magnitudes in float32 over {report.num_pictures} pictures, worst first; float16 holds 65504",
        ["layer", "largest", "margin", "float16"],  # with the longest name of a layer, 80 columns
        [[layer.name, f"{layer.peak:.3g}", f"{layer.margin:.2g}", _judge(layer)] for layer in report.layers[:shown]],
    )
    rest = len(report.layers) - shown
    if rest > 0:
        print(f"and {rest} layers below these (--json lists all)")
    if report.overflowing:
        print(
            f"float16 overflows in {len(report.overflowing)} layers; sd-vae convert SRC DST --fp16-safe --probe DATA "
            "rescales what can be rescaled, bfloat16 and float32 hold them as they are"
        )
    else:
        print(f"float16 holds all of it on these pictures, with a margin of {report.layers[0].margin:.3g}")


def _judge(layer: LayerRange) -> str:
    return "over" if layer.overflows else "close" if layer.margin < _LOW_MARGIN else "holds"


def _fields(found: Inspection) -> dict[str, str]:
    """What a reader wants to know first, as text by name."""
    config = found.config
    scale = f"{found.scaling_factor:g}, shift {found.shift_factor or 0:g}, family {found.family or 'none'}"
    if config["latents_mean"] is not None:
        scale += f", latents_mean {config['latents_mean']}, latents_std {config['latents_std']}"
    fields = {
        "file": f"{found.path} ({found.format}, {found.file_bytes / 2**20:.1f} MiB)",
        "layout": found.layout + (f", in a checkpoint with {found.num_others} other tensors" * bool(found.num_others)),
        "parameters": f"{found.num_parameters:,}",
        "dtype": ", ".join(f"{dtype} ({count} tensors)" for dtype, count in found.dtypes.items()),
        "architecture": f"factor {found.factor}, {config['latent_channels']} latent channels, "
        f"widths {', '.join(map(str, config['block_out_channels']))}, {config['layers_per_block']} layers a level",
        "scale": scale,
        "config from": found.config_source,
    }
    fields |= {f"metadata {key}": text for key, text in found.metadata.items()}
    problems = {
        "missing": found.missing,
        "unexpected": found.unexpected,
        "misshapen": found.misshapen,
        "not finite": found.damaged,
        "left out": found.ignored,
        "not loaded": found.dropped,
    }
    fields |= {kind: _names(names) for kind, names in problems.items() if names}
    fields["verdict"] = "sound" if found.is_sound else "load_vae refuses it"
    return fields


def _names(names: Sequence[str]) -> str:
    rest = len(names) - _SHOWN
    return f"{len(names)}: {', '.join(names[:_SHOWN])}" + (f" and {rest} more (--json lists all)" if rest > 0 else "")
