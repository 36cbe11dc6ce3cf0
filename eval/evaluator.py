"""`evaluate`: photos through VAEs and back, measured as 8-bit pictures, beside box averages as a yardstick.

The whole protocol is here. A photo becomes upright 8-bit RGB, is resized and cropped if a size is given, goes to
[-1, 1], is padded by reflection to the model's factor, encoded to its posterior, decoded from the posterior's mode,
cropped back, clamped and rounded to 8 bits. Then it is compared with the photo, one photo at a time in float64. Nothing
is drawn at random, so the same photos and weights give the same numbers on the same machine.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor

from sd_vae._diffusers import DiagonalGaussianDistribution, DiffusersAutoencoderKL
from sd_vae.errors import UserError
from sd_vae.images import to_tensor

from .baselines import box_average
from .metrics import METRICS, LatentStats, LatentSums, perceptual_metric, psnr_db, ssim
from .photos import list_photos, load_photo
from .pictures import error_map, latent_channels, latent_colours
from .results import Evaluation, PhotoResult, PhotoSize, ReconPictures, Row, Speed, photo_means
from .roundtrip import decode_picture, encode_picture, evaluating

__all__ = ["Perceptual", "evaluate"]


class Perceptual(Protocol):
    """A perceptual distance under its own name, such as what `sd_vae.losses.build_perceptual` returns."""

    name: str

    def __call__(self, recon: Tensor, x: Tensor) -> Tensor:
        """Return one distance per item (B,), lower is closer, of images (B, 3, H, W) in [-1, 1]."""


def evaluate(
    vaes: Mapping[str, DiffusersAutoencoderKL] | Sequence[DiffusersAutoencoderKL],
    data: str | Path | Sequence[str | Path] | Mapping[str, Image.Image],
    *,
    size: int | None = None,
    perceptual: Perceptual | None = None,
    box_blocks: Sequence[int] = (),
    max_pictures: int = 8,
    on_pictures: Callable[[str, Mapping[str, ReconPictures]], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Return how well VAEs reconstruct photos.

    Args:
        vaes: Models by name, or a sequence of them, then called `model 1`, `model 2`, ...; each runs on its own device
            and in its own dtype, in eval mode, and is left in the mode it came in.
        data: A folder (searched below too), a file, a sequence of those, or named pictures.
        size: Resize the short side of every photo to this many pixels (bicubic) and keep the central square; None
            evaluates photos as they are.
        perceptual: A perceptual distance to measure too, under its own name.
        box_blocks: Sides in pixels of block averages that stand as rows beside the models.
        max_pictures: How many photos' pictures to keep in the result.
        on_pictures: Called with a photo's name and its pictures by row, as soon as they exist, for every photo.
        progress: Called with the number of photos done and their total, before the first and after each.

    Returns:
        Numbers per photo, their means, latent statistics, and the first photos' pictures.

    Raises:
        UserError: No models or photos, a model that is not for RGB, two rows of one name, a size below 1, an
            unreadable photo, or one too small for a metric.
    """
    models = _named(vaes, box_blocks)
    if size is not None and size < 1:
        raise UserError(f"size is {size} pixels, it must be at least 1; use a multiple of the VAE's factor, like 512.")
    photos = list_photos(data)
    baselines = {f"{block}x{block} box average": block for block in box_blocks}

    results: dict[str, list[PhotoResult]] = {name: [] for name in [*models, *baselines]}
    sizes: list[PhotoSize] = []
    kept: dict[str, Mapping[str, ReconPictures]] = {}
    seconds = dict.fromkeys(models, 0.0)

    with evaluating(list(models.values())):
        if progress:
            progress(0, len(photos))
        for photo in photos:
            x = load_photo(photo, size)
            sizes.append(PhotoSize(name=photo.name, width=x.width, height=x.height))
            pictures: dict[str, ReconPictures] = {}
            for name, vae in models.items():
                start = time.perf_counter()
                posterior = encode_picture(vae, x)
                recon = decode_picture(vae, posterior.mode(), x.size)
                seconds[name] += time.perf_counter() - start
                results[name].append(_measure(photo.name, recon, x, perceptual, posterior))
                pictures[name] = _draw(recon, x, posterior.mode())
            for name, block in baselines.items():
                recon = box_average(x, block)
                results[name].append(_measure(photo.name, recon, x, perceptual))
                pictures[name] = _draw(recon, x)
            if len(kept) < max_pictures:
                kept[photo.name] = pictures
            if on_pictures:
                on_pictures(photo.name, pictures)
            if progress:
                progress(len(sizes), len(photos))

    megapixels = sum(photo.width * photo.height for photo in sizes) / 1e6
    return Evaluation(
        size=size,
        metrics={name: METRICS[name] for name in ("psnr_db", "ssim")}
        | ({perceptual.name: perceptual_metric(perceptual.name)} if perceptual else {}),
        photos=tuple(sizes),
        rows=tuple(_row(name, tuple(found)) for name, found in results.items()),
        pictures=kept,
        speed={
            name: Speed(seconds=spent, photos_per_s=len(sizes) / spent, megapixels_per_s=megapixels / spent)
            for name, spent in seconds.items()
        },
    )


