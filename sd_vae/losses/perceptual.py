"""Perceptual distances between a reconstruction and its image: LPIPS, and multi-scale DSSIM where no network is there.

Shapes: B batch, D feature channels, H W pixels, h w cells of a feature map.

Sources: Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric", arXiv 1801.03924, by
way of the `lpips` package; Wang, Simoncelli and Bovik, "Multi-scale structural similarity for image quality
assessment", Asilomar 2003, by way of torchmetrics.
"""

from __future__ import annotations

import logging
import warnings
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from sd_vae.errors import UserError
from sd_vae.losses.backbones import find_backbone, load_backbone_, why_missing
from sd_vae.losses.config import PerceptualConfig
from sd_vae.losses.reconstruction import require_same_shape

__all__ = ["LPIPS", "MultiScaleDSSIM", "Perceptual", "build_perceptual", "choose_net"]

logger = logging.getLogger(__name__)

MIN_LPIPS_SIZE = {"vgg": 16, "alex": 31, "squeeze": 17}
"""Pixels below which a network's last feature map is empty."""

MS_SSIM_EXPONENTS = (0.0448, 0.2856, 0.3001)
"""Of the five of Wang et al. the three finest, whose 11x11 window still fits a 64x64 training crop."""
MIN_MS_SSIM_SIZE = 44
"""Rule of torchmetrics: the side divided by (number of scales - 1)^2 exceeds the window minus one."""


def choose_net(config: PerceptualConfig) -> PerceptualConfig:
    """Return the config with its network named, where there is a term and it was left open.

    That is vgg where its weights are there or can be fetched; otherwise distilled, with a warning.
    """
    if config.weight == 0 or config.net != "auto":
        return config
    missing = why_missing("vgg")
    if missing is None:
        return replace(config, net="vgg")
    logger.warning(
        "NOT LPIPS: the perceptual term is `distilled`, this project's own small network that was taught by LPIPS, "
        "because perceptual.net is auto and %s. Published recipes use LPIPS vgg.",
        missing,
    )
    return replace(config, net="distilled")


def build_perceptual(config: PerceptualConfig) -> Perceptual | None:
    """Return the perceptual term, frozen and in eval mode; None for weight 0, for which nothing is built or downloaded.

    Raises:
        UserError: The network's weights are missing or not what they should be.
    """
    config = choose_net(config)
    if config.weight == 0:
        return None
    if config.net == "ms_dssim":
        return MultiScaleDSSIM()
    if config.net == "distilled":
        from sd_vae.losses.distilled import Distilled  # it is built on this module

        return Distilled(config.backbone)
    return LPIPS(config.net, config.backbone)


class Perceptual(nn.Module):
    """A frozen distance between images; lower is better, 0 is equal. Stays in eval mode whatever `train()` is told."""

    name: str
    """What it is logged and reported as."""
    min_size: int
    """Pixels that height and width need at least."""

    def forward(self, recon: Tensor, x: Tensor) -> Tensor:
        """Return the distance of each reconstruction to its image, (B,), fp32 also under autocast.

        Args:
            recon: Reconstructions (B, 3, H, W), around [-1, 1]; gradients flow to it.
            x: Images (B, 3, H, W) in [-1, 1]; taken as a constant.

        Raises:
            UserError: Shapes differ, there are not 3 channels, or H or W is below `min_size`.
        """
        require_same_shape(recon, x)
        if recon.shape[1] != 3:
            raise UserError(
                f"{self.name} compares RGB images, these have {recon.shape[1]} channels; set its weight to 0."
            )
        self.require_size(*x.shape[-2:])
        with torch.autocast(x.device.type, enabled=False):
            return self.distance(recon.float(), x.detach().float())

    def require_size(self, height: int, width: int) -> None:
        """Check that images of this many pixels can be compared.

        Raises:
            UserError: One side is below `min_size`.
        """
        if min(height, width) < self.min_size:
            raise UserError(
                f"{self.name} needs images of at least {self.min_size}x{self.min_size} pixels, these are "
                f"{height}x{width}; train on larger crops or choose another perceptual.net."
            )

    def distance(self, recon: Tensor, x: Tensor) -> Tensor:
        """Return the distances (B,) of checked fp32 batches."""
        raise NotImplementedError

    def train(self, mode: bool = True) -> Perceptual:
        """Stay in eval mode: dropout in the heads of LPIPS would make it another metric."""
        del mode
        return super().train(False)


