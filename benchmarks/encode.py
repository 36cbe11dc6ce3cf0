"""JPEG files to latents beside the loop that people write: `python -m benchmarks.encode`, some three minutes.

The sd1 preset with the same random weights, 256x256, both in one process and in turns. Ours is `sd_vae.latents.encode`
with its defaults, which leaves a store with checksums; theirs is diffusers' `encode` over a DataLoader, batch 8, two
workers, one file of moments a batch. A figure is the median over the rounds of their time over ours. `--memory` encodes
10,000 small pictures with a tiny model instead, and says whether the process grows. Appended to benchmarks/encode.md
unless the size or the model is another than the bar's.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import skimage.data
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import transforms

from benchmarks.figures import ROOT, Figure, all_met, append, to_markdown
from sd_vae.autoencoder import AutoencoderKL
from sd_vae.benchmarking import median_ratio, relative_difference, take_turns
from sd_vae.benchmarking.memory import in_fresh_process
from sd_vae.config import PRESETS
from sd_vae.data import PictureTransform, Record, open_records
from sd_vae.images import list_images
from sd_vae.latents import EncodeConfig, LatentDataset
from sd_vae.latents.encode import Step, encode

TABLE = ROOT / "benchmarks" / "encode.md"
HEAD = """# Encoding data sets on the CPU

Appended by `python -m benchmarks.encode`; the newest run is last. Figures are times faster than diffusers in a loop
over a DataLoader, medians of the ratios within a round.
"""
SIZE, NUM_PICTURES, BATCH_SIZE, NUM_WORKERS = 256, 16, 8, 2
MUST, AIM = 1.8, 2.4
MAX_DIFFERENCE = 1e-4
"""Between the moments, of the largest magnitude, fp32."""

NUM_SMALL = 10_000
MAX_GROWTH = 0.02
"""Of the resident memory, from the first fifth of the small pictures to the rest."""
TINY = {
    "block_out_channels": (8, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 4,
}


def write_photos(folder: Path, num_pictures: int, size: int) -> None:
    """Write JPEG files whose shorter side is 5/4 of `size`: windows of the photos that scikit-image ships."""
    photos = [skimage.data.astronaut(), skimage.data.coffee(), skimage.data.chelsea(), skimage.data.rocket()]
    rng = np.random.default_rng(0)
    for number in range(num_pictures):
        photo = photos[number % len(photos)]
        top = int(rng.integers(0, photo.shape[0] - 240 + 1))
        left = int(rng.integers(0, photo.shape[1] - 300 + 1))
        # 4:5, so that nobody's resize has to round
        window = Image.fromarray(np.ascontiguousarray(photo[top : top + 240, left : left + 300]))
        window.resize((size * 25 // 16, size * 5 // 4)).save(folder / f"{number:03}.jpg", quality=95)


class Photos(torch.utils.data.Dataset[Tensor]):
    """The data set that people write.

    Args:
        folder: Pictures.
        size: Side of the centred square.
    """

    def __init__(self, folder: Path, size: int) -> None:
        self.paths = list_images(folder)
        self.transform = transforms.Compose(
            [
                transforms.Resize(size, transforms.InterpolationMode.BICUBIC),
                transforms.CenterCrop(size),
                transforms.ToTensor(),
                transforms.Normalize([0.5], [0.5]),
            ]
        )

    def __len__(self) -> int:
        """Number of pictures."""
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        """One of them, (3, S, S) in [-1, 1]."""
        x: Tensor = self.transform(Image.open(self.paths[index]).convert("RGB"))
        return x


@torch.no_grad()
def plain_loop(vae: Any, folder: Path, out: Path, size: int) -> None:
    """Encode with diffusers' model as most scripts do: one file of moments a batch."""
    out.mkdir()
    loader = DataLoader(Photos(folder, size), batch_size=BATCH_SIZE, num_workers=NUM_WORKERS)
    for number, x in enumerate(loader):
        torch.save(vae.encode(x).latent_dist.parameters, out / f"{number:05}.pt")


def our_encode(vae: AutoencoderKL, folder: Path, out: Path, size: int) -> None:
    """Encode to a store with our defaults, in fp32."""
    transform = PictureTransform(size=size, factor=vae.factor)
    encode(vae, open_records(str(folder)), out, EncodeConfig(transform=transform, dtype="float32"))


