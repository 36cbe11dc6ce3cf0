"""Bars of `sd-vae compress`: bits, PSNR and LPIPS beside JPEG and WebP of the same size, and what quantisation costs.

    python -m benchmarks.compression VAE KODAK --backbone ALEXNET --plot docs/compress.jpg --keep

Each picture is compressed at several qualities; JPEG and WebP get the quality at which their file is nearest in size,
and the smallest one where they cannot get so small. Everything is compared as 8-bit pixels. The large picture is a
mosaic of the first pictures of at least 10^7 bytes without compression.
"""

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.figures import ROOT, Figure, all_met, append, to_markdown
from eval.codecs import CODECS
from eval.codecs import compress as compress_by_codec
from eval.metrics import psnr_db
from sd_vae.autoencoder import AutoencoderKL
from sd_vae.checkpoints import load_vae
from sd_vae.files import atomic_file
from sd_vae.images import crop, list_images, open_image, pad_to_factor, to_pil, to_tensor
from sd_vae.latents.compression import compress
from sd_vae.latents.compression.steps import DEFAULT_QUALITY
from sd_vae.losses import Perceptual, PerceptualConfig, build_perceptual

__all__ = ["large_picture", "measure", "measure_all", "plot", "to_figures"]

QUALITIES = (30.0, 55.0, DEFAULT_QUALITY, 95.0)
LARGE_BYTES = 10_000_000
LARGE_LIMIT = 100_000

Row = dict[str, Any]


@torch.no_grad()
def measure(
    vae: AutoencoderKL, picture: Image.Image, perceptual: Perceptual | None, qualities: Sequence[float] = QUALITIES
) -> list[Row]:
    """Return a row for each quality of ours, for the codecs at its size, and for the VAE without quantisation."""
    x = to_tensor(picture)
    height, width = x.shape[-2:]

    def row(name: str, quality: float | None, num_bytes: float, recon: Image.Image) -> Row:
        values = {"psnr_db": psnr_db(recon, picture)}
        if perceptual is not None:
            values[perceptual.name] = float(perceptual(to_tensor(recon), x))
        return {"name": name, "quality": quality, "bits_per_pixel": 8 * num_bytes / (height * width), **values}

    z = vae.encode(pad_to_factor(x, vae.factor)).latent_dist.mode()
    rows = [row("unquantised", None, float("nan"), to_pil(crop(vae.decode(z).sample, height, width)))]
    for quality in qualities:
        file = compress(vae, x, quality=quality)
        size = len(file.data)
        rows.append(row("sd-vae", quality, size, to_pil(crop(vae.decode(file.z).sample, height, width))))
        for codec in CODECS:
            coded = compress_by_codec(picture, codec, 8 * size)
            rows.append(row(codec, quality, coded.num_bytes, coded.recon))
    return rows


def means(pictures: Sequence[Sequence[Row]]) -> list[Row]:
    """The rows of several pictures, averaged place by place."""
    return [
        same[0] | {key: statistics.fmean(row[key] for row in same) for key in same[0] if key not in ("name", "quality")}
        for same in zip(*pictures, strict=True)
    ]


def large_picture(pictures: Sequence[Image.Image]) -> Image.Image:
    """A mosaic of the first pictures, each cut to the smallest, of at least `LARGE_BYTES` bytes of pixels."""
    width, height = (min(picture.size[axis] for picture in pictures) for axis in (0, 1))
    columns = rows = 1
    while 3 * width * columns * height * rows < LARGE_BYTES:
        if width * columns <= height * rows:
            columns += 1
        else:
            rows += 1
    mosaic = Image.new("RGB", (width * columns, height * rows))
    for number in range(columns * rows):
        row, column = divmod(number, columns)
        mosaic.paste(pictures[number % len(pictures)].crop((0, 0, width, height)), (column * width, row * height))
    return mosaic


def to_figures(rows: Sequence[Row], large_bytes: int) -> list[Figure]:
    """The bars: what quantisation costs at the default, and how small the large picture becomes."""
    ours = _default(rows, "sd-vae")
    cost_db = rows[0]["psnr_db"] - ours["psnr_db"]
    beside = "; ".join(
        ", ".join([f"{name}: {row['bits_per_pixel']:.3f} bits/pixel", *_told(row)])
        for name, row in ((name, _default(rows, name)) for name in ("sd-vae", *CODECS))
    )
    return [
        Figure(
            name="0.3 dB over what quantisation costs at the default",
            value=0.3 / max(cost_db, 1e-3),
            must=1.0,
            note=f"{cost_db:.3f} dB of {rows[0]['psnr_db']:.2f} dB; {beside}",
        ),
        Figure(
            name="100 KB over the file of a 10 MB picture at the default",
            value=LARGE_LIMIT / large_bytes,
            must=1.0,
            note=f"{large_bytes} bytes",
        ),
    ]


