"""Rewriting a checkpoint in another layout, believed only after the result has been loaded and run.

Before the new file gets its name it is loaded back: every tensor must be, bit for bit, what was meant to be written,
and, where no precision was given away, posterior and decode of a small random picture must equal the source's.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sd_vae.checkpoints.families import family_of, latent_scale
from sd_vae.checkpoints.formats import DTYPES, as_dtype
from sd_vae.checkpoints.layouts import CONFIG_KEY
from sd_vae.checkpoints.load import Checkpoint, build_vae, load_vae, open_checkpoint
from sd_vae.checkpoints.save import Layout, export, require_target, staged
from sd_vae.config import VAEConfig

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from sd_vae.autoencoder import AutoencoderKL

__all__ = ["Conversion", "convert_vae"]

MAX_DEVIATION = 1e-4  # of the largest magnitude; folding a random sd1 VAE moves 2e-6
_PROBE_CELLS = 4


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """What a conversion has written and how it was checked."""

    path: str
    """The new file or folder."""
    layout: str
    """Its layout."""
    dtype: str
    """Its dtype."""
    family: str | None
    """Model family whose scale it has; None for a scale of its own."""
    is_folded: bool
    """The weights were changed so that the family's scale gives the same latents."""
    scaling_factor: float
    """latents = (z - shift_factor) * scaling_factor."""
    shift_factor: float | None
    """Subtracted from z before scaling."""
    num_tensors: int
    """Tensors that were read back and equal what was meant, bit for bit."""
    max_deviation: float
    """Largest difference from the source in scaled mean, std and decode of a random picture, of their magnitude."""


def convert_vae(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    layout: Layout,
    dtype: torch.dtype | str | None = None,
    *,
    family: str | None = None,
    config: VAEConfig | str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    prepare: Callable[[AutoencoderKL], AutoencoderKL] | None = None,
) -> Conversion:
    """Write the VAE at `source` to `target` in another layout, verified before it gets that name.

    Args:
        source: Whatever `load_vae` takes.
        target: Folder for the diffusers layout, a `.safetensors` file for the others.
        layout: As in `save_vae`.
        dtype: float32, float16 or bfloat16; by default the source's, float32 where it mixes several.
        family: As in `save_vae`.
        config: As in `load_vae`.
        overwrite: Replace what is there.
        prepare: From the source in float32 to the model that is written in its place, such as a rescaled one. Called
            when nothing else speaks against the conversion.

    Raises:
        UserError: As `load_vae` and `save_vae`.
    """
    import torch

    checkpoint = open_checkpoint(source, config)
    checkpoint.require_complete()
    original = build_vae(checkpoint, torch.float32)
    if prepare is not None:
        require_target(Path(target), layout, overwrite=overwrite)  # refused now, not after minutes of work
        export(original, layout, family=family)
        original = prepare(original)
    wanted = as_dtype(dtype or _kept_dtype(checkpoint))
    tensors, new_config = export(original, layout, wanted, family=family)
    metadata = {key: text for key, text in checkpoint.weights.metadata.items() if key not in ("format", CONFIG_KEY)}
    with staged(Path(target), layout, tensors, new_config, overwrite=overwrite, metadata=metadata) as written:
        copy = load_vae(written)
        changed = [name for name, tensor in copy.state_dict().items() if not torch.equal(tensor, tensors[name].float())]
        assert not changed, f"read back, {changed[:3]} are not what was written"
        deviation = _deviation(original, copy)
        is_exact = wanted == torch.float32
        assert not is_exact or deviation <= MAX_DEVIATION, f"the copy deviates by {deviation:.1e} of the magnitude"
    return Conversion(
        path=str(target),
        layout=layout,
        dtype=str(wanted).removeprefix("torch."),
        family=family_of(new_config),
        is_folded=latent_scale(new_config) != latent_scale(checkpoint.config),
        scaling_factor=new_config.scaling_factor,
        shift_factor=new_config.shift_factor,
        num_tensors=len(tensors),
        max_deviation=deviation,
    )


def _kept_dtype(checkpoint: Checkpoint) -> str:
    """The dtype that all tensors of a checkpoint have, or float32."""
    (first, *others) = {checkpoint.weights.dtypes[name] for name in checkpoint.stored.values()}
    return first if first in DTYPES and not others else "float32"


def _deviation(original: AutoencoderKL, copy: AutoencoderKL) -> float:
    """The largest difference in scaled mean, scaled std and decode of a random picture, each of its magnitude."""
    import torch

    size = _PROBE_CELLS * original.factor
    noise = torch.rand(1, original.config.in_channels, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        results = [_run(vae, 2 * noise - 1) for vae in (original, copy)]
    pairs = zip(*results, strict=True)
    return max(float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-12)) for theirs, ours in pairs)


def _run(vae: AutoencoderKL, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Scaled mean and std of the posterior, and the decode of latents that depend on nothing but their shape."""
    import torch

    scale, shift = (torch.tensor(values)[:, None, None] for values in latent_scale(VAEConfig.from_dict(vae.config)))
    (posterior,) = vae.encode(x, return_dict=False)
    latents = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(1))
    (decoded,) = vae.decode(latents / scale + shift, return_dict=False)
    return (posterior.mean - shift) * scale, posterior.std * scale, decoded
