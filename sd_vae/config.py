"""The architecture of an autoencoder as data: diffusers' config fields, their rules, and the presets.

A config knows nothing of torch, so that `--help` and recipes can read it. Field names, defaults and meaning are those
of `diffusers.AutoencoderKL`; a `config.json` of theirs is a `VAEConfig` of ours.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sd_vae.errors import UserError
from sd_vae.validation import STRICT, from_plain

__all__ = ["PRESETS", "VAEConfig"]

DOWN_BLOCK_TYPES = ("DownEncoderBlock2D", "AttnDownEncoderBlock2D")
UP_BLOCK_TYPES = ("UpDecoderBlock2D", "AttnUpDecoderBlock2D")
ACTIVATIONS = ("silu", "swish", "mish", "gelu", "relu")


@dataclass(frozen=True, kw_only=True)
class VAEConfig:
    """Every field of `diffusers.AutoencoderKL`'s config, with its defaults."""

    __pydantic_config__ = STRICT

    in_channels: int = 3
    """Channels of the images that are encoded."""
    out_channels: int = 3
    """Channels of the images that are decoded."""
    down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",)
    """One encoder block a level, from full size down: DownEncoderBlock2D or AttnDownEncoderBlock2D."""
    up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",)
    """One decoder block a level, from the latent up: UpDecoderBlock2D or AttnUpDecoderBlock2D."""
    block_out_channels: tuple[int, ...] = (64,)
    """Channels of each level from full size down, for both halves; n levels give a factor of 2^(n-1)."""
    layers_per_block: int = 1
    """Residual blocks a level in the encoder; the decoder has one more."""
    act_fn: str = "silu"
    """Activation inside residual blocks: silu, swish, mish, gelu or relu."""
    latent_channels: int = 4
    """Channels of z."""
    norm_num_groups: int = 32
    """Groups of every GroupNorm; divides every entry of block_out_channels."""
    sample_size: int | tuple[int, int] = 32
    """Training size in pixels; only sets the tile size of diffusers' tiling."""
    scaling_factor: float = 0.18215
    """latents = (z - shift_factor) * scaling_factor."""
    shift_factor: float | None = None
    """Subtracted from z before scaling; None is 0."""
    latents_mean: tuple[float, ...] | None = None
    """Per-channel mean; with latents_std, latents = (z - mean) * scaling_factor / std."""
    latents_std: tuple[float, ...] | None = None
    """Per-channel standard deviation."""
    force_upcast: bool = True
    """Ask pipelines to run this VAE in fp32 when they run in fp16."""
    use_quant_conv: bool = True
    """A 1x1 convolution after the encoder."""
    use_post_quant_conv: bool = True
    """A 1x1 convolution before the decoder."""
    mid_block_add_attention: bool = True
    """Self-attention between the two middle residual blocks."""

    def __post_init__(self) -> None:
        """Check the rules between fields.

        Raises:
            UserError: Lists every rule that is broken, with its values.
        """
        problems = list(self._problems())
        if problems:
            raise UserError("not a usable VAE config: " + "; ".join(problems) + ".")

    def _problems(self) -> list[str]:
        found = []
        num_levels = len(self.block_out_channels)
        if num_levels == 0:
            found.append("block_out_channels is empty, give one width a level")
        for name, allowed in (("down_block_types", DOWN_BLOCK_TYPES), ("up_block_types", UP_BLOCK_TYPES)):
            types = getattr(self, name)
            if len(types) != num_levels:
                found.append(f"{name} has {len(types)} entries and block_out_channels {num_levels}, make them equal")
            found += [f"{name} holds {t!r}, choose from {', '.join(allowed)}" for t in types if t not in allowed]
        if self.act_fn.lower() not in ACTIVATIONS:
            found.append(f"act_fn is {self.act_fn!r}, choose from {', '.join(ACTIVATIONS)}")
        for name in ("in_channels", "out_channels", "layers_per_block", "latent_channels", "norm_num_groups"):
            if getattr(self, name) < 1:
                found.append(f"{name} is {getattr(self, name)}, it must be at least 1")
        groups = max(self.norm_num_groups, 1)
        found += [
            f"block_out_channels holds {width}, which norm_num_groups {groups} does not divide"
            for width in self.block_out_channels
            if width < 1 or width % groups
        ]
        tile_sides = (self.sample_size,) if isinstance(self.sample_size, int) else self.sample_size
        if min(tile_sides) < 1:
            found.append(f"sample_size is {self.sample_size}, it must be at least 1")
        if not 0 < self.scaling_factor < math.inf:
            found.append(f"scaling_factor is {self.scaling_factor}, it must be above 0 and finite")
        if not math.isfinite(self.shift_factor or 0.0):
            found.append(f"shift_factor is {self.shift_factor}, it must be finite")
        if (self.latents_mean is None) != (self.latents_std is None):
            found.append("latents_mean and latents_std come together, give both or neither")
        for name in ("latents_mean", "latents_std"):
            values = getattr(self, name)
            if values is not None and len(values) != self.latent_channels:
                found.append(f"{name} has {len(values)} entries, latent_channels is {self.latent_channels}")
        if not all(math.isfinite(mean) for mean in self.latents_mean or ()):
            found.append(f"latents_mean is {self.latents_mean}, every entry must be finite")
        if not all(0 < std < math.inf for std in self.latents_std or ()):
            found.append(f"latents_std is {self.latents_std}, every entry must be above 0 and finite")
        return found

    @property
    def factor(self) -> int:
        """Pixels a latent cell in each direction: 2^(levels - 1)."""
        return int(2 ** (len(self.block_out_channels) - 1))

    @classmethod
    def from_preset(cls, name: str) -> "VAEConfig":
        """Return the config of a preset.

        Raises:
            UserError: No preset has that name.
        """
        if name not in PRESETS:
            raise UserError(f"unknown preset {name!r}; choose one of: {', '.join(PRESETS)}.")
        return PRESETS[name]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, source: str = "VAE config") -> "VAEConfig":
        """Return the config that a `config.json` describes; absent fields take diffusers' defaults.

        Args:
            values: Field names to values; names that start with `_` are diffusers' own and are left out.
            source: What the values come from, for the error.

        Raises:
            UserError: Unknown fields, values of the wrong type, or broken rules, all at once.
        """
        return from_plain(cls, {key: value for key, value in values.items() if not key.startswith("_")}, source=source)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values, ready for JSON."""
        return dataclasses.asdict(self)


def _preset(widths: tuple[int, ...], latent_channels: int = 4, **fields: Any) -> VAEConfig:
    return VAEConfig(
        block_out_channels=widths,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        layers_per_block=2,
        latent_channels=latent_channels,
        **fields,
    )


_SD_WIDTHS = (128, 256, 512, 512)
_NO_QUANT: dict[str, Any] = {"use_quant_conv": False, "use_post_quant_conv": False, "sample_size": 1024}

PRESETS: dict[str, VAEConfig] = {
    "sd1": _preset(_SD_WIDTHS, sample_size=512, scaling_factor=0.18215),
    "sdxl": _preset(_SD_WIDTHS, sample_size=1024, scaling_factor=0.13025),
    "sd3": _preset(_SD_WIDTHS, 16, scaling_factor=1.5305, shift_factor=0.0609, **_NO_QUANT),
    "flux": _preset(_SD_WIDTHS, 16, scaling_factor=0.3611, shift_factor=0.1159, **_NO_QUANT),
    "mini": _preset((32, 64, 128, 128), norm_num_groups=8, sample_size=512, scaling_factor=1.0, force_upcast=False),
}
"""Published architectures by name, and `mini`, 5.2 M parameters for CPUs and tests.

Sources: reference configs of stable-diffusion-v1-5, sdxl-vae, stable-diffusion-3 and FLUX.1. `mini` is trained by this
project; its scaling factor is computed from the data it was trained on.
"""
