"""A detector as one safetensors file, with the name and the fingerprint of the VAE that it belongs to.

The format is described in docs/anomaly.md. The VAE itself is not in the file.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from sd_vae.checkpoints.formats import open_weights, write_safetensors
from sd_vae.data import PictureTransform
from sd_vae.errors import UserError
from sd_vae.files import atomic_file
from sd_vae.latents.anomaly.detector import Detector, ScoreName, score_names
from sd_vae.latents.anomaly.gaussian import Gaussian
from sd_vae.latents.anomaly.network import DefectNet
from sd_vae.latents.fingerprint import decoder_fingerprint, encoder_fingerprint
from sd_vae.validation import STRICT, from_plain

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["FORMAT_VERSION", "Origin", "load_detector", "save_detector", "vae_fingerprint"]

FORMAT_VERSION = 2
"""Version of the file's layout."""

METADATA = "sd_vae_anomaly"
"""Key of the file's metadata under which the origin stands, as JSON."""

GAUSSIANS = ("local", "pooled", "cells", "joint")


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What a detector was made of, and with."""

    __pydantic_config__ = STRICT

    version: int = FORMAT_VERSION
    """Of the layout."""
    vae: str
    """What the VAE was called."""
    fingerprint: str
    """Of its weights, see `vae_fingerprint`."""
    latent_channels: int
    """C."""
    transform: PictureTransform
    """What was cut from each picture."""
    normal: str
    """What the normal pictures were called."""
    num_normal: int
    """How many of them could be used."""
    num_calibrated: int
    """How many of those alarms were calibrated on."""
    num_steps: int
    """Batches that the network learned from; 0 where there is none."""
    seed: int
    """Of the painted defects and the network."""
    lpips_net: str | None = None
    """Network of LPIPS; None where it was left out."""

    @property
    def has_network(self) -> bool:
        """Whether a network was taught."""
        return self.num_steps > 0

    @property
    def scores(self) -> list[ScoreName]:
        """Scores of the detector."""
        return score_names(has_lpips=self.lpips_net is not None, has_network=self.has_network)


def vae_fingerprint(vae: torch.nn.Module) -> str:
    """Return the sha256 of the fingerprints of a VAE's encoder, in its dtype, and of its decoder."""
    halves = encoder_fingerprint(vae) + decoder_fingerprint(vae)
    return hashlib.sha256(halves.encode()).hexdigest()


def save_detector(path: Path | str, detector: Detector, origin: Origin) -> None:
    """Write a detector, whole or not at all.

    Raises:
        UserError: The file cannot be written.
    """
    assert origin.has_network == (detector.net is not None), "the origin is that of the detector"
    tensors: dict[str, Tensor] = {"noise": torch.tensor(detector.noise, dtype=torch.float64)}
    for name in GAUSSIANS:
        tensors |= getattr(detector, name).to_tensors(name)
    if detector.net is not None:
        tensors |= {f"net.{name}": tensor for name, tensor in detector.net.state_dict().items()}
    tensors |= {f"range.{name}": torch.tensor(values, dtype=torch.float64) for name, values in detector.ranges.items()}
    tensors |= {
        f"calibration.{name}": torch.tensor(values, dtype=torch.float64)
        for name, values in detector.calibration.items()
    }
    with atomic_file(Path(path)) as temporary:
        write_safetensors(temporary, tensors, {METADATA: json.dumps(asdict(origin))})


def load_detector(path: Path | str) -> tuple[Detector, Origin]:
    """Return a detector and what it was made of.

    Raises:
        UserError: Missing, damaged, of another version, or not a detector; lists the tensors at fault.
    """
    path = Path(path)
    file = open_weights(path)
    if METADATA not in file.metadata:
        raise UserError(f"{path} is not a detector of sd-vae; give a file that `sd-vae anomaly fit` wrote.")
    origin = _origin(path, file.metadata[METADATA])
    with torch.random.fork_rng(devices=[]):  # its first weights are drawn, and replaced
        net = DefectNet() if origin.has_network else None
    tensors = {name: file.read(name) for name in file.shapes}
    _require_tensors(path, tensors, origin, net)
    if net is not None:
        net.load_state_dict({name.removeprefix("net."): t for name, t in tensors.items() if name.startswith("net.")})
        net.eval().requires_grad_(False)
    return (
        Detector(
            noise=float(tensors["noise"]),
            net=net,
            lpips_net=origin.lpips_net,
            ranges={name: _pair(tensors[f"range.{name}"]) for name in origin.scores if name != "pooled"},
            calibration={name: tuple(tensors[f"calibration.{name}"].tolist()) for name in origin.scores},
            **{name: Gaussian.from_tensors(name, tensors) for name in GAUSSIANS},
        ),
        origin,
    )


def _origin(path: Path, text: str) -> Origin:
    try:
        values = json.loads(text)
    except ValueError as error:
        raise UserError(f"the description in {path} is not JSON ({error}); fit the detector again.") from None
    version = values.get("version") if isinstance(values, dict) else None
    if version != FORMAT_VERSION:
        raise UserError(
            f"{path} has version {version} of a detector's layout, this sd-vae reads version {FORMAT_VERSION}; fit the "
            "detector again, or use the version that wrote it."
        )
    return from_plain(Origin, values, source=str(path))


def _require_tensors(path: Path, tensors: dict[str, Tensor], origin: Origin, net: DefectNet | None) -> None:
    """Check names, shapes and finiteness of all that a detector has."""
    channels, names = origin.latent_channels, origin.scores
    num_figures = 6 if origin.lpips_net is None else 7
    sizes = {
        "local": 9 * channels,
        "pooled": 2 * channels,
        "cells": num_figures,
        "joint": 2 * (num_figures + 1) + 2 * channels,
    }
    wanted: dict[str, tuple[int, ...]] = {"noise": ()}
    for name, size in sizes.items():
        wanted |= {f"{name}.mean": (size,), f"{name}.whitener": (size, size)}
    wanted |= {f"range.{name}": (2,) for name in names if name != "pooled"}
    wanted |= {f"calibration.{name}": (origin.num_calibrated,) for name in names}
    if net is not None:
        wanted |= {f"net.{name}": tuple(tensor.shape) for name, tensor in net.state_dict().items()}
    problems = [f"{name} is missing" for name in wanted if name not in tensors]
    problems += [f"{name} is unexpected" for name in tensors if name not in wanted]
    for name, shape in wanted.items():
        tensor = tensors.get(name)
        if tensor is not None and tuple(tensor.shape) != shape:
            problems.append(f"{name} is {tuple(tensor.shape)} instead of {shape}")
        elif tensor is not None and not tensor.double().isfinite().all():
            problems.append(f"{name} holds NaN or infinity")
    if problems:
        raise UserError(f"{path} is damaged: {'; '.join(problems[:6])}; fit the detector again.")


def _pair(values: Tensor) -> tuple[float, float]:
    low, high = values.tolist()
    return low, high
