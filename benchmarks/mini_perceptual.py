"""What the distilled perceptual network is worth: its ranks, its time, and a VAE that is trained with it.

    python -m benchmarks.mini_perceptual VAE --train ../mini_data/train --photos ../shared/data/kodak24 \
        --holdout ../mini_data/holdout --alex ALEXNET --work ../mini_perceptual --keep

Ranks: agreement with LPIPS-alex on held-out photos, damaged by every kind of distortion and by the VAE. Time: forward
and backward at 256x256 in turns with LPIPS-alex and LPIPS-vgg, in processor seconds; vgg with random weights where its
own are not in the torch hub cache, which changes no time. Training: short runs from the VAE, which differ in their
perceptual term alone, judged on photos by LPIPS-alex. Nothing is chosen by these numbers.
"""

import argparse
import sys
import warnings
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from scipy.stats import spearmanr
from torch import Tensor, nn

from benchmarks.figures import Figure, all_met, to_markdown
from benchmarks.mini_curve import central_square, measure
from benchmarks.mini_distill import rank_correlation
from benchmarks.mini_distortions import DISTORTIONS
from benchmarks.short_runs import add_arguments, base_config, finish, keep_table, kept
from sd_vae.benchmarking.timing import median_ratio, take_turns
from sd_vae.checkpoints import load_vae
from sd_vae.data import DataConfig, open_source, training_loader
from sd_vae.losses import Perceptual, PerceptualConfig
from sd_vae.losses.distilled import Distilled
from sd_vae.losses.perceptual import LPIPS
from training import TrainConfig

__all__ = ["TERMS", "kind_correlations", "measure_all", "parse", "run_config", "time_figures", "training_figures"]

TERMS = ("none", "alex", "distilled")
"""Perceptual terms that the short runs are trained with."""
SIZE = 256
STRENGTHS = (0.1, 0.35, 0.6, 0.85)
"""Of every distortion."""
CLEARLY = 1.2
"""L2 alone has to be so many times worse."""


def run_config(args: argparse.Namespace, term: str) -> TrainConfig:
    """Return the run with one perceptual term."""
    config = base_config(args, term, args.seed)
    if term == "none":
        return config
    backbone = args.alex if term == "alex" else args.distilled
    perceptual = PerceptualConfig(net=term, weight=args.weight, backbone=backbone)  # type: ignore[arg-type]
    return replace(config, loss=replace(config.loss, perceptual=perceptual))


def training_figures(distances: dict[str, float]) -> list[Figure]:
    """Return the bars of training from the LPIPS-alex of every run; larger is better in each."""
    plain, real, ours = (distances[term] for term in TERMS)
    note = f"L2 {plain:.4f}, with LPIPS-alex {real:.4f}, with distilled {ours:.4f}"
    return [
        Figure(name="LPIPS-alex, trained with LPIPS over with distilled", value=real / ours, must=1 / 1.1, note=note),
        Figure(name="LPIPS-alex, L2 alone over with distilled", value=plain / ours, must=CLEARLY, note=note),
    ]


@torch.no_grad()
def kind_correlations(ours: Perceptual, theirs: Perceptual, photos: Sequence[Tensor]) -> dict[str, float]:
    """Return Spearman's rank correlation of two distances for each kind of distortion, in four strengths a photo."""
    found = {}
    for name, distortion in DISTORTIONS.items():
        generator = torch.Generator().manual_seed(2)
        values: list[tuple[float, float]] = []
        for x, other in zip(photos, [*photos[1:], photos[0]], strict=True):
            both = torch.cat([x, other])  # a ghost is another picture of the batch
            damaged = [distortion(both, strength, generator)[:1].clamp(-1, 1) for strength in STRENGTHS]
            values += [(float(ours(recon, x)), float(theirs(recon, x))) for recon in damaged]
        found[name] = float(spearmanr(*zip(*values, strict=True)).statistic)
    return found