def _default(rows: Sequence[Row], name: str) -> Row:
    return next(row for row in rows if row["name"] == name and row["quality"] == DEFAULT_QUALITY)


def _told(row: Row) -> list[str]:
    return [f"{key} {row[key]:.3f}" for key in row if key not in ("name", "quality", "bits_per_pixel")]


def plot(rows: Sequence[Row], path: Path, title: str) -> None:
    """Draw each metric over bits per pixel, a line a codec, the VAE without quantisation as a level."""
    from matplotlib.figure import Figure as Drawing

    metrics = [key for key in rows[0] if key not in ("name", "quality", "bits_per_pixel")]
    drawing = Drawing(figsize=(5.2 * len(metrics), 3.8), layout="constrained")
    for axes, metric in zip(np.atleast_1d(drawing.subplots(1, len(metrics))), metrics, strict=True):
        for name, mark in (("sd-vae", "o"), ("JPEG", "s"), ("WebP", "^")):
            points = sorted((row["bits_per_pixel"], row[metric]) for row in rows if row["name"] == name)
            axes.plot(*zip(*points, strict=True), marker=mark, label=name)
        axes.axhline(rows[0][metric], color="grey", linestyle=":", label="VAE, not quantised")
        axes.set(xlabel="bits per pixel", ylabel=metric.replace("_db", " in dB, higher is better"))
        if metric.startswith("lpips"):
            axes.set_ylabel(f"{metric}, lower is better")
        axes.grid(alpha=0.3)
        axes.legend()
    drawing.suptitle(title)
    with atomic_file(path) as temporary:
        drawing.savefig(temporary, format="jpeg", dpi=110, pil_kwargs={"quality": 85})


def measure_all(vae: str, pictures: Sequence[Image.Image], backbone: str | None) -> tuple[list[Row], int]:
    """Return means over pictures by way and quality, and the bytes of the large picture at the default quality.

    Args:
        vae: A folder, a file, a hub id, or mini.
        pictures: To compress.
        backbone: Weights of AlexNet, for LPIPS; None leaves it out.
    """
    model = load_vae(vae)
    perceptual = build_perceptual(PerceptualConfig(net="alex", backbone=backbone)) if backbone else None
    rows = means([measure(model, picture, perceptual) for picture in pictures])
    return rows, len(compress(model, to_tensor(large_picture(pictures))).data)


def main() -> None:
    """Measure, print one line of JSON, and draw."""
    parser = argparse.ArgumentParser(description="bits, PSNR and LPIPS of compressed pictures beside JPEG and WebP")
    parser.add_argument("vae", help="a folder, a file, a hub id, or mini")
    parser.add_argument("photos", type=Path, help="folder of pictures")
    parser.add_argument("--backbone", help="torchvision's AlexNet, for LPIPS; left out, LPIPS is left out")
    parser.add_argument("--limit", type=int, help="only the first so many pictures")
    parser.add_argument("--plot", type=Path, help="JPEG to draw")
    parser.add_argument("--keep", action="store_true", help="append to benchmarks/compression.md")
    args = parser.parse_args()
    pictures = [open_image(path) for path in list_images(args.photos)][: args.limit]
    rows, large_bytes = measure_all(args.vae, pictures, args.backbone)
    figures = to_figures(rows, large_bytes)
    print(json.dumps({"rows": rows, "large_bytes": large_bytes, "all_met": all_met(figures)}))
    if args.plot is not None:
        plot(rows, args.plot, f"{Path(args.vae).name}, means of {len(pictures)} pictures of {args.photos.name}")
    if args.keep:
        append(
            ROOT / "benchmarks" / "compression.md",
            "# Compressed pictures beside JPEG and WebP\n",
            f"{args.vae}, {len(pictures)} pictures.\n\n{to_markdown(figures)}",
            f"python -m benchmarks.compression VAE {args.photos.name}",
        )


if __name__ == "__main__":
    main()
