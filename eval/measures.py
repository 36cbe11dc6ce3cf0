"""The metrics of one evaluation with the networks they need, each loaded once from a file whose sha256 is stamped.

A network comes from a file that the caller names, or from the torch hub cache. Where it is missing nothing is measured:
the error names the file, its sha256, the ways to provide it and how to leave the metric out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from sd_vae.errors import UserError
from sd_vae.images import to_tensor

from . import detail, metrics
from .metrics import METRICS, MIN_SIZE, Metric, perceptual_metric
from .protocols import NETWORKS
from .protocols import Protocol as EvaluationProtocol

if TYPE_CHECKING:
    from PIL import Image

    from .features import Features

__all__ = ["Measures", "Perceptual", "build_measures"]

PictureMetric = Callable[["Image.Image", "Image.Image"], float]

PLAIN: dict[str, PictureMetric] = {
    "psnr_db": metrics.psnr_db,
    "ms_ssim": metrics.ms_ssim,
    "l1": metrics.l1,
    "ciede2000": detail.ciede2000,
    "colour_shift": detail.colour_shift,
    "gradient_retention": detail.gradient_retention,
    "hf_energy_ratio": detail.hf_energy_ratio,
}
"""Metrics that need neither a network nor the protocol."""


class Perceptual(Protocol):
    """A perceptual distance under its own name, such as what `sd_vae.losses.build_perceptual` returns."""

    name: str

    def __call__(self, recon: Tensor, x: Tensor) -> Tensor:
        """Return one distance per item (B,), lower is closer, of images (B, 3, H, W) in [-1, 1]."""


class Measures:
    """What is measured of each photo and of the set.

    Args:
        functions: Metric name to a function of (reconstruction, photo), in the order of the report.
        table: How each of them is read.
        features: Networks of the metrics of the whole set, by metric.
        stamp: Network to the sha256 of its file.
    """

    def __init__(
        self,
        functions: Mapping[str, PictureMetric],
        table: Mapping[str, Metric],
        features: Mapping[str, Features],
        stamp: Mapping[str, str],
    ) -> None:
        self.functions = dict(functions)
        self.table = dict(table)
        self.features = dict(features)
        self.stamp = dict(stamp)

    def of(self, recon: Image.Image, x: Image.Image) -> dict[str, float]:
        """Return every metric of one photo and its reconstruction, 8-bit RGB of one size."""
        return {name: measure(recon, x) for name, measure in self.functions.items()}

    def require_size(self, x: Image.Image) -> None:
        """Check that a photo is large enough for every metric.

        Raises:
            UserError: Names the metric and the size that it needs.
        """
        for name in self.functions:
            is_ours = self.table[name] is METRICS.get(name)  # and not a perceptual loss of the same name
            smallest = MIN_SIZE.get(name, 1) if is_ours else 1
            if min(x.size) < smallest:
                raise UserError(
                    f"{self.table[name].label} needs pictures of at least {smallest}x{smallest} pixels, this one has "
                    f"{x.width}x{x.height}; leave out the photo, or the metric by --metrics."
                )


def build_measures(
    protocol: EvaluationProtocol,
    *,
    weights: Mapping[str, str] | None = None,
    perceptual: Perceptual | None = None,
    device: torch.device | str = "cpu",
) -> Measures:
    """Return the metrics of a protocol, ready to run.

    Args:
        protocol: Says which metrics, and SSIM's window.
        weights: Network (vgg, alex, squeeze, inception) to the file of its weights; the torch hub cache for others.
        perceptual: A distance of the caller's own, measured too.
        device: Where networks run.

    Raises:
        UserError: A network's weights are missing or not what they should be, an unknown network, or the caller's
            distance has the name of another metric.
    """
    given = dict(weights or {})
    if unknown := sorted(set(given) - set(NETWORKS.values())):
        known = ", ".join(dict.fromkeys(NETWORKS.values()))
        raise UserError(f"weights are given for {unknown[0]!r}; choose from: {known}.")
    functions: dict[str, PictureMetric] = {}
    stamp: dict[str, str] = {}
    for name in protocol.image_metrics:
        if name == "ssim":
            functions[name] = lambda recon, x: metrics.ssim(recon, x, protocol.ssim_window)
        elif name in NETWORKS:
            network, sha256 = _lpips(NETWORKS[name], given.get(NETWORKS[name]), device)
            functions[name] = _distance(network)
            stamp[f"{name} weights"] = sha256
        else:
            functions[name] = PLAIN[name]
    features: dict[str, Features] = {}
    if protocol.set_metrics:
        from .features import build_features

        for name in protocol.set_metrics:
            features[name] = build_features(NETWORKS[name], given.get(NETWORKS[name])).to(device)
            stamp[f"{name} weights"] = features[name].sha256
    table = {name: METRICS[name] for name in functions}
    if perceptual is not None:
        if perceptual.name in functions:
            raise UserError(f"two metrics are called {perceptual.name}; leave one of them out.")
        functions[perceptual.name] = _distance(perceptual)
        table[perceptual.name] = METRICS.get(perceptual.name) or perceptual_metric(perceptual.name)
        if table[perceptual.name].higher_is_better is not False:
            raise UserError(f"a distance is called {perceptual.name}, which is a metric of another kind; rename it.")
    return Measures(functions, table, features, stamp)


def _lpips(net: str, file: str | None, device: torch.device | str) -> tuple[Perceptual, str]:
    """LPIPS and the sha256 of its backbone's file."""
    from sd_vae.losses.backbones import find_backbone
    from sd_vae.losses.perceptual import LPIPS

    from .features import leave_out, sha256_of

    with leave_out(f"lpips_{net}", net):
        found = find_backbone(net, file)
        return LPIPS(net, str(found)).to(device), sha256_of(found)


def _distance(perceptual: Perceptual) -> PictureMetric:
    """A perceptual distance as a metric of pictures, on the device of its network if it has one."""
    network = perceptual if isinstance(perceptual, torch.nn.Module) else torch.nn.Identity()
    device = next((parameter.device for parameter in network.parameters()), torch.device("cpu"))

    @torch.inference_mode()
    def measure(recon: Image.Image, x: Image.Image) -> float:
        return float(perceptual(to_tensor(recon).to(device), to_tensor(x).to(device)))

    return measure
