"""What ships beside TAESD: Kodak at 512x512, time, latent variance, equivariance. Run once, when training is over.

    python -m benchmarks.mini_bars mini --kodak KODAK --taesd TAESD --photos ../mini_data/train \
        --holdout ../mini_data/holdout --backbone ALEXNET

Quality is that of central 512x512 squares through the posterior's mode, rounded to 8 bits. Nothing is chosen by these
numbers: choices are made on held-out training photos (`benchmarks.mini_curve`). Variances are those of the photos that
did not set the scale (`benchmarks.mini_release`).
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from benchmarks.figures import ROOT, Figure, append, to_markdown
from benchmarks.mini_curve import central_square, measure
from benchmarks.mini_release import SIZE, every_other, latent_moments
from eval.metrics import ssim
from eval.models import decode, encode, load_autoencoder
from eval.roundtrip import decode_picture, encode_picture
from sd_vae.autoencoder import AutoencoderKL
from sd_vae.data import open_source
from sd_vae.images import to_tensor
from sd_vae.losses import Perceptual, PerceptualConfig, build_perceptual

__all__ = ["Measured", "equivariance_errors", "measure_all", "quality", "seconds", "to_figures"]

KODAK_SIZE = 512
MAX_VARIANCE_ERROR = 0.1


@torch.no_grad()
def quality(vae: Any, pictures: Sequence[Image.Image], perceptual: Perceptual) -> dict[str, float]:
    """Return means over pictures of psnr_db, the perceptual distance and ssim."""
    similarities = [ssim(decode_picture(vae, encode_picture(vae, x).z, x.size), x) for x in pictures]
    return measure(vae, pictures, perceptual) | {"ssim": statistics.fmean(similarities)}


def seconds(vaes: Sequence[Any], size: int, rounds: int) -> list[float]:
    """Return each model's time for encoding and decoding one picture: medians of interleaved rounds after one."""
    x = torch.rand(1, 3, size, size) * 2 - 1
    times: list[list[float]] = [[] for _ in vaes]
    for _ in range(rounds + 1):
        for own, vae in zip(times, vaes, strict=True):
            start = time.perf_counter()
            decode(vae, encode(vae, x).z)
            own.append(time.perf_counter() - start)
    return [statistics.median(own[1:]) for own in times]


@torch.no_grad()
def equivariance_errors(vae: AutoencoderKL, pictures: Sequence[Image.Image]) -> dict[str, float]:
    """Return how far encoding is from commuting with 2x downscaling and with the two flips.

    Each is the root mean square of encode(T x) - T encode(x), T on latents being that on pictures, over the standard
    deviation of the latents: 0 is perfect, 1.4 is that of two unrelated pictures.
    """
    changes: dict[str, Callable[[Tensor], Tensor]] = {
        "downscaling": lambda x: F.avg_pool2d(x, 2),
        "horizontal flip": lambda x: x.flip(3),
        "vertical flip": lambda x: x.flip(2),
    }
    squares = dict.fromkeys(changes, 0.0)
    latents = []
    for picture in pictures:
        x = to_tensor(picture).to(vae.device)
        z = vae.encode(x).latent_dist.mode()
        latents.append(z.flatten().double())
        for name, change in changes.items():
            difference = vae.encode(change(x)).latent_dist.mode() - change(z)
            squares[name] += float(difference.double().square().mean()) / len(pictures)
    std = float(torch.cat(latents).std())
    return {name: square**0.5 / std for name, square in squares.items()}


