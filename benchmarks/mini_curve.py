"""The curve of a training run on held-out photos: every checkpoint's averaged weights, measured once each.

    python -m benchmarks.mini_curve RUN [NEXT_LEG ...] --holdout ../mini_data/holdout --backbone ALEXNET --plot PICTURE

adds to each `RUN/holdout.csv` the checkpoints that are not in it, and draws all legs as one curve. Photos are not
resized: their central 256x256 pixels go through the posterior's mode and come back as 8 bits, as a viewer sees them.
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
from training.records import read_metrics

__all__ = ["central_square", "extend_curve", "measure", "plot_curve", "read_curve", "seen_megapixels"]

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
    """Measure the checkpoints of a run of `mini` that its curve lacks; yield each row once it is written.

    A checkpoint that training removes meanwhile is passed over.
    """
    for folder in sorted((run / "checkpoints").glob("step-*")):
        rows = read_curve(run)
        step = str(int(folder.name.removeprefix("step-")))
        weights = next((path for name in ("ema", "model") if (path := folder / f"{name}.safetensors").is_file()), None)
        if weights is None or any(row["step"] == step for row in rows):
            continue
        saved = datetime.datetime.fromtimestamp(weights.stat().st_mtime, tz=datetime.timezone.utc)
        values = measure(load_vae(weights, "mini", device=device), pictures, perceptual)
        row = {"step": step, "saved": saved.isoformat(timespec="seconds")} | {k: f"{v:.4f}" for k, v in values.items()}
        _write_curve(run, [*rows, row])
        yield row


def read_curve(run: Path) -> list[dict[str, str]]:
    """Return the rows that are there."""
    path = run / CURVE
    return list(csv.DictReader(io.StringIO(read_text(path)))) if path.exists() else []


def seen_megapixels(run: Path) -> dict[int, float]:
    """Return how many million pixels of crops a run had trained on after each step that it logged."""
    size = load_recipe(run / "config.yaml").data.size
    return {int(row["step"]): row["samples"] * size**2 / 1e6 for row in read_metrics(run / "metrics.jsonl")}


def plot_curve(runs: Sequence[Path], path: Path) -> None:
    """Draw what the curves of the legs of one training say, over the pixels seen since the first leg began.

    Args:
        runs: The legs, in their order.
        path: Picture to write.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names = {"psnr_db": "PSNR, dB", "lpips_alex": "LPIPS-alex"}
    figure, axes = plt.subplots(1, len(names), figsize=(10, 3.5), layout="constrained")
    before = 0.0
    for run in runs:
        seen = seen_megapixels(run)
        rows = read_curve(run)
        for axis, name in zip(axes, names, strict=True):
            points = [(before + _at(seen, int(row["step"])), float(row[name])) for row in rows if row.get(name)]
            axis.plot(*zip(*points, strict=True), marker="o", markersize=3, label=run.name)
        before += max(seen.values())
    for axis, title in zip(axes, names.values(), strict=True):
        axis.set(xlabel="million pixels of crops seen", ylabel=title)
        axis.grid(alpha=0.3)
    axes[0].legend(title="leg")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _at(seen: Mapping[int, float], step: int) -> float:
    """Pixels seen at a step, from the nearest one that was logged."""
    nearest = min(seen, key=lambda logged: abs(logged - step))
    return seen[nearest] * step / nearest


def _write_curve(run: Path, rows: Sequence[Mapping[str, str]]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[-1]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(sorted(rows, key=lambda row: int(row["step"])))
    write_text(run / CURVE, text.getvalue())


def main() -> None:
    """Extend the curve and print what is new."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="run folders: the legs of one training, in their order")
    parser.add_argument("--holdout", required=True, help="photos: a folder or parquet files")
    parser.add_argument("--backbone", help="weights of AlexNet, for LPIPS; without, PSNR alone")
    parser.add_argument("--photos", type=int, help="the first so many; by default all")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--plot", type=Path, help="picture of the curve to write")
    args = parser.parse_args()
    source = open_source(args.holdout)
    count = min(args.photos or len(source), len(source))
    pictures = [central_square(source.load(index), SIZE) for index in range(count)]
    net = PerceptualConfig(net="alex", backbone=args.backbone) if args.backbone else PerceptualConfig(weight=0.0)
    perceptual = build_perceptual(net)
    for run in args.runs:
        for row in extend_curve(run, pictures, perceptual, device=args.device):
            print(f"{run.name}  " + "  ".join(f"{name} {value}" for name, value in row.items()), flush=True)
    if args.plot:
        plot_curve(args.runs, args.plot)


if __name__ == "__main__":
    main()
