"""What equivariance and the tiling term change: short runs from one checkpoint, without either, and with each.

    python -m benchmarks.regularisers VAE --train ../mini_data/train --photos ../mini_data/holdout \
        --work ../regularisers --steps 300 --keep

Equivariance errors are those of `sd_vae.losses.equivariance_errors`: three quarter turns, the scales 1/4, 1/2 and 3/4,
of central 256x256 pixels. The tile error is that of diffusers' own tiling, blended tiles of 128x128 pixels, against
diffusers' decoding of the whole: root mean square in levels of 255. Everything is through the posterior's mode.
"""

import argparse
import dataclasses
import sys
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.figures import Figure, all_met, to_markdown
from benchmarks.mini_curve import central_square, measure
from benchmarks.short_runs import add_arguments, base_config, finish, keep_table, kept
from sd_vae.autoencoder import AutoencoderKL
from sd_vae.checkpoints import load_vae
from sd_vae.data import open_source
from sd_vae.images import to_tensor
from sd_vae.losses import EquivarianceConfig, TilingConfig, equivariance_errors
from training import TrainConfig

__all__ = ["RUNS", "main", "run_config", "tile_error", "to_details", "to_figures"]

RUNS = ("plain", "equivariance", "tiling")
ERRORS = {"equivariance": ("latent_turn", "latent_scale", "picture_turn", "picture_scale"), "tiling": ("tile_error",)}
"""What a run is there to lower."""
SIZE, TILE = 256, 128
Values = dict[str, float]


def run_config(args: argparse.Namespace, name: str) -> TrainConfig:
    """Return a run: L2 and KL, and with one of the two."""
    config = base_config(args, name, seed=0)
    loss = config.loss
    if name == "equivariance":
        loss = dataclasses.replace(loss, equivariance=EquivarianceConfig(probability=0.5, min_scale=0.5))
    if name == "tiling":
        loss = dataclasses.replace(loss, tiling=TilingConfig(weight=args.tiling_weight, margin=1))
    return dataclasses.replace(config, loss=loss)


@torch.no_grad()
def tile_error(vae: AutoencoderKL, photos: Tensor, tile: int = TILE) -> float:
    """Return how far diffusers' tiled decoding is from its decoding of the whole, a root mean square in levels of 255.

    Args:
        vae: Model.
        photos: (N, 3, H, W) in [-1, 1].
        tile: Side of the tiles in pixels; they overlap by a quarter and are blended there.
    """
    theirs = vae.to_diffusers()
    theirs.tile_sample_min_size, theirs.tile_latent_min_size = tile, tile // vae.factor
    squares = []
    for x in photos.split(1):
        z = vae.encode(x).latent_dist.mode()
        theirs.disable_tiling()
        whole = theirs.decode(z).sample.clamp(-1, 1)
        theirs.enable_tiling()
        squares.append((theirs.decode(z).sample.clamp(-1, 1) - whole).square().mean())
    return float(torch.stack(squares).mean().sqrt()) * 127.5


def to_figures(results: dict[str, Values]) -> list[Figure]:
    """Return what each term gains over the run without it; larger is better."""
    figures = []
    for name, errors in ERRORS.items():
        for error in errors:
            plain, trained = results["plain"][error], results[name][error]
            note = f"{results['start'][error]:.3f} at the start, {plain:.3f} without, {trained:.3f} with"
            figures.append(Figure(name=f"{error} without {name} over with", value=plain / trained, must=1.0, note=note))
    return figures


def to_details(results: dict[str, Values]) -> str:
    """Return the table of what every run came to."""
    names = list(results["start"])
    lines = [f"| run | {' | '.join(names)} |", "|" + "---|" * (len(names) + 1)]
    lines += [f"| {run} | {' | '.join(f'{values[name]:.4g}' for name in names)} |" for run, values in results.items()]
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    """Train, measure, print, keep the tables where asked; 1 where a term gains nothing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--tiling-weight", type=float, default=1.0)
    parser.add_argument("--num-photos", type=int, default=16, help="the first so many")
    args = parser.parse_args(argv)
    folders = {name: finish(run_config(args, name)) for name in RUNS}
    source = open_source(args.photos)
    pictures = [central_square(source.load(index), SIZE) for index in range(min(args.num_photos, len(source)))]
    photos = torch.cat([to_tensor(picture) for picture in pictures])

    def judged(vae: str | Path, name: str) -> Values:
        def everything() -> Values:
            loaded = load_vae(vae)
            errors = equivariance_errors(loaded, photos, torch.device("cpu"))
            return measure(loaded, pictures, None) | errors | {"tile_error": tile_error(loaded, photos)}

        return kept(args.work / f"{name}.{Path(args.photos).name}.json", everything)

    results = {"start": judged(args.vae, "start")}
    results |= {name: judged(folder / "vae", name) for name, folder in folders.items()}
    figures = to_figures(results)
    table = f"{to_markdown(figures)}\n\n{to_details(results)}"
    print(table)
    if args.keep:
        keep_table("regularisers", "Regularisers of the latent", table, argv)
    return int(all_met(figures) is False)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
