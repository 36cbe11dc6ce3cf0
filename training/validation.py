"""Looking at a VAE on photos: fixed validation photos with metrics and a picture, and the scale of its latents.

Shapes: B batch, C latent channels, h w latent cells.
"""

import logging
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio

from sd_vae.autoencoder import AutoencoderKL
from sd_vae.data import Images, center_crop
from sd_vae.errors import UnreachableError, UserError
from sd_vae.files import atomic_file
from sd_vae.images import to_pil
from sd_vae.losses import Objective

__all__ = ["latent_moments", "load_photos", "require_readable", "save_picture", "validate"]


def require_readable(source: Images) -> None:
    """Check that a source holds a picture that can be read, before a run begins.

    Raises:
        UserError: None can be read; tells why the first cannot.
    """
    problems: list[str] = []
    for index in range(len(source)):
        try:
            source.load(index)
            return
        except UnreachableError:
            raise
        except UserError as error:
            problems.append(str(error))
    raise UserError(f"none of the {len(problems)} pictures of {source.spec} can be read; the first: {problems[0]}")


logger = logging.getLogger(__name__)


def load_photos(source: Images, num_images: int, size: int) -> Tensor:
    """Return the first readable photos of a source, resized and centre-cropped, (N, 3, size, size) in [-1, 1].

    Args:
        source: Photos; those that cannot be read are passed over, with a warning each.
        num_images: Photos at most.
        size: Side in pixels.

    Raises:
        UserError: None can be read.
    """
    photos: list[Tensor] = []
    problems: list[str] = []
    for index in range(len(source)):
        if len(photos) == num_images:
            break
        try:
            photos.append(center_crop(source.load(index), size))
        except UnreachableError:
            raise
        except UserError as error:
            logger.warning("left out: %s", error)
            problems.append(str(error))
    if not photos:
        raise UserError(f"none of the {len(problems)} pictures can be read; the first: {problems[0]}")
    return torch.stack(photos)


@torch.no_grad()
def validate(
    vae: AutoencoderKL, objective: Objective, photos: Tensor, device: torch.device
) -> tuple[dict[str, float], Image.Image]:
    """Return metrics of the posterior mode's reconstruction, means over photos, and a picture.

    The picture shows the photos above their reconstructions. Metrics: `psnr_db` (per photo, range 2, higher is better)
    and the objective's terms. Photos run one at a time, so memory does not depend on their number.
    """
    sums: dict[str, float] = {}
    recons = []
    for photo in photos.split(1):
        x = photo.to(device)
        posterior = vae.encode(x).latent_dist
        recon = vae.decode(posterior.mode()).sample
        values = {"psnr_db": peak_signal_noise_ratio(recon.clamp(-1, 1), x, data_range=2.0)}
        values |= objective(x, recon, posterior).terms
        for name, value in values.items():
            sums[name] = sums.get(name, 0.0) + float(value)
        recons.append(recon.cpu())
    rows = [torch.cat([*photos.split(1)], dim=3), torch.cat(recons, dim=3)]
    return {name: total / len(photos) for name, total in sums.items()}, to_pil(torch.cat(rows, dim=2))


@torch.no_grad()
def latent_moments(vae: AutoencoderKL, photos: Tensor, device: torch.device) -> tuple[float, float]:
    """Return mean and standard deviation of all elements of z ~ q(z|x) over photos.

    The variance is that of the means plus the posterior's own, so nothing is drawn. 1 / standard deviation is the
    scaling factor that gives latents unit variance.

    Args:
        vae: Model.
        photos: (N, 3, H, W) in [-1, 1], encoded one at a time.
        device: Where the model is.

    Source: Rombach et al., arXiv 2112.10752, appendix G.
    """
    posteriors = [vae.encode(photo.to(device)).latent_dist for photo in photos.split(1)]
    means = torch.cat([posterior.mean.double().cpu() for posterior in posteriors])
    variances = torch.cat([posterior.var.double().cpu() for posterior in posteriors])
    return float(means.mean()), float((means.var(unbiased=False) + variances.mean()).sqrt())


def save_picture(picture: Image.Image, path: Path) -> None:
    """Write a PNG, whole or not at all."""
    with atomic_file(path) as temporary:
        picture.save(temporary, format="png")