class LPIPS(Perceptual):
    """LPIPS v0.1 with the heads that the `lpips` package ships.

    sum over layers of mean over h, w of sum over D of head_D * (unit(features(recon)) - unit(features(x)))_D^2.

    Args:
        net: vgg, alex or squeeze.
        backbone: File with its torchvision weights; None for the torch hub cache.

    Raises:
        UserError: The weights are missing or not what they should be.
    """

    def __init__(self, net: str, backbone: str | None = None) -> None:
        super().__init__()
        file = find_backbone(net, backbone)
        self.name = f"lpips_{net}"
        self.min_size = MIN_LPIPS_SIZE[net]
        self.model = _build_lpips(net)
        load_backbone_(self.model.net, file)
        self.model.requires_grad_(False)
        self.eval()

    def distance(self, recon: Tensor, x: Tensor) -> Tensor:
        """Return the distances (B,); the target's features keep no graph."""
        return torch.stack([each.mean(dim=(1, 2)) for each in self.cell_distances(recon, x)]).sum(dim=0)

    def cell_distances(self, recon: Tensor, x: Tensor) -> list[Tensor]:
        """Return the distance in each cell, (B, h, w), one map a layer; the target's features keep no graph."""
        with torch.no_grad():
            features_x = self._features(x)
        features_recon = self._features(recon)
        return [
            head((ours - theirs).square())[:, 0]
            for head, ours, theirs in zip(self.model.lins, features_recon, features_x, strict=True)
        ]

    def _features(self, x: Tensor) -> list[Tensor]:
        """Feature maps (B, D, h, w), one a layer, each cell scaled to unit length over D."""
        from lpips import normalize_tensor

        return [normalize_tensor(features) for features in self.model.net(self.model.scaling_layer(x))]


class MultiScaleDSSIM(Perceptual):
    """Structural dissimilarity over three scales: 64x64 crops can be compared, and there is always a gradient.

    1 - product over scales j of ((1 + s_j) / 2)^beta_j, on data range 2; s_j in [-1, 1] is the similarity of structure,
    at the coarsest scale times that of brightness, and beta_j are the exponents of the three finest scales of Wang et
    al., scaled to sum 1. The metric MS-SSIM has s_j^beta_j, cut off at 0: for an untrained network, whose output
    resembles nothing, its gradient is 0. The values are therefore a loss's, neither comparable with the metric's nor
    called like them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.name = "ms_dssim"
        self.min_size = MIN_MS_SSIM_SIZE
        self.eval()

    def distance(self, recon: Tensor, x: Tensor) -> Tensor:
        """Return the distances (B,)."""
        from torchmetrics.functional.image import multiscale_structural_similarity_index_measure as ms_ssim

        exponents = tuple(exponent / sum(MS_SSIM_EXPONENTS) for exponent in MS_SSIM_EXPONENTS)
        similarity = ms_ssim(recon, x, data_range=2.0, betas=exponents, normalize="simple", reduction="none")
        return 1.0 - similarity


def _build_lpips(net: str) -> Any:
    """The package's model with its own heads and a backbone that is still random."""
    import lpips

    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        # The package still calls torchvision by its old `pretrained` argument.
        warnings.filterwarnings("ignore", category=UserWarning, module=r"torchvision\.models\._utils")
        return lpips.LPIPS(net=net, version="0.1", pretrained=True, pnet_rand=True, verbose=False)