def _named(vaes: Any, box_blocks: Sequence[int]) -> dict[str, DiffusersAutoencoderKL]:
    """The models by name, checked."""
    if not isinstance(vaes, Mapping | Sequence):
        raise UserError(f"vaes is a {type(vaes).__name__}, it must be a list or a dict of models; pass [vae].")
    models = dict(vaes) if isinstance(vaes, Mapping) else {f"model {n}": vae for n, vae in enumerate(vaes, start=1)}
    if not models:
        raise UserError("there is no model to evaluate; pass at least one VAE.")
    for name, vae in models.items():
        if not isinstance(vae, DiffusersAutoencoderKL):
            raise UserError(f"{name!r} is a {type(vae).__name__}, it must be an AutoencoderKL; load it with load_vae.")
        channels = vae.config.in_channels, vae.config.out_channels
        if channels != (3, 3):
            raise UserError(
                f"{name!r} takes {channels[0]} channels and gives {channels[1]}, photos have 3 (RGB); "
                "choose a VAE for RGB pictures."
            )
    names = [*models, *(f"{block}x{block} box average" for block in box_blocks)]
    if len(set(names)) < len(names):
        raise UserError(f"two rows have one name among {', '.join(names)}; give every model and block once.")
    return models


def _measure(
    name: str,
    recon: Image.Image,
    x: Image.Image,
    perceptual: Perceptual | None,
    posterior: DiagonalGaussianDistribution | None = None,
) -> PhotoResult:
    """All numbers of one photo and its reconstruction, both 8-bit pictures."""
    try:
        metrics = {"psnr_db": psnr_db(recon, x), "ssim": ssim(recon, x)}
        if perceptual:
            metrics[perceptual.name] = _distance(perceptual, recon, x)
    except UserError as error:
        raise UserError(f"{name}: {error}") from error
    return PhotoResult(
        name=name,
        metrics=metrics,
        latent_shape=tuple(posterior.mean.shape[1:]) if posterior else None,
        latents=LatentSums.of(posterior) if posterior else None,
    )


@torch.inference_mode()
def _distance(perceptual: Perceptual, recon: Image.Image, x: Image.Image) -> float:
    """Perceptual distance of two pictures, on the device of its network if it has one."""
    network = perceptual if isinstance(perceptual, torch.nn.Module) else torch.nn.Identity()
    device = next((parameter.device for parameter in network.parameters()), torch.device("cpu"))
    return float(perceptual(to_tensor(recon).to(device), to_tensor(x).to(device)))


def _draw(recon: Image.Image, x: Image.Image, z: Tensor | None = None) -> ReconPictures:
    """Everything to look at in one photo and its reconstruction."""
    return ReconPictures(
        original=x,
        recon=recon,
        error=error_map(recon, x),
        latent_channels=None if z is None else latent_channels(z),
        latent_colours=None if z is None or z.shape[1] < 4 else latent_colours(z),
    )


def _row(name: str, photos: tuple[PhotoResult, ...]) -> Row:
    """One way of reconstruction, summed up."""
    sums = [photo.latents for photo in photos if photo.latents is not None]
    return Row(
        name=name,
        kind="vae" if sums else "box_average",
        means=photo_means(photos),
        latents=LatentStats.pooled(sums) if sums else None,
        photos=photos,
    )
