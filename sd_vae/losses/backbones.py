"""Finding and reading the ImageNet networks under LPIPS: a file of the user's, the torch hub cache, or a download.

There is no fourth way: a perceptual term never runs on random weights.
"""

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from sd_vae.checkpoints.formats import open_weights
from sd_vae.errors import UserError

__all__ = ["BACKBONES", "Backbone", "find_backbone", "load_backbone_", "place_in_cache", "why_missing"]

MAX_LISTED = 6
"""Tensors named in an error."""


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


def find_backbone(net: str, path: str | None = None) -> Path:
    """Return the checkpoint of a network, whole and undamaged as far as its name tells.

    Args:
        net: vgg, alex or squeeze.
        path: Where it is; None for the torch hub cache, into which it is downloaded if it is not there (never with
            HF_HUB_OFFLINE=1).

    Raises:
        UserError: Nothing there and no download possible, or not the hash that its name promises.
    """
    if path is None and (missing := why_missing(net)):
        raise UserError(
            f"{missing}; copy it there, or set perceptual.backbone to a copy of it (features only will do), or run "
            "once where the internet can be reached. perceptual.net distilled comes with sd-vae; ms_dssim needs no "
            "file."
        )
    file = place_in_cache(net) if path is None else Path(path)
    if not file.is_file():
        raise UserError(f"there is no LPIPS backbone {file}; check perceptual.backbone.")
    prefix = _promised_hash(file)
    if prefix is not None and not (digest := _sha256(file)).startswith(prefix):
        raise UserError(f"{file} is damaged: its sha256 is {digest}, its name promises {prefix}...; fetch it again.")
    return file


def load_backbone_(net: nn.Module, file: Path) -> None:
    """Copy the features of a torchvision checkpoint into a network of the `lpips` package, strictly.

    Args:
        net: The package's network; its `slice2.5.weight` is torchvision's `features.5.weight`.
        file: Checkpoint, .pth or .safetensors, whole or features only (with or without `features.` in the names).

    Raises:
        UserError: Unreadable, of another network, or not finite; lists the tensors at fault.
    """
    stored = open_weights(file)
    features = _feature_names(stored.shapes)
    targets = {"features." + key.partition(".")[2]: tensor for key, tensor in net.state_dict().items()}
    problems = [f"{name} is missing" for name in targets if name not in features]
    for name, stored_name in features.items():
        if name not in targets:
            problems.append(f"{name} is unexpected")
            continue
        tensor, target = stored.read(stored_name), targets[name]
        if tensor.shape != target.shape:
            problems.append(f"{name} is {tuple(tensor.shape)} instead of {tuple(target.shape)}")
        elif not tensor.is_floating_point():
            problems.append(f"{name} is {str(tensor.dtype).removeprefix('torch.')}, not float")
        elif not tensor.isfinite().all():
            problems.append(f"{name} holds NaN or infinity")
        else:
            target.copy_(tensor)
    if problems:
        listed = "; ".join(problems[:MAX_LISTED]) + ("; ..." if len(problems) > MAX_LISTED else "")
        raise UserError(
            f"{file} does not hold the features of LPIPS' {type(net).__name__} ({len(problems)} problems: {listed}); "
            "choose the torchvision checkpoint of that network."
        )


def place_in_cache(net: str) -> Path:
    """Return where the torch hub cache keeps the checkpoint of vgg, alex or squeeze, whether it is there or not."""
    return Path(torch.hub.get_dir()) / "checkpoints" / BACKBONES[net].file_name


def why_missing(net: str) -> str | None:
    """Return why a network's checkpoint is not in the torch hub cache, or None: it is, perhaps downloaded just now."""
    backbone, file = BACKBONES[net], place_in_cache(net)
    if file.is_file():
        return None
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}:
        return _missing(net, file, "HF_HUB_OFFLINE forbids to download it")
    from torchvision.models import get_weight

    url = get_weight(backbone.weights).url
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(file), hash_prefix=_promised_hash(file))
    except (OSError, RuntimeError) as error:  # no route, refused, disk full; a wrong hash is a RuntimeError
        return _missing(net, file, f"downloading {url} failed ({error})")
    return None


def _missing(net: str, file: Path, why: str) -> str:
    backbone = BACKBONES[net]
    return (
        f"LPIPS {net} needs torchvision's {backbone.file_name} (sha256 {backbone.sha256}), which is not in "
        f"{file.parent}, and {why}"
    )


def _promised_hash(file: Path) -> str | None:
    """The first eight digits of the sha256 where the name ends with them, as torchvision's names do."""
    promises = {backbone.file_name: backbone.sha256[:8] for backbone in BACKBONES.values()}
    return promises.get(file.name)


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while block := opened.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _feature_names(names: Iterable[str]) -> dict[str, str]:
    """Torchvision's name of every feature tensor to its name in the file; the classifier is left out."""
    names = list(names)
    if not any(name.startswith("features.") for name in names):
        return {f"features.{name}": name for name in names}
    return {name: name for name in names if not name.startswith("classifier.")}
