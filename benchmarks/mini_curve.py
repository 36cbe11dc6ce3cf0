"""The curve of a training run on held-out photos: every checkpoint's averaged weights, measured once each.

    python -m benchmarks.mini_curve RUN --holdout ../mini_data/holdout --backbone ALEXNET

adds to `RUN/holdout.csv` the checkpoints that are not in it. Photos are not resized: their central 256x256 pixels go
through the posterior's mode and come back as 8 bits, as a viewer sees them.
"""

import argparse
import csv
import datetime
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image

from eval.metrics import psnr_db
from eval.roundtrip import decode_picture, encode_picture
from sd_vae.autoencoder import AutoencoderKL
from sd_vae.checkpoints import load_vae
from sd_vae.data import open_source
from sd_vae.files import read_text, write_text
from sd_vae.images import to_tensor
from sd_vae.losses import Perceptual, PerceptualConfig, build_perceptual
from training import load_recipe

__all__ = ["central_square", "extend_curve", "measure", "read_curve"]

CURVE = "holdout.csv"
SIZE = 256


def central_square(image: Image.Image, size: int) -> Image.Image:
    """The central `size` x `size` pixels of a picture; less where it has not so many."""
    width, height = (min(size, side) for side in image.size)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


@torch.no_grad()
def measure(vae: AutoencoderKL, pictures: Sequence[Image.Image], perceptual: Perceptual | None) -> dict[str, float]:
    """Return means over pictures of `psnr_db` and of the perceptual distance under its own name."""
    sums: dict[str, float] = {}
    for x in pictures:
        recon = decode_picture(vae, encode_picture(vae, x).z, x.size)
        values = {"psnr_db": psnr_db(recon, x)}
        if perceptual is not None:
            values[perceptual.name] = float(perceptual(to_tensor(recon), to_tensor(x)))
        for name, value in values.items():
            sums[name] = sums.get(name, 0.0) + value
    return {name: total / len(pictures) for name, total in sums.items()}


def extend_curve(
    run: Path, pictures: Sequence[Image.Image], perceptual: Perceptual | None, *, device: str = "cpu"
) -> Iterator[dict[str, str]]:
    """Measure the checkpoints of a run that its curve lacks; yield each row once it is written.

    A checkpoint that training removes meanwhile is passed over.
    """
    preset = load_recipe(run / "config.yaml").model.preset
    for folder in sorted((run / "checkpoints").glob("step-*")):
        rows = read_curve(run)
        step = str(int(folder.name.removeprefix("step-")))
        weights = next((path for name in ("ema", "model") if (path := folder / f"{name}.safetensors").is_file()), None)
        if weights is None or any(row["step"] == step for row in rows):
            continue
        saved = datetime.datetime.fromtimestamp(weights.stat().st_mtime, tz=datetime.timezone.utc)
        values = measure(load_vae(weights, preset, device=device), pictures, perceptual)
        row = {"step": step, "saved": saved.isoformat(timespec="seconds")} | {k: f"{v:.4f}" for k, v in values.items()}
        _write_curve(run, [*rows, row])
        yield row


def read_curve(run: Path) -> list[dict[str, str]]:
    """Return the rows that are there."""
    path = run / CURVE
    return list(csv.DictReader(io.StringIO(read_text(path)))) if path.exists() else []


def _write_curve(run: Path, rows: Sequence[Mapping[str, str]]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[-1]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(sorted(rows, key=lambda row: int(row["step"])))
    write_text(run / CURVE, text.getvalue())


def main() -> None:
    """Extend the curve and print what is new."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("--holdout", required=True, help="photos: a folder or parquet files")
    parser.add_argument("--backbone", help="weights of AlexNet, for LPIPS; without, PSNR alone")
    parser.add_argument("--photos", type=int, help="the first so many; by default all")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    source = open_source(args.holdout)
    count = min(args.photos or len(source), len(source))
    pictures = [central_square(source.load(index), SIZE) for index in range(count)]
    net = PerceptualConfig(net="alex", backbone=args.backbone) if args.backbone else PerceptualConfig(weight=0.0)
    for row in extend_curve(args.run, pictures, build_perceptual(net), device=args.device):
        print("  ".join(f"{name} {value}" for name, value in row.items()), flush=True)


if __name__ == "__main__":
    main()
