"""Loading a VAE from whatever people have, strictly: every tensor present, of its shape, finite, and no other."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sd_vae.checkpoints.formats import WeightFile, as_dtype, open_weights
from sd_vae.checkpoints.keymap import Key, key_table
from sd_vae.checkpoints.layouts import Location, config_of_file, locate, read_config
from sd_vae.config import VAEConfig
from sd_vae.errors import UserError
from sd_vae.weights import SHIPPED_VAES, shipped_folder

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from sd_vae.autoencoder import AutoencoderKL

__all__ = ["Checkpoint", "build_vae", "load_vae", "open_checkpoint", "some"]

logger = logging.getLogger(__name__)

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_WEIGHTS_NAME = "diffusion_pytorch_model"
_FLOATS = re.compile(r"float|bfloat|F8|F4|F6")


@dataclass(frozen=True)
class Checkpoint:
    """A weight file beside the config of the VAE in it, and what does not fit between the two."""

    weights: WeightFile
    """The file."""
    location: Location
    """Where the VAE is in it."""
    config: VAEConfig
    """Its architecture."""
    config_source: str
    """Where that comes from."""
    stored: dict[str, str]
    """Name in the file of every tensor that is there, by diffusers name."""
    missing: tuple[str, ...]
    """Names that should be in the file."""
    unexpected: tuple[str, ...]
    """Names that should not."""
    misshapen: tuple[str, ...]
    """What is wrong with the shape or type of which tensor."""

    def require_complete(self) -> None:
        """Check that the file holds what the config describes and nothing else.

        Raises:
            UserError: Lists what is missing, unexpected and misshapen.
        """
        problems = [
            f"{len(names)} {kind}: {some(names)}"
            for kind, names in (
                ("missing", self.missing),
                ("unexpected", self.unexpected),
                ("misshapen", self.misshapen),
            )
            if names
        ]
        if problems:
            raise UserError(
                f"the tensors in {self.weights.path} do not fit the config from {self.config_source}: "
                f"{'; '.join(problems)}; give the config or the weights that belong together."
            )

    def read_all(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Return copies of all tensors by diffusers name, finite and in one dtype.

        Raises:
            UserError: A tensor holds NaN or infinity.
        """
        tensors = {key.diffusers: self._read(key, dtype) for key in key_table(self.config)}
        damaged = [self.stored[name] for name, tensor in tensors.items() if not bool(tensor.isfinite().all())]
        if damaged:
            raise UserError(
                f"{self.weights.path} has values that are not finite in {len(damaged)} tensors: {some(damaged)}; the "
                "weights are damaged, or overflow this dtype; use another copy, or load it in float32."
            )
        return tensors

    def find_damaged(self) -> tuple[str, ...]:
        """Return the names of the tensors that hold NaN or infinity, looking at one at a time."""
        import torch

        keys = [key for key in key_table(self.config) if key.diffusers in self.stored]
        fitting = [key for key in keys if key.accepts(self.weights.shapes[self.stored[key.diffusers]])]
        damaged = [key for key in fitting if not bool(self._read(key, torch.float32).isfinite().all())]
        return tuple(self.stored[key.diffusers] for key in damaged)

    def _read(self, key: Key, dtype: torch.dtype) -> Tensor:
        stored = self.weights.read(self.stored[key.diffusers]).reshape(key.shape)
        return stored.to(dtype, copy=True)


def load_vae(
    path: str | os.PathLike[str],
    config: VAEConfig | str | os.PathLike[str] | None = None,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
) -> AutoencoderKL:
    """Return the VAE in a folder, file or hub repository, in eval mode.

    Layouts: a diffusers folder or the pipeline folder around it, one of its weight files, an LDM file with
    `first_stage_model.`, a web-UI file without, as safetensors or PyTorch file, alone or inside a full checkpoint, of
    which only the VAE is read. Nothing in a pickle is executed; what was left out of one is logged.

    Args:
        path: Folder, file, hub id (`owner/name`), or the name of weights that ship (`mini`); a path of that name on the
            disk comes first.
        config: A `VAEConfig`, a preset's name, a `config.json` or its folder; by default what lies beside the weights,
            else what their shapes show, which is logged.
        dtype: float32 (the default), float16 or bfloat16.
        device: Where to put it; the CPU by default.

    Raises:
        UserError: Nothing there, not a checkpoint, damaged, tensors missing, unexpected, misshapen or not finite, or
            an architecture that only a config can tell.
    """
    import torch

    wanted = torch.float32 if dtype is None else as_dtype(dtype)
    place = _require_device(device)
    checkpoint = open_checkpoint(path, config)
    checkpoint.require_complete()
    return build_vae(checkpoint, wanted).to(place)


def build_vae(checkpoint: Checkpoint, dtype: torch.dtype) -> AutoencoderKL:
    """Return the model of a complete checkpoint, on the CPU and in eval mode.

    Raises:
        UserError: A tensor holds NaN or infinity.
    """
    import torch

    from sd_vae.autoencoder import AutoencoderKL

    tensors = checkpoint.read_all(dtype)
    with torch.device("meta"):
        vae = AutoencoderKL(**checkpoint.config.to_dict())
    vae.load_state_dict(tensors, strict=True, assign=True)
    return vae.eval()


def open_checkpoint(
    path: str | os.PathLike[str], config: VAEConfig | str | os.PathLike[str] | None = None
) -> Checkpoint:
    """Return what is at a path, or in a hub repository, without reading the weights.

    Raises:
        UserError: Nothing there, not a checkpoint, or an architecture that only a config can tell.
    """
    if not isinstance(path, str | os.PathLike):
        raise UserError(f"path is a {type(path).__name__}; give a folder, a file or a hub id.")
    given = None if config is None else read_config(config)
    try:
        return _open(Path(path), given)
    except OSError as error:
        raise UserError(f"cannot read {error.filename or path}: {error.strerror or error}; check the path.") from None


