"""From measured latents to the scale in a VAE's config, and when that scale must not be touched.

A diffusion model is trained on scaled latents. Whoever changes the scale of a VAE that such a model was trained with
breaks the pair, silently: the pictures come out flat or burnt. So a scale that is a model family's is kept, unless the
encoder is new and no diffusion model depends on it.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sd_vae.checkpoints.families import family_of
from sd_vae.config import VAEConfig
from sd_vae.errors import UserError
from sd_vae.files import read_json, write_json

if TYPE_CHECKING:
    from sd_vae.latents.statistics import LatentStatistics

__all__ = ["Convention", "kept_scale", "scale_fields", "write_scale"]

Convention = Literal["scale", "shift", "channels"]
"""scale: z * scaling_factor (Stable Diffusion 1, 2, XL); shift: (z - shift_factor) * scaling_factor (SD 3, FLUX.1);
channels: (z - latents_mean) / latents_std, for programs that read these."""

_NEUTRAL: dict[str, Any] = {"scaling_factor": 1.0, "shift_factor": None, "latents_mean": None, "latents_std": None}


def scale_fields(statistics: LatentStatistics, convention: Convention) -> dict[str, Any]:
    """Return the config fields that give these latents unit variance, all four of them.

    Raises:
        UserError: The latents, or those of a channel, are constant and have no scale.
    """
    stds = statistics.latents_std if convention == "channels" else (1.0 / statistics.scaling_factor.value,)
    if not all(0 < std < math.inf for std in stds):
        raise UserError(
            f"latents of standard deviation {', '.join(f'{std:g}' for std in stds)} have no scale; measure more "
            "pictures, or train the encoder."
        )
    match convention:
        case "scale":
            found: dict[str, Any] = {"scaling_factor": statistics.scaling_factor.value}
        case "shift":
            found = {
                "scaling_factor": statistics.scaling_factor.value,
                "shift_factor": statistics.shift_factor.value,
            }
        case "channels":
            found = {"latents_mean": statistics.latents_mean, "latents_std": statistics.latents_std}
    return _NEUTRAL | found


def kept_scale(config: VAEConfig) -> str | None:
    """Return why a VAE's scale must stay where only its decoder was trained; None where nothing depends on it.

    Args:
        config: The VAE's.
    """
    family = family_of(config)
    if family is None:
        return None
    shift = f" and shift_factor {config.shift_factor:g}" if config.shift_factor else ""
    return (
        f"scaling_factor {config.scaling_factor:g}{shift} is what diffusion models of the family {family} were trained "
        "with; a VAE whose decoder alone was fine-tuned must keep it"
    )


def write_scale(
    folder: Path | str, fields: dict[str, Any], *, new_encoder: bool = False
) -> tuple[VAEConfig, VAEConfig]:
    """Put a scale into the `config.json` of a VAE's folder, and return its config before and after.

    Everything else in the file stays as it is.

    Args:
        folder: A diffusers folder, or the pipeline folder around one.
        fields: What `scale_fields` gave.
        new_encoder: No diffusion model depends on the scale that is there.

    Raises:
        UserError: No such folder, a scale that must be kept, or a file that cannot be written.
    """
    path = _config_file(Path(folder))
    values = read_json(path)
    before = VAEConfig.from_dict(values, source=str(path))
    reason = kept_scale(before)
    if reason and not new_encoder:
        raise UserError(
            f"{path} is left as it is: {reason}. If its encoder was trained anew, so that no diffusion model depends "
            "on that scale, pass --new-encoder."
        )
    values |= fields
    after = VAEConfig.from_dict(values, source=str(path))
    write_json(path, values)
    return before, after


def _config_file(folder: Path) -> Path:
    for path in (folder / "config.json", folder / "vae" / "config.json"):
        if path.is_file() and folder.is_dir():
            return path
    raise UserError(
        f"{folder} is no folder with a VAE's config.json, and a single file carries no scale; write it to a folder "
        "first: sd-vae convert SRC DST --layout diffusers."
    )