def time_figures(ours: Perceptual, alex: Perceptual, rounds: int) -> list[Figure]:
    """Return the bars of time, of one image forward and backward."""
    x, recon = torch.rand(2, 1, 3, SIZE, SIZE) * 2 - 1
    vgg, kind = _vgg()

    def step(net: nn.Module) -> None:
        moved = recon.clone().requires_grad_()
        net(moved, x).sum().backward()

    ways = {"distilled": partial(step, ours), "alex": partial(step, alex), "vgg": partial(step, vgg)}
    for way in ways.values():
        way()
    turns = take_turns(ways, rounds, torch.device("cpu"))
    cpu = {name: [turn.cpu_s for turn in taken] for name, taken in turns.items()}
    least = ", ".join(f"{name} {1e3 * min(times):.0f} ms" for name, times in cpu.items())
    return [
        Figure(
            name="time of LPIPS-alex over distilled",
            value=median_ratio(cpu["alex"], cpu["distilled"]),
            must=1.0,
            note=least,
        ),
        Figure(
            name="time of LPIPS-vgg over distilled",
            value=median_ratio(cpu["vgg"], cpu["distilled"]),
            must=10.0,
            note=f"vgg with {kind} weights",
        ),
    ]


def _vgg() -> tuple[nn.Module, str]:
    """LPIPS-vgg, and what its weights are: random ones serve to measure time, and for nothing else."""
    import lpips

    from sd_vae.losses.backbones import place_in_cache

    if place_in_cache("vgg").is_file():
        return LPIPS("vgg"), "its own"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # it calls torchvision by an old argument
        model: nn.Module = lpips.LPIPS(net="vgg", pretrained=False, pnet_rand=True, verbose=False)
    return model.eval().requires_grad_(False), "random"


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--holdout", required=True, help="photos to be damaged: a folder or parquet files")
    parser.add_argument("--alex", required=True, help="weights of AlexNet, for LPIPS")
    parser.add_argument("--distilled", help="weights of the distilled network; by default those that ship")
    parser.add_argument("--weight", type=float, default=0.1, help="of the perceptual term")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=9, help="for the times")
    return parser.parse_args(argv)


def measure_all(args: argparse.Namespace) -> list[Figure]:
    """Measure, train, and return the bars; runs that are finished in the work folder are not repeated."""
    alex = LPIPS("alex", args.alex)
    ours = Distilled(args.distilled)
    data = DataConfig(train=args.holdout, size=SIZE, crop_scale=(0.8, 1.0), flip=False, num_workers=0)
    source = open_source(args.holdout)
    crops = iter(training_loader(source, data, batch_size=1, seed=0))
    photos = [next(crops).x for _ in range(len(source))]

    overall = rank_correlation(ours.model, alex, photos, [load_vae(args.vae)])
    by_kind = kind_correlations(ours, alex, photos[::3])
    note = ", ".join(f"{name} {value:.3f}" for name, value in by_kind.items())
    figures = [Figure(name="rank correlation with LPIPS-alex", value=overall, must=0.95, note=f"by kind: {note}")]
    figures += time_figures(ours, alex, args.rounds)
    kodak = open_source(args.photos)
    pictures = [central_square(kodak.load(index), SIZE) for index in range(len(kodak))]
    folders = {term: finish(run_config(args, term)) for term in TERMS}
    measured = {
        term: kept(args.work / f"{term}.measured.json", partial(_judged, folder, pictures, alex))
        for term, folder in folders.items()
    }
    return figures + training_figures({term: values["lpips_alex"] for term, values in measured.items()})


def main(argv: list[str]) -> int:
    """Measure, train, print, keep the table where asked; 1 where a must is missed."""
    args = parse(argv)
    figures = measure_all(args)
    table = to_markdown(figures)
    print(table)
    if args.keep:
        keep_table("mini_perceptual", "The distilled perceptual network", table, argv)
    return int(all_met(figures) is False)


def _judged(folder: Path, pictures: Sequence[Image.Image], alex: Perceptual) -> dict[str, float]:
    return measure(load_vae(folder / "vae"), pictures, alex)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
