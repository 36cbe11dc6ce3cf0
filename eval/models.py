"""Any image autoencoder of diffusers behind one face: pictures to raw latents, raw latents to pictures.

The classes differ in what `encode` returns (a posterior, or latents), in where they keep their factor, and in whether
decoding draws noise. Here that is said once, so that every model of a report is treated alike.

Shapes: B batch, C latent channels, H W pixels, h w latent cells.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sd_vae.errors import UserError
from sd_vae.files import read_json
from sd_vae.latents.fingerprint import tensors_fingerprint

if TYPE_CHECKING:
    from sd_vae._diffusers import DiagonalGaussianDistribution

__all__ = [
    "AUTOENCODERS",
    "Encoded",
    "decode",
    "display_name",
    "encode",
    "factor_of",
    "load_autoencoder",
    "quiet_diffusers",
    "require_autoencoder",
    "weights_fingerprint",
]

AUTOENCODERS = (
    "AutoencoderKL",
    "AsymmetricAutoencoderKL",
    "AutoencoderTiny",
    "VQModel",
    "ConsistencyDecoderVAE",
    "AutoencoderDC",
)
"""diffusers' classes that are evaluated, subclasses included."""

DRAWS_NOISE = ("ConsistencyDecoderVAE",)
"""Those whose decoder takes a generator and is random without one."""

TINY_LATENT_WEIGHT = "decoder.layers.0.weight"
"""In files of TAESD: the decoder's first convolution, (64, C, 3, 3)."""


@dataclass(frozen=True)
class Encoded:
    """What an encoder makes of images."""

    z: Tensor
    """Raw latents (B, C, h, w): the posterior's mode where there is one."""
    posterior: DiagonalGaussianDistribution | None
    """q(z|x); None for models that encode to a point."""


def require_autoencoder(name: str, vae: object) -> None:
    """Check that a model can be evaluated.

    Raises:
        UserError: Not one of `AUTOENCODERS`, or not for RGB pictures.
    """
    if not _class_name(vae):
        raise UserError(
            f"{name!r} is a {type(vae).__name__}, it must be one of diffusers' {', '.join(AUTOENCODERS)}; load it with "
            "load_vae or eval.models.load_autoencoder."
        )
    config: Any = getattr(vae, "config")  # noqa: B009  # an object to mypy, a diffusers model here
    channels = config.get("in_channels", 3), config.get("out_channels", 3)
    if channels != (3, 3):
        raise UserError(
            f"{name!r} takes {channels[0]} channels and gives {channels[1]}, photos have 3 (RGB); "
            "choose a VAE for RGB pictures."
        )


def factor_of(vae: Any) -> int:
    """Return how many pixels a latent cell spans along each side."""
    ratio = getattr(vae, "spatial_compression_ratio", None)
    if isinstance(ratio, int):
        return ratio
    config = vae.config
    blocks = config.get("down_block_out_channels") or config.block_out_channels
    return int(2 ** (len(blocks) - 1))


@torch.inference_mode()
def encode(vae: Any, x: Tensor) -> Encoded:
    """Return raw latents of images.

    Args:
        vae: One of `AUTOENCODERS`.
        x: (B, 3, H, W) in [-1, 1], on the model's device and in its dtype; H and W divisible by the factor.
    """
    found = vae.encode(x)
    if hasattr(found, "latent_dist"):
        return Encoded(found.latent_dist.mode(), found.latent_dist)
    return Encoded(found.latents if hasattr(found, "latents") else found.latent, None)


