"""From a trained `mini` to the weights in the package: unit variance in every channel, fp16, card and digests.

    python -m benchmarks.mini_release WEIGHTS --photos ../mini_data/train --card CARD --out sd_vae/weights/mini

One `scaling_factor` serves all channels, so what sets one channel apart from the others goes into quant_conv and
post_quant_conv, exactly: latents have mean 0 and variance 1 in each channel, on every other photo of those given. On
the photos between them `benchmarks.mini_bars` measures it.
"""

import argparse
import dataclasses
import hashlib
from collections.abc import Iterable, Iterator
from itertools import groupby, islice
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from benchmarks.mini_curve import central_square
from sd_vae.autoencoder import AutoencoderKL
from sd_vae.checkpoints import load_vae, save_vae
from sd_vae.checkpoints.families import fold_scale
from sd_vae.config import VAEConfig
from sd_vae.data import ImageSource, open_source
from sd_vae.errors import UserError
from sd_vae.files import read_text, write_text
from sd_vae.images import to_tensor
from sd_vae.weights import SUMS, shipped_folder

__all__ = ["ChannelMoments", "balance", "every_other", "latent_moments", "release", "write_sums"]

MAX_MB = 12.0
"""Size of what ships, in 10^6 bytes: it is in every clone and every wheel."""
SIZE = 256


class ChannelMoments(NamedTuple):
    """Of z ~ q(z|x) over pictures, by channel (C,), float64."""

    mean: Tensor
    std: Tensor


def every_other(source: ImageSource, first: int) -> Iterator[Image.Image]:
    """Return the central 256x256 pixels of every other photo, each once however often it stands in the source.

    Args:
        source: Photos; equal neighbours are one photo (`benchmarks.mini_data`).
        first: 0 for the photos that set the scale, 1 for those that it is measured on.
    """
    squares = (central_square(source.load(index), SIZE) for index in range(len(source)))
    photos = (next(equal) for _, equal in groupby(squares, key=Image.Image.tobytes))
    return islice(photos, first, None, 2)


@torch.no_grad()
def latent_moments(vae: AutoencoderKL, pictures: Iterable[Image.Image]) -> ChannelMoments:
    """Return mean and standard deviation of every channel; the variance is that of the means plus the posterior's."""
    posteriors = [vae.encode(to_tensor(picture).to(vae.device)).latent_dist for picture in pictures]
    means = torch.cat([posterior.mean.double().flatten(2) for posterior in posteriors], dim=2)  # (1, C, cells)
    variances = torch.cat([posterior.var.double().flatten(2) for posterior in posteriors], dim=2)
    std = (means.var(dim=2, unbiased=False) + variances.mean(dim=2)).sqrt()
    return ChannelMoments(means.mean(dim=2)[0].cpu(), std[0].cpu())


def balance(vae: AutoencoderKL, moments: ChannelMoments) -> AutoencoderKL:
    """Return the same autoencoder with latents of mean 0 and variance 1 in every channel, by one scaling factor.

    The scaling factor is 1 / the root mean square of the channels' standard deviations, so z keeps its magnitude.
    """
    config = dataclasses.replace(
        VAEConfig.from_dict(dict(vae.config)),
        scaling_factor=1.0,
        shift_factor=None,
        latents_mean=tuple(moments.mean.tolist()),
        latents_std=tuple(moments.std.tolist()),
    )
    scaling_factor = float(1.0 / moments.std.square().mean().sqrt())
    tensors, config = fold_scale(vae.state_dict(), config, scaling_factor)
    balanced = AutoencoderKL(**config.to_dict())
    balanced.load_state_dict(tensors)
    return balanced.to(vae.device).eval()


def release(vae: AutoencoderKL, card: str, out: Path, *, overwrite: bool = False) -> Path:
    """Write a VAE as it ships, in fp16, and return its folder, checked as `sd_vae.load_vae` checks it.

    Args:
        vae: The model.
        card: Text of its model card.
        out: Folder to write; its name is the name of the weights.
        overwrite: Replace what is there.

    Raises:
        UserError: The weights are too large to ship, or cannot be written.
    """
    num_bytes = 2 * vae.num_parameters()
    if num_bytes > 1e6 * MAX_MB:
        raise UserError(
            f"{vae.num_parameters():,} parameters are {num_bytes / 1e6:.1f} MB in fp16, what ships has at most "
            f"{MAX_MB:g} MB; train a smaller architecture."
        )
    if overwrite:
        (out / SUMS).unlink(missing_ok=True)  # save_vae replaces no folder that holds what it does not know
    save_vae(vae, out, dtype="float16", overwrite=overwrite)
    write_text(out / "README.md", card)
    write_sums(out)
    return shipped_folder(out.name, out.parent)


def write_sums(folder: Path) -> None:
    """Write the digests of a folder's configs and weights, which `sd_vae.weights` checks."""
    files = sorted(path for path in folder.iterdir() if path.suffix in (".json", ".safetensors"))
    digests = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in files]
    write_text(folder / SUMS, "".join(digests))


def main() -> None:
    """Balance, write, and say what was written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", help="VAE folder, or the ema.safetensors of a checkpoint")
    parser.add_argument(
        "--photos", required=True, help="photos, every other of which sets the scale: those it was trained on"
    )
    parser.add_argument("--card", type=Path, required=True, help="Markdown file: the model card")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--overwrite", action="store_true")
    args = parser.parse_args()
    vae = load_vae(args.weights, "mini" if Path(args.weights).is_file() else None)
    before = latent_moments(vae, every_other(open_source(args.photos), 0))
    vae = balance(vae, before)
    folder = release(vae, read_text(args.card), args.out, overwrite=args.overwrite)
    print(f"channels had means {before.mean.tolist()} and standard deviations {before.std.tolist()}")
    print(f"scaling_factor {vae.config.scaling_factor:.6g}; {folder}:")
    for path in sorted(folder.iterdir()):
        print(f"  {path.name}  {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
