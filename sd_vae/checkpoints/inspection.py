"""What is in a checkpoint, told without building the model: for people, and for scripts as JSON."""

from __future__ import annotations

import math
import os
from collections import Counter
from dataclasses import dataclass
from typing import Any

from sd_vae.checkpoints.families import family_of
from sd_vae.checkpoints.keymap import key_table
from sd_vae.checkpoints.layouts import CONFIG_KEY
from sd_vae.checkpoints.load import open_checkpoint
from sd_vae.config import VAEConfig

__all__ = ["Inspection", "inspect_checkpoint"]


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """What is in a checkpoint; lists of names are complete."""

    path: str
    """The weight file that was read."""
    layout: str
    """diffusers, ldm or webui."""
    format: str
    """safetensors, torch zip or torch legacy."""
    file_bytes: int
    """Size of the file."""
    num_parameters: int
    """Numbers in the VAE that the config describes."""
    dtypes: dict[str, int]
    """Tensors of the VAE by dtype."""
    config: dict[str, Any]
    """Its architecture."""
    config_source: str
    """Where that comes from."""
    factor: int
    """Pixels a latent cell in each direction."""
    scaling_factor: float
    """latents = (z - shift_factor) * scaling_factor."""
    shift_factor: float | None
    """Subtracted from z before scaling."""
    family: str | None
    """Model family with that scale and shift."""
    metadata: dict[str, str]
    """Text beside the tensors of a safetensors file."""
    missing: tuple[str, ...]
    """Tensors that the config asks for and the file lacks."""
    unexpected: tuple[str, ...]
    """Tensors that the config does not know."""
    misshapen: tuple[str, ...]
    """Tensors of a wrong shape or type."""
    damaged: tuple[str, ...]
    """Tensors with NaN or infinity."""
    ignored: tuple[str, ...]
    """Leftovers of training: losses, discriminators, EMA copies."""
    num_others: int
    """Tensors of other models in the file."""
    dropped: tuple[str, ...]
    """Globals of a pickle that were not loaded."""

    @property
    def is_sound(self) -> bool:
        """Whether `load_vae` would take it."""
        return not (self.missing or self.unexpected or self.misshapen or self.damaged)


def inspect_checkpoint(
    path: str | os.PathLike[str], config: VAEConfig | str | os.PathLike[str] | None = None
) -> Inspection:
    """Return what is at a path that `load_vae` takes; what is wrong with its tensors is told, not raised.

    Raises:
        UserError: Nothing there, not a checkpoint, damaged as a file, or an architecture that only a config can tell.
    """
    checkpoint = open_checkpoint(path, config)
    weights, location = checkpoint.weights, checkpoint.location
    return Inspection(
        path=str(weights.path),
        layout=location.layout,
        format=weights.format,
        file_bytes=weights.path.stat().st_size,
        num_parameters=sum(math.prod(key.shape) for key in key_table(checkpoint.config)),
        dtypes=dict(Counter(weights.dtypes[name] for name in checkpoint.stored.values())),
        config=checkpoint.config.to_dict(),
        config_source=checkpoint.config_source,
        factor=checkpoint.config.factor,
        scaling_factor=checkpoint.config.scaling_factor,
        shift_factor=checkpoint.config.shift_factor,
        family=family_of(checkpoint.config),
        metadata={key: text for key, text in weights.metadata.items() if key != CONFIG_KEY},
        missing=checkpoint.missing,
        unexpected=checkpoint.unexpected,
        misshapen=checkpoint.misshapen,
        damaged=checkpoint.find_damaged(),
        ignored=location.ignored,
        num_others=location.num_others,
        dropped=weights.dropped,
    )