def to_figures(
    ours: dict[str, float], taesd: dict[str, float], times: tuple[float, float], variances: Sequence[float]
) -> list[Figure]:
    """Return the bars of what ships; larger is better in each.

    Args:
        ours: Quality of what ships.
        taesd: Quality of TAESD.
        times: Seconds of ours and of TAESD for one picture.
        variances: Of scaled latents, by channel.
    """
    gain = ours["psnr_db"] - taesd["psnr_db"]
    ratio = taesd["lpips_alex"] / ours["lpips_alex"]
    error = max(abs(variance - 1.0) for variance in variances)
    spread = f"variances {', '.join(f'{variance:.3f}' for variance in variances)}"
    return [
        Figure(
            name="PSNR above TAESD's, dB",
            value=gain,
            must=1.0,
            aim=1.7,
            note=f"{ours['psnr_db']:.2f} against {taesd['psnr_db']:.2f}; SSIM {ours['ssim']:.3f}, {taesd['ssim']:.3f}",
        ),
        Figure(
            name="LPIPS-alex of TAESD over ours",
            value=ratio,
            must=1.0,
            aim=1.33,
            note=f"{taesd['lpips_alex']:.3f} against {ours['lpips_alex']:.3f}",
        ),
        Figure(
            name="time of TAESD over ours",
            value=times[1] / times[0],
            must=1.0,
            note=f"{times[0]:.2f} s, {times[1]:.2f} s",
        ),
        Figure(
            name="variance error allowed over ours", value=MAX_VARIANCE_ERROR / max(error, 1e-9), must=1.0, note=spread
        ),
    ]


class Measured(NamedTuple):
    """What ships, measured."""

    figures: list[Figure]
    errors: dict[str, float]
    """Of equivariance, see `equivariance_errors`."""
    held_out_variances: list[float]


def measure_all(
    vae: str, *, kodak: str, taesd: str, photos: str, holdout: str, backbone: str, rounds: int = 9
) -> Measured:
    """Return the bars of a VAE, and what is told beside them.

    Args:
        vae: What is judged: a folder, or `mini` for what ships.
        kodak: Pictures that quality is measured on.
        taesd: Weights that it is compared with.
        photos: Those that every other of set the scale.
        holdout: Photos that nothing was trained on.
        backbone: Weights of AlexNet, for LPIPS.
        rounds: For the times.
    """
    ours, other = load_autoencoder(vae), load_autoencoder(taesd)
    perceptual = build_perceptual(PerceptualConfig(net="alex", backbone=backbone))
    assert perceptual is not None, "a perceptual term of weight 1 is always built"
    suite, unseen = open_source(kodak), open_source(holdout)
    squares = [central_square(suite.load(index), KODAK_SIZE) for index in range(len(suite))]
    held_out = [central_square(unseen.load(index), SIZE) for index in range(len(unseen))]
    own_seconds, other_seconds = seconds([ours, other], KODAK_SIZE, rounds)
    factor = ours.config.scaling_factor
    variances, held_out_variances = (
        (factor * latent_moments(ours, pictures).std).square().tolist()
        for pictures in (every_other(open_source(photos), 1), held_out)
    )
    figures = to_figures(
        quality(ours, squares, perceptual),
        quality(other, squares, perceptual),
        (own_seconds, other_seconds),
        variances,
    )
    return Measured(figures, equivariance_errors(ours, held_out), held_out_variances)


def main() -> None:
    """Measure, print as JSON, and keep the table in benchmarks/mini.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("vae", help="what is judged: a folder, or `mini` for what ships")
    for name in ("kodak", "taesd", "photos", "holdout", "backbone"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--rounds", type=int, default=9, help="for the times")
    parser.add_argument("--keep", action="store_true", help="add the table to benchmarks/mini.md")
    args = vars(parser.parse_args())
    is_kept = args.pop("keep")
    figures, errors, variances = measure_all(**args)
    named = ", ".join(f"{name} {error:.3f}" for name, error in errors.items())
    others = ", ".join(f"{variance:.3f}" for variance in variances)
    table = f"{to_markdown(figures)}\n\nOn held-out photos: equivariance errors {named}; variances {others}."
    print(
        json.dumps({figure.name: [figure.value, figure.verdict, figure.note] for figure in figures} | errors, indent=1)
    )
    if is_kept:
        append(
            ROOT / "benchmarks" / "mini.md",
            "# mini beside TAESD (8-bit weights)\n",
            table,
            "python -m benchmarks.mini_bars",
        )


if __name__ == "__main__":
    main()
