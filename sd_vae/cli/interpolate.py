"""`sd-vae interpolate`: from one picture to the next through the latent space, as a strip, a grid or a film."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

import sd_vae
from sd_vae.cli import console
from sd_vae.cli.default_vae import holds_pictures, parse_with_vae
from sd_vae.cli.tools import (
    DistanceNet,
    best_device,
    load_distance,
    note_other_encoder,
    picture_progress,
    require_at_least,
)
from sd_vae.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from sd_vae.autoencoder import AutoencoderKL
    from sd_vae.latents.interpolate import Interpolation
    from sd_vae.losses import Perceptual

__all__ = ["Args", "run"]

MAX_SIDE = 512
"""Side of the squares that pictures are brought to where nothing else is asked for."""


@dataclass(frozen=True, kw_only=True)
class Args:
    """Walk from picture to picture through the latent space, and say how far apart the steps look.

    Two pictures or more are a line; four with --grid span a square; one with --direction is moved along an attribute.
    In an autoencoder that is sharp the way between two photos is a cross-fade of their parts, not a metamorphosis.
    """

    vae: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="VAE")]
    """Folder, file or hub id of the VAE, or the name of one that ships; left out, `mini`."""
    ends: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="PICTURE...")]
    """Pictures, or STORE#N for item N of a latent store."""
    out: Path
    """File to write: .png or .jpg is a sheet, .gif, .webp or .mp4 a film that runs there and back."""
    steps: int = 12
    """Pictures from one end to the next, both counted; with --grid, along each side."""
    path: Literal["lerp", "slerp", "geodesic"] = "lerp"
    """lerp: the straight line; slerp: along the sphere; geodesic: the straight line, its steps moved until each looks
    as far from the last as every other."""
    grid: bool = False
    """Span a square between four pictures: top left, top right, bottom left, bottom right."""
    direction: Path | None = None
    """Move one picture along this attribute, of sd-vae latents direction."""
    strength: float = 1.0
    """How far to either side, in differences between the two groups that gave the direction."""
    net: DistanceNet | None = None
    """What measures the distance of neighbours: LPIPS on alex, squeeze or vgg, ms_dssim, or none. By default alex, and
    none where its weights are missing."""
    weights: str | None = None
    """File with the torchvision weights of that network; by default the torch hub cache."""
    size: int | None = None
    """Bring pictures to squares of this side; by default the largest that all have, at most 512."""
    native: bool = False
    """Keep the pictures' size, cut to multiples of the VAE's factor; all must have the same."""
    side: int = 256
    """Largest side of a picture on a sheet, in pixels."""
    fps: int = 12
    """Pictures a second in a film."""
    config: str | None = None
    """Architecture of the VAE where nothing beside it tells: a config.json, its folder, or a preset."""
    device: str = "auto"
    """Where to compute: cpu, cuda, cuda:1, mps; auto takes an accelerator where there is one."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """What to compute in."""
    overwrite: bool = False
    """Replace the file that is there."""
    json: bool = False
    """Print the result as one JSON object."""


def run(argv: list[str]) -> None:
    """Run the command.

    Args:
        argv: Its arguments.

    Raises:
        UserError: Arguments that contradict each other, or as `sd_vae.latents.interpolate.interpolate`, `load_vae`,
            `load_direction`, `open_image` and `save_film`.
    """
    args = parse_with_vae(Args, argv, command="interpolate", lacks_vae=_lacks_vae)
    _require_sense(args)

    from sd_vae.files import require_writable_target

    require_writable_target(args.out, overwrite=args.overwrite)
    device = best_device(args.device)
    distance = _distance(args, device)
    vae = sd_vae.load_vae(args.vae, args.config, dtype=args.dtype, device=device)
    ends = _read_ends(args, vae)
    result = (_grid if args.grid else _line)(args, vae, ends, distance)
    if args.json:
        console.print_json(result)
    console.say(f"written: {args.out}")


def _lacks_vae(args: Args) -> bool:
    from sd_vae.latents.stored_items import is_stored_item

    return is_stored_item(args.vae) or holds_pictures(Path(args.vae))


def _require_sense(args: Args) -> None:
    """Check what follows from the arguments alone.

    Raises:
        UserError: They contradict each other.
    """
    from sd_vae.animation import FILM_SUFFIXES, MAX_FPS

    require_at_least(args, steps=2, side=1, fps=1)
    if args.fps > MAX_FPS:
        raise UserError(f"--fps is {args.fps}, it must be at most {MAX_FPS}.")
    if not math.isfinite(args.strength):
        raise UserError(f"--strength is {args.strength}, it must be a finite number.")
    kinds = (".png", ".jpg", ".jpeg", *FILM_SUFFIXES)
    if args.out.suffix.lower() not in kinds:
        raise UserError(f"--out is {args.out}, which ends like none of: {', '.join(kinds)}.")
    if args.native and args.size is not None:
        raise UserError(f"--native keeps the pictures' size and --size is {args.size}; leave one of them out.")
    if args.grid and args.direction is not None:
        raise UserError("--grid goes between four pictures and --direction moves one; leave one of them out.")
    if args.grid and args.path == "geodesic":
        raise UserError("--path is geodesic, which spaces the steps of a line, and a --grid is none; choose lerp.")
    if args.grid and len(args.ends) != 4:
        raise UserError(f"--grid has 4 corners and {len(args.ends)} pictures are given; give 4.")
    if args.direction is not None and len(args.ends) != 1:
        raise UserError(f"--direction moves one picture and {len(args.ends)} are given; give one.")
    if args.direction is None and len(args.ends) < 2:
        raise UserError("one picture is given, and a line has two ends; give another, or a --direction.")
    if args.path == "geodesic" and args.net == "none":
        raise UserError("--path is geodesic and --net none, which measures nothing; choose alex or ms_dssim.")


def _distance(args: Args, device: str) -> Perceptual | None:
    """What measures; where nobody asked for it and its weights are missing, nothing, said aloud."""
    if args.net is not None or args.weights is not None or args.path == "geodesic":
        return load_distance(args.net or "alex", args.weights, device)
    try:
        return load_distance("alex", None, device)
    except UserError as error:
        console.say(f"note: distances are left out. {error}")
        return None


def _read_ends(args: Args, vae: AutoencoderKL) -> list[Tensor]:
    """Raw latents of what is named: modes of pictures, and what a store holds."""
    import torch

    from sd_vae.data.transforms import center_crop
    from sd_vae.images import open_image, to_tensor
    from sd_vae.latents.stored_items import is_stored_item, read_stored_item

    latents: dict[str, Tensor] = {}
    for name in filter(is_stored_item, args.ends):
        latents[name], encoder = read_stored_item(name, vae)
        note_other_encoder(name, encoder, vae, args.vae)
    images = {name: open_image(Path(name)) for name in args.ends if name not in latents}
    size = args.size
    if size is None and not args.native and images:
        sides = [max(z.shape[-2:]) * vae.factor for z in latents.values()]
        largest = sides[0] if sides else min(MAX_SIDE, *(min(image.size) for image in images.values()))
        size = largest // vae.factor * vae.factor
    if size is not None and (size < 1 or size % vae.factor):
        raise UserError(f"--size is {size}, it must be a multiple of the VAE's factor {vae.factor}.")
    for name, image in images.items():
        if size is not None:
            x = center_crop(image, size)[None]
        else:
            height, width = (side // vae.factor * vae.factor for side in (image.height, image.width))
            top, left = (image.height - height) // 2, (image.width - width) // 2
            x = to_tensor(image.crop((left, top, left + width, top + height)))
        with torch.no_grad():
            latents[name] = vae.encode(x.to(vae.device, vae.dtype)).latent_dist.mode()[0].float().cpu()
    if args.direction is not None:
        from sd_vae.latents.direction import load_direction

        (z,) = latents.values()
        move = load_direction(args.direction)
        note_other_encoder(str(args.direction), move.encoder, vae, args.vae)
        return [move(z, -args.strength), move(z, args.strength)]
    return [latents[name] for name in args.ends]


def _line(args: Args, vae: AutoencoderKL, ends: list[Tensor], distance: Perceptual | None) -> dict[str, Any]:
    from sd_vae.latents.interpolate import interpolate

    with picture_progress("interpolating") as progress:
        found = interpolate(vae, ends, steps=args.steps, path=args.path, distance=distance, progress=progress)
    rows = [[leg * (args.steps - 1) + step for step in range(args.steps)] for leg in range(len(ends) - 1)]
    _write(args, found.x, rows)
    result = _result(args, distance) | {
        "positions": found.positions,
        "distances": found.distances,
        "unevenness": found.unevenness,
    }
    if args.direction is not None:
        result["strengths"] = [(2.0 * place - 1.0) * args.strength for place in found.positions]
    if not args.json:
        _print_line(found, result)
    return result


def _print_line(found: Interpolation, result: dict[str, Any]) -> None:
    places = result.get("strengths", found.positions)
    heading = "strength" if "strengths" in result else "position"
    if found.distances is None:
        console.print_table("steps", ["step", heading], [[str(n), f"{place:.3f}"] for n, place in enumerate(places)])
        return
    console.print_table(
        "steps",
        ["step", heading, f"{result['distance']} to the one before"],
        [
            [str(number), f"{place:.3f}", "" if number == 0 else f"{found.distances[number - 1]:.4f}"]
            for number, place in enumerate(places)
        ],
    )
    mean = sum(found.distances) / len(found.distances)
    print(f"mean {mean:.4f}, largest minus smallest {found.unevenness:.0%} of it")


def _grid(args: Args, vae: AutoencoderKL, corners: list[Tensor], distance: Perceptual | None) -> dict[str, Any]:
    from sd_vae.latents.interpolate import grid_distances, interpolate_grid

    with picture_progress("interpolating") as progress:
        x = interpolate_grid(vae, corners, steps=args.steps, path=args.path, progress=progress)
    _write(
        args, x.flatten(0, 1), [[row * args.steps + step for step in range(args.steps)] for row in range(args.steps)]
    )
    result = _result(args, distance)
    if distance is None:
        return result
    right, below = grid_distances(x, distance, vae.device)
    if not args.json:
        console.print_table(
            "distances of neighbours, means",
            ["row", f"{result['distance']} to the right", f"{result['distance']} to below"],
            [
                [str(row), f"{right[row]:.4f}", f"{below[row]:.4f}" if row < len(below) else ""]
                for row in range(args.steps)
            ],
        )
    return result | {"distances_right": right, "distances_below": below}


def _result(args: Args, distance: Perceptual | None) -> dict[str, Any]:
    return {
        "out": str(args.out),
        "vae": args.vae,
        "ends": list(args.ends),
        "steps": args.steps,
        "path": args.path,
        "distance": None if distance is None else distance.name,
    }


def _write(args: Args, x: Tensor, rows: list[list[int]]) -> None:
    """A sheet with the given pictures in each row, or a film of all."""
    from sd_vae.animation import FILM_SUFFIXES, save_film
    from sd_vae.files import atomic_file
    from sd_vae.images import to_pil
    from sd_vae.latents.preview import contact_sheet

    pictures = [to_pil(one) for one in x]
    kind = args.out.suffix.lower()
    if kind in FILM_SUFFIXES:
        save_film(args.out, pictures, fps=args.fps)
        return
    shown = [pictures[number] for row in rows for number in row]
    sheet = contact_sheet(shown, columns=len(rows[0]), side=args.side)
    with atomic_file(args.out) as temporary:
        sheet.save(temporary, format="PNG" if kind == ".png" else "JPEG", quality=90)
