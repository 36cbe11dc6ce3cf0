"""Looking at a VAE on photos: its loss and a picture of fixed validation photos, and the scale of its latents.

How good a reconstruction is, in metrics, is for an evaluator to say, which the caller of `train` may give: this package
knows only what it is called with and what it answers.

Shapes: B batch, C latent channels, h w latent cells.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from PIL import Image
from torch import Tensor

from sd_vae.autoencoder import AutoencoderKL
from sd_vae.data import Images, center_crop
from sd_vae.errors import UnreachableError, UserError
from sd_vae.files import atomic_file
from sd_vae.images import to_pil
from sd_vae.latents.processes import Processes
from sd_vae.losses import Objective

__all__ = [
    "ChosenImages",
    "Evaluate",
    "Evaluated",
    "latent_moments",
    "load_photos",
    "readable",
    "require_readable",
    "save_picture",
    "validate",
]


class Evaluated(Protocol):
    """What an evaluator says of a VAE."""

    @property
    def values(self) -> Mapping[str, float]:
        """Metric, named with its unit such as psnr_db, to its mean over photos."""

    @property
    def card(self) -> str:
        """The protocol and the numbers for a model card, in Markdown."""

    @property
    def picture(self) -> Image.Image | None:
        """Photos beside their reconstructions for a model card; None where no report was asked for."""


class Evaluate(Protocol):
    """Measures a VAE on photos; `eval.validation.Validator` is one."""

    def __call__(
        self, vae: AutoencoderKL, photos: Images, *, processes: Processes, folder: Path | None = None
    ) -> Evaluated:
        """Return what is measured; every process calls it and takes its share of the photos.

        Args:
            vae: The weights that will be saved.
            photos: Photos in their own size.
            processes: Those that train together.
            folder: Where the first process writes a report; None for no report.
        """


class ChosenImages:
    """Some pictures of a source.

    Args:
        images: The source.
        indices: Which.
    """

    def __init__(self, images: Images, indices: Sequence[int]) -> None:
        self.spec = images.spec
        self._images = images
        self._indices = list(indices)

    def __len__(self) -> int:
        """Return the number of pictures."""
        return len(self._indices)

    def load(self, index: int) -> Image.Image:
        """Return picture `index` as RGB, upright."""
        return self._images.load(self._indices[index])

    def name(self, index: int) -> str:
        """Return what to call picture `index` in a report."""
        return self._images.name(self._indices[index])


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


def readable(source: Images, num_images: int) -> ChosenImages:
    """Return the first photos of a source that can be read; the others are passed over, with a warning each.

    Args:
        source: Photos.
        num_images: Photos at most.

    Raises:
        UserError: None can be read.
    """
    found: list[int] = []
    problems: list[str] = []
    for index in range(len(source)):
        if len(found) == num_images:
            break
        try:
            source.load(index)
            found.append(index)
        except UnreachableError:
            raise
        except UserError as error:
            logger.warning("left out: %s", error)
            problems.append(str(error))
    if not found:
        raise UserError(f"none of the {len(problems)} pictures can be read; the first: {problems[0]}")
    return ChosenImages(source, found)


def load_photos(images: Images, size: int) -> Tensor:
    """Return photos, resized and centre-cropped, (N, 3, size, size) in [-1, 1].

    Args:
        images: Photos that can be read.
        size: Side in pixels.
    """
    return torch.stack([center_crop(images.load(index), size) for index in range(len(images))])


@torch.no_grad()
def validate(
    vae: AutoencoderKL, objective: Objective, photos: Tensor, device: torch.device
) -> tuple[dict[str, float], Image.Image]:
    """Return the loss of the posterior mode's reconstruction, means over photos, and a picture.

    The picture shows the photos above their reconstructions. The loss is the objective's terms, `loss/reconstruction`
    and so on. Photos run one at a time, so memory does not depend on their number.
    """
    sums: dict[str, float] = {}
    recons = []
    for photo in photos.split(1):
        x = photo.to(device)
        posterior = vae.encode(x).latent_dist
        recon = vae.decode(posterior.mode()).sample
        for name, value in objective(x, recon, posterior).terms.items():
            sums[f"loss/{name}"] = sums.get(f"loss/{name}", 0.0) + float(value)
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
