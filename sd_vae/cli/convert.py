"""`sd-vae convert`: rewrite a checkpoint in another layout, verified by loading it back."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from sd_vae.cli import console
from sd_vae.cli.probing import probe_pictures, probe_progress
from sd_vae.errors import UserError

if TYPE_CHECKING:
    from sd_vae.autoencoder import AutoencoderKL
    from sd_vae.half_precision import Rescaling

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
    fp16_safe: bool = False
    """Scale down, by powers of two, what overflows float16, where a GroupNorm that follows does not see the scale. The
    outcome stays within 1e-4 of its largest magnitude, or nothing is written. Needs --probe."""
    probe: str | None = None
    """Photos that show what overflows: a folder, a parquet file or folder, or hf://DATASET[:SPLIT]."""
    probe_pictures: int = 8
    """How many of them, evenly spread."""
    probe_size: int = 512
    """Longest side in pixels; each photo's middle is taken up to this, in multiples of the VAE's factor."""
    overwrite: bool = False
    """Replace what is there."""
    json: bool = False
    """Print the result as one JSON object."""


def run(argv: list[str]) -> None:
    """Run the command.

    Args:
        argv: Its arguments.

    Raises:
        UserError: As `sd_vae.checkpoints.convert_vae` and `sd_vae.half_precision.rescale_for_float16`; or --fp16-safe
            and --probe are not together.
    """
    args = console.parse(Args, argv, command="convert")
    if args.fp16_safe != (args.probe is not None):
        given, lacking = ("--fp16-safe", "--probe DATA") if args.fp16_safe else ("--probe", "--fp16-safe")
        raise UserError(f"{given} needs {lacking}, which is not given; add it, or leave {given} out.")

    from sd_vae.checkpoints import convert_vae

    rescaler = _Rescaler(args)
    done = convert_vae(
        args.src,
        args.dst,
        args.layout,
        args.dtype,
        family=args.family,
        config=args.config,
        overwrite=args.overwrite,
        prepare=rescaler if args.fp16_safe else None,
    )
    rescaling = rescaler.rescaling
    if args.json:
        console.print_json(asdict(done) | ({"rescaling": asdict(rescaling)} if rescaling else {}))
        return
    subject = "latents" if rescaling else "weights"
    if done.is_folded:
        change = f"weights folded to the scale of {done.family}"
    elif done.family:
        change = f"{subject} unchanged, their scale is that of {done.family}"
    else:
        change = f"{subject} unchanged"
    reference = "the rescaled source's" if rescaling else "the source's"
    outcome = f"{done.num_tensors} tensors read back equal, outputs within {done.max_deviation:.1e} of {reference}"
    fields = {
        "written": done.path,
        "layout": done.layout,
        "dtype": done.dtype,
        "scale": f"{done.scaling_factor:g}, shift {done.shift_factor or 0:g} ({change})",
        "verified": outcome,
    }
    console.print_fields(fields | (_rescaling_fields(rescaling) if rescaling else {}))


class _Rescaler:
    """Rescales a VAE for float16 and keeps what was done."""

    def __init__(self, args: Args) -> None:
        self._args = args
        self.rescaling: Rescaling | None = None

    def __call__(self, vae: AutoencoderKL) -> AutoencoderKL:
        from sd_vae.half_precision import rescale_for_float16

        assert self._args.probe is not None
        pictures = probe_pictures(
            self._args.probe, vae.factor, limit=self._args.probe_pictures, size=self._args.probe_size
        )
        with probe_progress("probing, predicting, measuring") as progress:
            rescaled, self.rescaling = rescale_for_float16(vae, pictures, progress=progress)
        return rescaled


def _rescaling_fields(rescaling: Rescaling) -> dict[str, str]:
    """What the rescaling did, as text by name."""
    before, after = rescaling.before.overflowing, rescaling.after.layers[0]
    if not rescaling.scales:
        done = "nothing: no layer overflows float16 on these pictures"
    else:
        streams = ", ".join(f"{name} by 2^{math.log2(scale):.0f}" for name, scale in rescaling.scales.items())
        done = f"{len(rescaling.scales)} streams in {rescaling.num_layers} layers: {streams}"
    predicted, measured = f"{rescaling.predicted_change:.1e}", f"{rescaling.measured_change:.1e}"
    return {
        "rescaled": done,
        "float16": f"{len(before)} layers overflowed, now none; the largest is {after.name}, {after.peak:.3g}, with a "
        f"margin of {after.margin:.1f}",
        "change": f"predicted {predicted}, measured {measured} of the largest magnitude in mean, logvar and decode",
    }