@torch.inference_mode()
def decode(vae: Any, z: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Return images (B, 3, H, W), around [-1, 1] and unclamped, of raw latents.

    Args:
        vae: One of `AUTOENCODERS`.
        z: Raw latents (B, C, h, w).
        generator: Where a consistency decoder's noise comes from; the others draw none.
    """
    if _class_name(vae) in DRAWS_NOISE:
        return vae.decode(z, generator=generator).sample
    return vae.decode(z).sample


def load_autoencoder(
    path: str | os.PathLike[str],
    config: str | None = None,
    *,
    dtype: torch.dtype | str = "float32",
    device: torch.device | str = "cpu",
) -> Any:
    """Return the autoencoder in a folder or file, or at a hub id, in eval mode.

    Whatever `sd_vae.load_vae` reads, folders of diffusers' other image autoencoders by the `_class_name` in their
    config.json, and single files of TAESD, which are known by their tensors' names.

    Args:
        path: Folder, file or hub id.
        config: As in `load_vae`, for files that do not say their architecture.
        dtype: What to compute in.
        device: Where to put it.

    Raises:
        UserError: As `load_vae`, or a class that is not among `AUTOENCODERS`, or weights that do not fit it.
    """
    from sd_vae.checkpoints import load_vae

    place = Path(path)
    class_name = _class_in(place)
    if class_name not in (None, "AutoencoderKL"):
        vae = _load_folder(place, class_name)
    elif place.is_file() and config is None and (tiny := _load_tiny(place)) is not None:
        vae = tiny
    else:
        return load_vae(path, config, dtype=dtype, device=device)
    from sd_vae.checkpoints.formats import as_dtype

    with quiet_diffusers():
        return vae.to(device, as_dtype(dtype)).eval()


def display_name(path: str) -> str:
    """Return what to call the autoencoder at a path: its file or folder name, and that its weights have 8 bits."""
    from sd_vae.checkpoints.formats import open_weights

    place = Path(path)
    name = place.name or place.resolve().name or path
    if place.suffix != ".safetensors" or not place.is_file():
        return name
    has_8_bits = any(dtype.startswith("F8") for dtype in open_weights(place).dtypes.values())
    return f"{place.stem} (8-bit weights)" if has_8_bits else name


def weights_fingerprint(vae: torch.nn.Module) -> str:
    """Return the sha256 of a model's weights, as `sd_vae.latents.fingerprint.tensors_fingerprint` takes it."""
    return tensors_fingerprint(vae.state_dict())


def _class_name(vae: object) -> str:
    """Which of `AUTOENCODERS` a model is, also as a subclass; empty for none."""
    names = {parent.__name__ for parent in type(vae).__mro__ if parent.__module__.split(".")[0] == "diffusers"}
    return next((name for name in AUTOENCODERS if name in names), "")


def _class_in(place: Path) -> str | None:
    """The class that a folder's config.json names; None where there is no such folder or file."""
    file = place / "config.json"
    if not file.is_file():
        return None
    values = read_json(file)
    return values.get("_class_name") if isinstance(values, Mapping) else None


def _load_folder(place: Path, class_name: str | None) -> Any:
    """The model of a diffusers folder whose class is not AutoencoderKL."""
    if class_name not in AUTOENCODERS:
        raise UserError(
            f"{place / 'config.json'} says _class_name {class_name!r}; it must be one of: {', '.join(AUTOENCODERS)}."
        )
    import diffusers

    try:
        with quiet_diffusers():
            vae, report = getattr(diffusers, class_name).from_pretrained(
                place, local_files_only=True, low_cpu_mem_usage=False, output_loading_info=True
            )
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"cannot load the {class_name} in {place}: {_first_line(error)}; fetch it again.") from error
    missing = sorted(report["missing_keys"]) + sorted(report["unexpected_keys"])
    if missing:
        raise UserError(
            f"{place} does not hold the weights of its {class_name}: {missing[0]} and {len(missing) - 1} more tensors "
            "are missing or unexpected; fetch it again."
        )
    return vae


def _load_tiny(file: Path) -> Any:
    """The AutoencoderTiny of a single file, encoder and decoder; None where the file is something else."""
    from sd_vae.checkpoints.formats import open_weights, sniff

    if sniff(file) != "safetensors":
        return None
    stored = open_weights(file)
    if TINY_LATENT_WEIGHT not in stored.shapes or "encoder.layers.0.weight" not in stored.shapes:
        return None
    from diffusers import AutoencoderTiny

    vae = AutoencoderTiny(latent_channels=stored.shapes[TINY_LATENT_WEIGHT][1])
    wanted = {name: tuple(tensor.shape) for name, tensor in vae.state_dict().items()}
    found = {name: tuple(shape) for name, shape in stored.shapes.items()}
    wrong = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
    if wrong:
        raise UserError(
            f"{file} looks like a TAESD and is none: {wrong[0]} and {len(wrong) - 1} more tensors do not fit; give a "
            "diffusers folder, whose config.json says the architecture."
        )
    vae.load_state_dict({name: stored.read(name).float() for name in wanted})
    return vae


@contextmanager
def quiet_diffusers() -> Iterator[None]:
    """Keep diffusers from logging, such as its remark on every change of dtype."""
    from diffusers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
