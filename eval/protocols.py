"""Named protocols: everything that two people must agree on before their numbers can be compared.

The same model differs by a factor of two in rFID between tools that all say "256x256": by resize filter, sample or
mode, rounding, SSIM window, reference set. Each protocol pins all of it, has a version that changes when a number
could, and is stamped into the report.

Source: the published tables and their harnesses, see docs/evaluation.md.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from sd_vae.errors import UserError

if TYPE_CHECKING:
    from .metrics import SsimWindow

__all__ = ["IMAGE_METRICS", "NETWORKS", "PROTOCOLS", "SET_METRICS", "Protocol", "get_protocol"]

IMAGE_METRICS = (
    "psnr_db",
    "ssim",
    "ms_ssim",
    "lpips_vgg",
    "lpips_alex",
    "lpips_squeeze",
    "l1",
    "ciede2000",
    "colour_shift",
    "gradient_retention",
    "hf_energy_ratio",
)
"""Metrics of one photo and its reconstruction, in the order of the report."""

SET_METRICS = ("rfid", "frechet_vgg", "frechet_alex", "frechet_squeeze")
"""Metrics of all photos and all reconstructions together."""

NETWORKS = {
    "lpips_vgg": "vgg",
    "lpips_alex": "alex",
    "lpips_squeeze": "squeeze",
    "rfid": "inception",
    "frechet_vgg": "vgg",
    "frechet_alex": "alex",
    "frechet_squeeze": "squeeze",
}
"""Metric to the network whose weights it needs."""

COMMON = ("psnr_db", "ssim", "l1", "ciede2000", "colour_shift", "gradient_retention", "hf_energy_ratio")


def _require_metrics(names: Sequence[str]) -> None:
    """Check names of metrics.

    Raises:
        UserError: None, an unknown one, or one given twice.
    """
    known = (*IMAGE_METRICS, *SET_METRICS)
    if not names:
        raise UserError(f"there is no metric to measure; choose from: {', '.join(known)}.")
    for name in names:
        if name not in known:
            raise UserError(f"unknown metric {name!r}; choose from: {', '.join(known)}.")
        if names.count(name) > 1:
            raise UserError(f"metric {name} is given {names.count(name)} times; give it once.")


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How photos become pictures, pictures become reconstructions, and both become numbers."""

    name: str
    """What it is called."""
    version: int
    """Changes whenever a number could."""
    size: int | None
    """The shorter side is resized to this many pixels and the central square kept; None keeps every photo's size."""
    resize_filter: Literal["bilinear", "bicubic", "lanczos"] = "bicubic"
    """Pillow's filter on 8-bit sRGB values; Pillow always widens it when it shrinks, which is antialiasing."""
    latents: Literal["mode", "sample"] = "mode"
    """What is decoded: the posterior's mode, or one draw from it."""
    seed: int = 0
    """Seed of the draws; each photo's depends on it and the photo's name alone."""
    rounding: Literal["nearest", "down"] = "nearest"
    """How decoded values, clamped to [-1, 1], become 8 bits."""
    ssim_window: SsimWindow = "gaussian-11"
    """Window of SSIM; its data range is always 255."""
    metrics: tuple[str, ...]
    """What is measured unless the caller chooses."""

    def __post_init__(self) -> None:
        """Check the metrics' names and the size.

        Raises:
            UserError: An unknown metric, one given twice, none at all, or a size below 1.
        """
        _require_metrics(self.metrics)
        if self.size is not None and self.size < 1:
            raise UserError(
                f"size is {self.size} pixels, it must be at least 1; use a multiple of the VAE's factor, like 512."
            )

    @property
    def image_metrics(self) -> tuple[str, ...]:
        """Those of `metrics` that belong to one photo."""
        return tuple(name for name in IMAGE_METRICS if name in self.metrics)

    @property
    def set_metrics(self) -> tuple[str, ...]:
        """Those of `metrics` that belong to the whole set."""
        return tuple(name for name in SET_METRICS if name in self.metrics)

    def stamp(self) -> dict[str, str]:
        """Return every setting as text, for the report."""
        crop = "kept, padded by reflection to the VAE's factor and cropped back"
        if self.size is not None:
            crop = f"shorter side to {self.size} ({self.resize_filter}, antialiased, Pillow), central square"
        return {
            "name": self.name,
            "version": str(self.version),
            "photo": f"upright 8-bit sRGB; size: {crop}",
            "latents": self.latents + (f", seed {self.seed}" if self.latents == "sample" else ""),
            "reconstruction": f"clamped to [-1, 1], rounded {'down' if self.rounding == 'down' else 'to nearest'}, "
            "8 bits",
            "reference": "the photo as it was encoded, same crop, never recompressed",
            "SSIM": f"window {self.ssim_window}, data range 255",
            "metrics": ", ".join(self.metrics),
        }


PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol(name="pixels", version=1, size=None, metrics=("psnr_db", "ssim")),
        Protocol(name="native", version=1, size=None, metrics=(*COMMON, "lpips_alex")),
        Protocol(name="coco5k-256", version=1, size=256, metrics=(*COMMON, "lpips_vgg", "rfid")),
        Protocol(
            name="imagenet50k-256",
            version=1,
            size=256,
            resize_filter="bilinear",
            latents="sample",
            rounding="down",
            ssim_window="uniform-7",
            metrics=(*COMMON, "lpips_vgg", "rfid"),
        ),
        Protocol(name="sd-512", version=1, size=512, metrics=(*COMMON, "ms_ssim", "lpips_alex", "rfid")),
    )
}
"""Every named protocol; docs/evaluation.md says where each convention comes from."""


def get_protocol(
    protocol: str | Protocol, *, size: int | None = None, metrics: Sequence[str] | None = None
) -> Protocol:
    """Return a protocol by name, with the caller's changes.

    Args:
        protocol: Name, or the protocol itself.
        size: Another size; the result is then called `NAME at SIZE`, because its numbers are not NAME's.
        metrics: What to measure instead of what the protocol names; this changes no number.

    Raises:
        UserError: No such protocol, or what `Protocol` says of size and metrics.
    """
    if isinstance(protocol, str):
        if protocol not in PROTOCOLS:
            raise UserError(f"unknown protocol {protocol!r}; choose one of: {', '.join(PROTOCOLS)}.")
        protocol = PROTOCOLS[protocol]
    if size is not None and size != protocol.size:
        protocol = dataclasses.replace(protocol, name=f"{protocol.name} at {size}", size=size)
    return protocol if metrics is None else dataclasses.replace(protocol, metrics=tuple(metrics))
