"""`sd-vae convert`: rewrite a checkpoint in another layout, verified by loading it back."""

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from sd_vae.cli import console

__all__ = ["Args", "run"]


@dataclass(frozen=True)
class Args:
    """Rewrite a checkpoint in another layout. The result is loaded back and compared before it gets its name."""

    src: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SRC")]
    """VAE to read: a folder, a pipeline folder, a file (full checkpoints too) or a hub id."""
    dst: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DST")]
    """What to write: a folder for diffusers, a .safetensors file for ldm and webui."""
    layout: Literal["diffusers", "ldm", "webui"]
    """diffusers: folder; ldm: one file with first_stage_model. before each name; webui: one file without."""
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    """Number format of the weights; by default the source's."""
    family: Annotated[Literal["sd1", "sdxl", "sd3", "flux"] | None, tyro.conf.arg(name="for")] = None
    """Model family whose scale the weights are folded to, exactly; a single file of a VAE with a scale of its own needs
    it. sd1 is Stable Diffusion 1 and 2."""
    config: str | None = None
    """Architecture of the source where nothing beside it tells: a config.json, its folder, or a preset."""
    overwrite: bool = False
    """Replace what is there."""
    json: bool = False
    """Print the result as one JSON object."""


def run(argv: list[str]) -> None:
    """Run the command.

    Args:
        argv: Its arguments.

    Raises:
        UserError: As `sd_vae.checkpoints.convert_vae`.
    """
    args = console.parse(Args, argv, command="convert")

    from sd_vae.checkpoints import convert_vae

    done = convert_vae(
        args.src,
        args.dst,
        args.layout,
        args.dtype,
        family=args.family,
        config=args.config,
        overwrite=args.overwrite,
    )
    if args.json:
        console.print_json(done)
        return
    if done.is_folded:
        change = f"weights folded to the scale of {done.family}"
    elif done.family:
        change = f"weights unchanged, their scale is that of {done.family}"
    else:
        change = "weights unchanged"
    outcome = f"{done.num_tensors} tensors read back equal, outputs within {done.max_deviation:.1e} of the source's"
    console.print_fields(
        {
            "written": done.path,
            "layout": done.layout,
            "dtype": done.dtype,
            "scale": f"{done.scaling_factor:g}, shift {done.shift_factor or 0:g} ({change})",
            "verified": outcome,
        }
    )
