"""What LPIPS and then a discriminator add to L2: short runs from one L2 checkpoint, in several seeds.

    python -m benchmarks.three_losses VAE --train ../mini_data/train --photos ../shared/data/kodak24 \
        --backbone ALEXNET --work ../three_losses --keep

Quality is that of the central pixels (512x512, or --judge-size) through the posterior's mode, rounded to 8 bits.
Settings are chosen on held-out training photos (`--photos ../mini_data/holdout`), never on Kodak.
"""

import argparse
import dataclasses
import sys
from pathlib import Path

from benchmarks.figures import Figure, all_met, to_markdown
from benchmarks.mini_curve import central_square, measure
from benchmarks.short_runs import add_arguments, base_config, finish, keep_table, kept, last_means
from sd_vae.checkpoints import load_vae
from sd_vae.data import open_source
from sd_vae.losses import AdversarialConfig, LossConfig, PerceptualConfig, build_perceptual
from training import TrainConfig

__all__ = ["LOSSES", "main", "run_config", "to_details", "to_figures"]

LOSSES = ("L2", "L2 + LPIPS", "L2 + LPIPS + GAN")
MAX_LOSS_OF_LPIPS = 1.02
"""Of LPIPS by the discriminator, as a factor: it is there for what LPIPS does not see."""
Values = dict[str, float]


def run_config(args: argparse.Namespace, loss: str, seed: int) -> TrainConfig:
    """Return the run of one loss and seed; the seeds draw other crops, noise and discriminators."""
    config = base_config(args, f"{loss.replace(' + ', '-').lower()}-{seed}", seed)
    terms = config.loss
    if loss != "L2":
        perceptual = PerceptualConfig(net="alex", weight=args.lpips_weight, backbone=args.backbone)
        terms = dataclasses.replace(terms, perceptual=perceptual)
    if loss == "L2 + LPIPS + GAN":
        terms = _with_discriminator(terms, args)
    optim = dataclasses.replace(config.optim, discriminator_lr=args.discriminator_lr)
    return dataclasses.replace(config, loss=terms, optim=optim)


def to_figures(results: dict[tuple[str, int], Values], *, photos: str) -> list[Figure]:
    """Return the bars of every seed from the LPIPS-alex of every run; larger is better in each."""
    figures = []
    for seed in sorted({seed for _, seed in results}):
        plain, perceptual, adversarial = (results[loss, seed]["lpips_alex"] for loss in LOSSES)
        figures += [
            Figure(
                name=f"LPIPS-alex on {photos}, L2 over L2 + LPIPS, seed {seed}",
                value=plain / perceptual,
                must=1.0,
                note=f"{plain:.4f} against {perceptual:.4f}",
            ),
            Figure(
                name=f"LPIPS-alex on {photos}, L2 + LPIPS over L2 + LPIPS + GAN, seed {seed}",
                value=perceptual / adversarial,
                must=1.0 / MAX_LOSS_OF_LPIPS,
                aim=1.0,
                note=f"{perceptual:.4f} against {adversarial:.4f}",
            ),
        ]
    return figures


def to_details(start: Values, results: dict[tuple[str, int], Values]) -> str:
    """Return the table of what every run came to, and of its discriminator, means of the last quarter of the steps."""
    columns = ("LPIPS-alex", "PSNR, dB", "disc_accuracy", "disc_loss", "adversarial", "adversarial_weight")
    names = ("lpips_alex", "psnr_db", *columns[2:])
    lines = [f"| run | seed | {' | '.join(columns)} |", "|" + "---|" * (len(columns) + 2)]
    for (loss, seed), values in {("start", ""): start, **results}.items():
        cells = [f"{values[name]:.4g}" if name in values else "-" for name in names]
        lines.append(f"| {loss} | {seed} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    """Train, measure, print, keep the tables where asked; 1 where a must is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--backbone", required=True, help="weights of AlexNet")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--judge-size", type=int, default=512, help="side of the central pixels that are judged")
    parser.add_argument("--lpips-weight", type=float, default=0.1)
    parser.add_argument("--gan-weight", type=float, default=0.1, help="times the adaptive factor")
    parser.add_argument("--gan-warmup", type=int, default=50, help="steps over which the discriminator is listened to")
    parser.add_argument("--discriminator-lr", type=float, default=2e-4)
    args = parser.parse_args(argv)
    folders = {(loss, seed): finish(run_config(args, loss, seed)) for seed in args.seeds for loss in LOSSES}
    perceptual = build_perceptual(PerceptualConfig(net="alex", backbone=args.backbone))
    source = open_source(args.photos)
    pictures = [central_square(source.load(index), args.judge_size) for index in range(len(source))]

    def judged(vae: str | Path, name: str) -> Values:
        path = args.work / f"{name}.{Path(args.photos).name}-{args.judge_size}.json"
        return kept(path, lambda: measure(load_vae(vae), pictures, perceptual))

    start = judged(args.vae, "start")
    results = {run: last_means(folder) | judged(folder / "vae", folder.name) for run, folder in folders.items()}
    figures = to_figures(results, photos=f"{Path(args.photos).name} at {args.judge_size}")
    table = f"{to_markdown(figures)}\n\n{to_details(start, results)}"
    print(table)
    if args.keep:
        keep_table("three_losses", "Three losses from one checkpoint", table, argv)
    return int(all_met(figures) is False)


def _with_discriminator(terms: LossConfig, args: argparse.Namespace) -> LossConfig:
    """The discriminator of latent diffusion; with patches of 34x34 pixels where crops are small."""
    adversarial = AdversarialConfig(
        weight=args.gan_weight, warmup_steps=args.gan_warmup, num_layers=3 if args.size >= 128 else 2
    )
    return dataclasses.replace(terms, adversarial=adversarial)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