def _open(place: Path, given: VAEConfig | None) -> Checkpoint:
    if not place.exists():
        place = _resolve_name(str(place))
    if place.is_dir():
        folder = _vae_folder(place, has_config=given is not None)
        weights = _weights_in(folder)
        location = locate(weights)
        config, source = (given, "the caller") if given else (read_config(folder), str(folder / "config.json"))
    else:
        weights = open_weights(place)
        location = locate(weights)
        config, source = (given, "the caller") if given else config_of_file(weights, location)
    return _match(weights, location, config, source)


def _resolve_name(name: str) -> Path:
    """The folder behind a name that is no path: of weights that ship, or of a hub repository's local copy."""
    if name in SHIPPED_VAES:
        return shipped_folder(name)
    if not _HUB_ID.fullmatch(name):
        raise UserError(
            f"there is nothing at {name}; check the path, or give a hub id as owner/name or a VAE that ships: "
            f"{', '.join(SHIPPED_VAES)}."
        )
    return _fetch(name)


def _match(weights: WeightFile, location: Location, config: VAEConfig, config_source: str) -> Checkpoint:
    """The tensors of a file beside those of the table."""
    stored: dict[str, str] = {}
    missing: list[str] = []
    misshapen: list[str] = []
    for key in key_table(config):
        names = [location.prefix + name for name in _names(key, location)]
        name = next((name for name in names if name in weights.shapes), None)
        if name is None:
            missing.append(names[0])
            continue
        stored[key.diffusers] = name
        if not key.accepts(weights.shapes[name]):
            misshapen.append(f"{name} is {weights.shapes[name]}, not {key.shape}")
        elif not _FLOATS.match(weights.dtypes[name]):
            misshapen.append(f"{name} is {weights.dtypes[name]}, not a float type")
    used = set(stored.values())
    if location.ignored:
        logger.info("%s: left out %d tensors of training (%s)", weights.path, len(location.ignored), location.ignored)
    if weights.dropped:
        logger.warning("%s: not loaded, because a pickle is not run: %s", weights.path, some(weights.dropped))
    return Checkpoint(
        weights=weights,
        location=location,
        config=config,
        config_source=config_source,
        stored=stored,
        missing=tuple(missing),
        unexpected=tuple(name for name in (location.prefix + n for n in location.names) if name not in used),
        misshapen=tuple(misshapen),
    )


def _names(key: Key, location: Location) -> tuple[str, ...]:
    return (key.ldm,) if location.naming == "ldm" else (key.diffusers, key.deprecated)


def _vae_folder(folder: Path, *, has_config: bool) -> Path:
    """The folder itself, or the `vae` in it if it is a pipeline's."""
    if (folder / "vae" / "config.json").is_file() and not (folder / f"{_WEIGHTS_NAME}.safetensors").is_file():
        return folder / "vae"
    if (folder / "config.json").is_file() or has_config:
        return folder
    raise UserError(
        f"{folder} holds neither config.json nor a vae folder ({_listing(folder)}); give a folder that does."
    )


def _weights_in(folder: Path) -> WeightFile:
    """The weights of a diffusers folder: the plain ones before a variant, safetensors before PyTorch's `.bin`."""
    for suffix in (".safetensors", ".bin"):
        plain = folder / f"{_WEIGHTS_NAME}{suffix}"
        if plain.is_file():
            return open_weights(plain)
        variants = sorted(folder.glob(f"{_WEIGHTS_NAME}.*{suffix}"))
        if len(variants) > 1:
            raise UserError(
                f"{folder} holds the variants {', '.join(path.name for path in variants)}; give one of these files."
            )
        if variants:
            logger.warning("%s has one variant only, taking %s", folder, variants[0].name)
            return open_weights(variants[0])
    raise UserError(
        f"{folder} has no {_WEIGHTS_NAME}.safetensors or .bin ({_listing(folder)}); give a folder with weights."
    )


def _listing(folder: Path) -> str:
    names = sorted(item.name for item in folder.iterdir())
    return f"it holds {some(names)}" if names else "it is empty"


def _fetch(repository: str) -> Path:
    """The local copy of a VAE on the hub, at the top of the repository or in its `vae` folder."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

    absences: list[str] = []

    def fetch(subfolder: str, name: str) -> Path | None:
        try:
            return Path(hf_hub_download(repository, name, subfolder=subfolder or None))
        except EntryNotFoundError as error:  # not in the repository, or offline and not in the cache
            absences.append(_first_line(error))
            return None

    try:
        for subfolder in ("", "vae"):
            if (config := fetch(subfolder, "config.json")) is None:
                continue
            for suffix in (".safetensors", ".fp16.safetensors", ".bin"):
                if fetch(subfolder, _WEIGHTS_NAME + suffix) is not None:
                    return config.parent
    except (HfHubHTTPError, OSError, ValueError) as error:
        absences.append(_first_line(error))
    raise UserError(
        f"there is no {repository} on this disk, and no VAE of that name came from the hub ({absences[-1]}); check the "
        "name, the network and HF_HUB_OFFLINE, or give a local path."
    )


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _require_device(device: torch.device | str | None) -> torch.device:
    import torch

    try:
        place = torch.device(device or "cpu")
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"device {device!r} cannot be used ({reason}); use cpu or one that torch finds.") from None
    return place


def some(names: Sequence[str], limit: int = 5) -> str:
    """Return the first of some names as text, and how many more there are."""
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {rest} more" if rest > 0 else "")
