"""Finding and reading the ImageNet networks under LPIPS: a file of the user's, the torch hub cache, or a download.

There is no fourth way: a perceptual term never runs on random weights.
"""

from __future__ import annotations

import hashlib
import os
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sd_vae.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["BACKBONES", "Backbone", "read_backbone"]


@dataclass(frozen=True)
class Backbone:
    """A published checkpoint of torchvision."""

    weights: str
    """Name of the weights in `torchvision.models.get_weight`."""
    file_name: str
    """What torchvision calls the file; ends with the first eight digits of its sha256."""
    sha256: str
    """Of the whole file."""


BACKBONES = {
    "vgg": Backbone(
        "VGG16_Weights.IMAGENET1K_V1",
        "vgg16-397923af.pth",
        "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0",
    ),
    "alex": Backbone(
        "AlexNet_Weights.IMAGENET1K_V1",
        "alexnet-owt-7be5be79.pth",
        "7be5be791159472b1fbf3c69796f7cb30dca7ad8466c2df70058c37116cdee02",
    ),
    "squeeze": Backbone(
        "SqueezeNet1_1_Weights.IMAGENET1K_V1",
        "squeezenet1_1-b8a52dc0.pth",
        "b8a52dc049b60e4b6ab68ad0df457362afab8b6304b2febdc1650a5dab4d7e7b",
    ),
}
"""LPIPS' name of a network to the checkpoint it was calibrated on."""


def read_backbone(net: str, path: str | None = None) -> dict[str, Tensor]:
    """Return the convolutional features of a network under torchvision's names, `features.*`, in fp32.

    Args:
        net: vgg, alex or squeeze.
        path: Checkpoint, .pth or .safetensors, whole or features only; None for the torch hub cache, into which it is
            downloaded if it is not there (never with HF_HUB_OFFLINE=1).

    Raises:
        UserError: Nothing there and no download possible, a damaged file, or one that holds something else.
    """
    file = Path(path) if path is not None else _find_in_cache(net)
    _require_intact(file)
    return _features(_read_tensors(file), file)


def _find_in_cache(net: str) -> Path:
    """The checkpoint in the torch hub cache, downloaded if it is not there."""
    import torch

    backbone = BACKBONES[net]
    file = Path(torch.hub.get_dir()) / "checkpoints" / backbone.file_name
    if file.is_file():
        return file
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}:
        raise _missing(net, file, "HF_HUB_OFFLINE is set")
    from torchvision.models import get_weight

    url = get_weight(backbone.weights).url
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(file), hash_prefix=_hash_prefix(file))
    except (OSError, RuntimeError) as error:  # no route, refused, full disk; a wrong hash is a RuntimeError
        raise _missing(net, file, f"downloading {url} failed: {error}") from error
    return file


def _missing(net: str, file: Path, why: str) -> UserError:
    backbone = BACKBONES[net]
    return UserError(
        f"LPIPS {net} needs torchvision's {backbone.file_name} (sha256 {backbone.sha256}), which is not in "
        f"{file.parent}, and {why}; copy it there, or set perceptual.backbone to a copy of it (features only will do), "
        "or run once on a machine with internet access; perceptual.net ms_ssim needs no file."
    )


def _hash_prefix(file: Path) -> str | None:
    """The first eight digits of the sha256 where the name promises them, as torchvision's names do."""
    promised = {backbone.file_name: backbone.sha256[:8] for backbone in BACKBONES.values()}
    return promised.get(file.name)


def _require_intact(file: Path) -> None:
    """Check a file under torchvision's name against the hash in that name."""
    if not file.is_file():
        raise UserError(f"there is no LPIPS backbone {file}; check perceptual.backbone.")
    prefix = _hash_prefix(file)
    if prefix is None:
        return
    digest = _sha256(file)
    if not digest.startswith(prefix):
        raise UserError(f"{file} is damaged: its sha256 is {digest}, its name promises {prefix}...; fetch it again.")


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while block := opened.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _read_tensors(file: Path) -> dict[str, Any]:
    """All tensors of a checkpoint; code in a pickle is never run."""
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        content = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError, SafetensorError) as error:
        reason = str(error).split("\n")[0]
        raise UserError(f"cannot read the LPIPS backbone {file}: {reason}; fetch it again.") from error
    if not isinstance(content, dict):
        raise UserError(f"{file} holds a {type(content).__name__}, not a dictionary of tensors; choose a state dict.")
    return content


def _features(content: dict[str, Any], file: Path) -> dict[str, Tensor]:
    """The features among a checkpoint's tensors, finite and in fp32."""
    import torch

    bare = not any(key.startswith("features.") for key in content)
    found = {f"features.{key}" if bare else key: value for key, value in content.items()}
    found = {key: value for key, value in found.items() if not key.startswith("classifier.")}
    for key, value in found.items():
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            raise UserError(f"{file} holds no float tensor at {key}; choose a torchvision checkpoint.")
        if not value.isfinite().all():
            raise UserError(f"{key} in {file} holds values that are not finite; fetch the file again.")
    return {key: value.float() for key, value in found.items()}
