"""`sd-vae inspect`: what is in a checkpoint, and what is wrong with it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import tyro

from sd_vae.cli import console

if TYPE_CHECKING:
    from sd_vae.checkpoints import Inspection

__all__ = ["Args", "run"]

_SHOWN = 8  # names of a kind; --json has them all


@dataclass(frozen=True)
class Args:
    """Tell what is in a checkpoint: layout, config, dtype, parameters, scale, metadata, and what is wrong with it."""

    path: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="VAE")]
    """Checkpoint: a folder, a pipeline folder, a file (full checkpoints too) or a hub id."""
    config: str | None = None
    """Architecture where nothing beside the file tells: a config.json, its folder, or a preset."""
    json: bool = False
    """Print the result as one JSON object."""


def run(argv: list[str]) -> None:
    """Run the command.

    Args:
        argv: Its arguments.

    Raises:
        UserError: As `sd_vae.checkpoints.inspect_checkpoint`.
    """
    args = console.parse(Args, argv, command="inspect")

    from sd_vae.checkpoints import inspect_checkpoint

    found = inspect_checkpoint(args.path, args.config)
    if args.json:
        console.print_json(found)
    else:
        console.print_fields(_fields(found))


def _fields(found: "Inspection") -> dict[str, str]:
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
