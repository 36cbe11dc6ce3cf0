"""What the latent-space commands share: the device, a perceptual distance, bars over pictures."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

from sd_vae.errors import UserError

if TYPE_CHECKING:
    from sd_vae.autoencoder import AutoencoderKL
    from sd_vae.losses import Perceptual

__all__ = ["DistanceNet", "best_device", "load_distance", "note_other_encoder", "picture_progress", "require_at_least"]

DistanceNet = Literal["alex", "squeeze", "vgg", "ms_dssim", "none"]
"""What may measure a distance: LPIPS on a network, structural dissimilarity, which needs no weights, or nothing."""


def best_device(name: str) -> str:
    """Return the device that a name stands for: `auto` is an accelerator where there is one."""
    import torch

    if name != "auto":
        return name
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return "cpu" if accelerator is None else accelerator.type


def load_distance(net: DistanceNet, weights: str | None, device: str) -> Perceptual | None:
    """Return the distance, on its device; None for `none`.

    Args:
        net: Which.
        weights: File with the network's torchvision weights; None for the torch hub cache.
        device: Where to compute.

    Raises:
        UserError: The weights are missing or not what they should be, or go with no network.
    """
    if weights is not None and net in ("ms_dssim", "none"):
        raise UserError(f"--weights is {weights} but --net is {net}; say whose weights they are: alex, squeeze or vgg.")
    if net == "none":
        return None
    from sd_vae.losses import PerceptualConfig, build_perceptual

    try:
        built = build_perceptual(PerceptualConfig(net=net, backbone=weights))
    except UserError as error:
        text = str(error).replace("perceptual.net", "--net").replace("perceptual.backbone", "--weights")
        raise UserError(text.replace("or set --weights to", "or point --weights to")) from None
    assert built is not None, "a perceptual term of weight 1 is always built"
    return built.to(device)


@contextmanager
def picture_progress(label: str, total: int | None = None) -> Iterator[Callable[[int, int], None]]:
    """A bar over pictures on standard error, with rate and time left; yields what moves it to (done, total)."""
    from tqdm import tqdm

    with tqdm(desc=label, total=total, unit=" pictures", file=sys.stderr) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield show


def note_other_encoder(what: str, encoder: str | None, vae: AutoencoderKL, name: str) -> None:
    """Say so where latents are another encoder's, or of this one in another dtype.

    Args:
        what: What they are of.
        encoder: Fingerprint of what made them; None where nothing tells.
        vae: The VAE that is to decode them.
        name: What to call it.
    """
    if encoder is None:
        return
    from sd_vae.cli.console import say
    from sd_vae.latents import encoder_fingerprint

    given = encoder_fingerprint(vae)
    if given != encoder:
        say(
            f"note: {what} was made by the encoder {encoder[:12]}, {name} has {given[:12]}; what follows is right only "
            "if both share one latent space."
        )


def require_at_least(args: object, **least: float) -> None:
    """Check numbers among a command's arguments.

    Raises:
        UserError: Lists every one that is below its least.
    """
    problems = [
        f"--{name.replace('_', '-')} is {value}, it must be at least {low}"
        for name, low in least.items()
        if not (value := getattr(args, name)) >= low
    ]
    if problems:
        raise UserError("; ".join(problems) + ".")