def measure(size: int = SIZE, rounds: int = 3, preset: str = "sd1", num_pictures: int = NUM_PICTURES) -> list[Figure]:
    """The throughput of both."""
    torch.manual_seed(0)
    vae = AutoencoderKL.from_preset(preset).eval()
    theirs = vae.to_diffusers()
    with tempfile.TemporaryDirectory() as parent:
        root, names = Path(parent), map(str, count())
        photos = root / "photos"
        photos.mkdir()
        write_photos(photos, num_pictures, size)
        # Once untimed, to compare what they make.
        our_encode(vae, photos, root / "ours", size)
        plain_loop(theirs, photos, root / "theirs", size)
        difference = relative_difference(_of_store(root / "ours"), _of_files(root / "theirs"))
        ways = {
            "ours": lambda: our_encode(vae, photos, root / next(names), size),
            "theirs": lambda: plain_loop(theirs, photos, root / next(names), size),
        }
        turns = take_turns(ways, rounds, vae.device)
    seconds = {name: [turn.wall_s for turn in taken] for name, taken in turns.items()}
    best = {name: num_pictures / min(times) for name, times in seconds.items()}
    figure = Figure(
        name=f"JPEG to latents, {preset} at {size}x{size}, fp32",
        value=median_ratio(seconds["theirs"], seconds["ours"]),
        must=MUST,
        aim=AIM,
        note=f"{best['ours']:.2f} pictures/s against {best['theirs']:.2f} at best; difference {difference:.1e}",
        is_correct=difference <= MAX_DIFFERENCE,
    )
    return [figure]


def _of_store(folder: Path) -> Tensor:
    """Every item's moments, (N, 2C, h, w)."""
    dataset = LatentDataset(folder, content="moments")
    return torch.stack([dataset[index]["moments"] for index in range(len(dataset))])


def _of_files(folder: Path) -> Tensor:
    """The same of the plain loop."""
    return torch.cat([torch.load(path, weights_only=True) for path in sorted(folder.iterdir())])


@dataclass(frozen=True)
class Repeated:
    """A few small pictures over and over, as `Records`.

    Args:
        files: Pictures, undecoded.
        num_records: How many records there are.
    """

    files: list[bytes]
    num_records: int
    spec: str = "the same pictures again and again"

    def read(self, start: int = 0, stop: int | None = None) -> Iterator[Record]:
        """Yield the records from `start` to before `stop`, or to the end."""
        for position in range(*slice(start, stop).indices(self.num_records)):
            content = self.files[position % len(self.files)]
            yield Record(position, str(position), str(position), content, {"caption": f"number {position}"})


def measure_memory(num_records: int = NUM_SMALL) -> tuple[float, float]:
    """Return the most memory that encoding so many pictures held in the first fifth and in the rest, in MiB.

    In a process of its own, with a tiny model, pictures of 64x64 pixels and shards of a tenth of the first fifth.
    """
    return in_fresh_process(_encode_many, num_records)


def _encode_many(num_records: int) -> tuple[float, float]:
    """`measure_memory` in this process."""
    vae = AutoencoderKL(**TINY).eval()
    held: list[tuple[int, float]] = []

    def look(step: Step) -> None:
        if step.num_done % 10 == 0:
            held.append((step.num_done, resident_mib()))

    with tempfile.TemporaryDirectory() as parent:
        write_photos(Path(parent), 16, 64)
        records = Repeated([path.read_bytes() for path in list_images(Path(parent))], num_records)
        transform = PictureTransform(size=64, factor=vae.factor)
        config = EncodeConfig(transform=transform, shard_items=max(1, num_records // 50))
        encode(vae, records, Path(parent) / "store", config, progress=look)
    fifth = num_records // 5
    return max(mib for done, mib in held if done <= fifth), max(mib for done, mib in held if done > fifth)


def resident_mib() -> float:
    """Memory that this process holds now; on Linux."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def main(argv: list[str]) -> int:
    """Measure, print the table, keep it where it is the bar's size and model; 1 where a must is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=SIZE, help="pixels of a square's side")
    parser.add_argument("--pictures", type=int, default=NUM_PICTURES)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--preset", default="sd1", choices=sorted(PRESETS))
    parser.add_argument("--memory", action="store_true", help=f"only the memory of {NUM_SMALL:,} small pictures")
    options = parser.parse_args(argv)
    if options.memory:
        first, rest = measure_memory()
        print(f"{first:.1f} MiB in the first fifth of {NUM_SMALL:,} pictures, {rest:.1f} in the rest")
        return int(rest > first * (1 + MAX_GROWTH))
    figures = measure(options.size, options.rounds, options.preset, options.pictures)
    table = to_markdown(figures)
    print(table)
    if (options.size, options.preset) == (SIZE, "sd1"):
        append(TABLE, HEAD, table, " ".join(["python -m benchmarks.encode", *argv]))
    return int(all_met(figures) is False)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
