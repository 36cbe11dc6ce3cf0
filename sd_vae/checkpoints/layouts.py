"""Where the VAE is in a file: which naming, behind which prefix, and which architecture.

A config comes from the first of: the caller, the folder `<stem>_config` beside the file, the safetensors metadata that
`save_vae` writes, a `config.json` beside the file, the shapes of the tensors. The last one leaves the scale open, which
no tensor shows, so what is assumed is logged.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sd_vae.checkpoints.formats import WeightFile
from sd_vae.config import PRESETS, VAEConfig
from sd_vae.errors import UserError
from sd_vae.files import read_json

__all__ = ["CONFIG_KEY", "Location", "config_folder", "config_of_file", "locate", "read_config"]

logger = logging.getLogger(__name__)

CONFIG_KEY = "sd_vae.config"
"""Name under which `save_vae` keeps the config as JSON in the metadata of a single file."""

_PREFIXES = ("first_stage_model.", "vae.", "")
_IGNORED = re.compile(r"(loss|model_ema|ema|(encoder|decoder|quant_conv|post_quant_conv)_ema)\.")
_DIFFUSERS = re.compile(r"(encoder|decoder)\.(down_blocks|mid_block|up_blocks)\.")
_ENTRANCES = ("encoder.conv_in.weight", "decoder.conv_in.weight")
_LAYER = re.compile(r"(encoder|decoder)\.(?:down|up)(?:_blocks)?\.(\d+)\.(block|resnets|attn|attentions)\.(\d+)\.")
_ATTENTIONS = ("attn", "attentions")
_FULL_CHECKPOINT_MARKS = {
    "sdxl": "conditioner.embedders.",
    "sd1": "cond_stage_model.",
    "sd3": "model.diffusion_model.joint_blocks.",
    "flux": "model.diffusion_model.double_blocks.",
}


@dataclass(frozen=True)
class Location:
    """Where in a file the VAE's tensors are."""

    naming: Literal["diffusers", "ldm"]
    """Whose names they carry."""
    prefix: str
    """What stands before each name."""
    names: tuple[str, ...]
    """Names behind the prefix, without those below."""
    ignored: tuple[str, ...]
    """Leftovers of training behind the prefix: losses, discriminators, EMA copies."""
    num_others: int
    """Tensors of other models in the file."""

    @property
    def layout(self) -> Literal["diffusers", "ldm", "webui"]:
        """Layout as `INTERFACE` names it."""
        if self.naming == "diffusers":
            return "diffusers"
        return "ldm" if self.prefix else "webui"


def locate(weights: WeightFile) -> Location:
    """Return where the VAE is in a weight file.

    Raises:
        UserError: There is none.
    """
    for prefix in _PREFIXES:
        if any(prefix + name in weights.shapes for name in _ENTRANCES):
            inner = [name.removeprefix(prefix) for name in weights.shapes if name.startswith(prefix)]
            names = tuple(name for name in inner if not _IGNORED.match(name))
            return Location(
                naming="diffusers" if any(map(_DIFFUSERS.match, names)) else "ldm",
                prefix=prefix,
                names=names,
                ignored=tuple(name for name in inner if _IGNORED.match(name)),
                num_others=len(weights.shapes) - len(inner),
            )
    first = ", ".join(list(weights.shapes)[:3])
    raise UserError(
        f"{weights.path} holds no KL autoencoder: none of its {len(weights.shapes)} tensors ({first}, ...) is named "
        "encoder.conv_in.weight, with or without first_stage_model. before it; give a VAE or a full checkpoint."
    )


def config_folder(path: Path) -> Path:
    """Return the folder beside a single file that holds its `config.json`."""
    return path.with_name(f"{path.stem}_config")


def read_config(source: VAEConfig | str | os.PathLike[str]) -> VAEConfig:
    """Return a config from itself, a preset's name, a `config.json`, or a folder or pipeline folder that holds one.

    Raises:
        UserError: None of these, or it describes another kind of model.
    """
    if isinstance(source, VAEConfig):
        return source
    if isinstance(source, str) and source in PRESETS:
        return PRESETS[source]
    if not isinstance(source, str | os.PathLike):
        raise UserError(f"config is a {type(source).__name__}; give a VAEConfig, a path or a preset's name.")
    path = Path(source)
    for candidate in (path, path / "config.json", path / "vae" / "config.json"):
        if candidate.is_file():
            return _parse_config(read_json(candidate), str(candidate))
    raise UserError(
        f"there is no VAE config at {path}; give a config.json, a folder that holds one, or a preset: "
        f"{', '.join(PRESETS)}."
    )


def _parse_config(values: object, source: str) -> VAEConfig:
    if not isinstance(values, Mapping):
        raise UserError(f"{source} holds a {type(values).__name__}, not a config; give the config.json of a VAE.")
    kind = values.get("_class_name", "AutoencoderKL")
    if kind != "AutoencoderKL":
        raise UserError(f"{source} describes a {kind}, not an AutoencoderKL; give the folder of the VAE.")
    return VAEConfig.from_dict(values, source=source)


def config_of_file(weights: WeightFile, location: Location) -> tuple[VAEConfig, str]:
    """Return the config of a single file's VAE, and where it comes from.

    Raises:
        UserError: A config that is there is not usable, or there is none and the tensors leave it open.
    """
    own = config_folder(weights.path) / "config.json"
    if own.is_file():
        return read_config(own), str(own)
    if CONFIG_KEY in weights.metadata:
        source = f"the metadata of {weights.path}"
        try:
            values = json.loads(weights.metadata[CONFIG_KEY])
        except ValueError as error:
            raise UserError(f"{source} holds a damaged config ({error}); pass the config.") from None
        return _parse_config(values, source), source
    beside = weights.path.with_name("config.json")
    if beside.is_file():
        return read_config(beside), str(beside)
    return _infer_config(weights, location), "the shapes of the tensors"


def _infer_config(weights: WeightFile, location: Location) -> VAEConfig:
    """The architecture from names and shapes; groups, activation and scale from the preset or family it matches."""
    structure = _structure(weights, location)
    alike = [name for name, preset in PRESETS.items() if _is_alike(preset, structure)]
    family = _family_of_checkpoint(weights.shapes, alike)
    if family is None and "sd3" in alike:
        raise UserError(
            f"{weights.path} has the shapes of both the sd3 and the flux VAE, whose scales differ, and no config; "
            'pass config="sd3" or config="flux" (--config on the command line).'
        )
    if alike:
        rest = PRESETS[family or alike[0]].to_dict()
    elif all(width % 32 == 0 for width in structure["block_out_channels"]):
        rest = PRESETS["sd1"].to_dict()  # 32 groups and SiLU are fixed in CompVis' code
    else:
        raise UserError(
            f"{weights.path} has widths {structure['block_out_channels']}, which 32 groups do not divide, and no "
            "config says how many its norms have; pass its config (--config on the command line)."
        )
    scale = PRESETS[family or "sd1"]
    rest |= {"scaling_factor": scale.scaling_factor, "shift_factor": scale.shift_factor}
    logger.warning(
        "%s has no config: architecture taken from its shapes%s, scale %g %s. Pass a config if that is wrong.",
        weights.path,
        f" (as {alike[0]})" if alike else "",
        scale.scaling_factor,
        f"from the other models in it ({family})" if family else "assumed to be that of Stable Diffusion 1 and 2",
    )
    return VAEConfig.from_dict({**rest, **structure}, source=str(weights.path))


def _structure(weights: WeightFile, location: Location) -> dict[str, Any]:
    """The fields of a config that names and shapes show."""
    shapes = {name: weights.shapes[location.prefix + name] for name in location.names}
    layers = [match.groups() for match in map(_LAYER.match, shapes) if match]
    encoder = [
        (int(level), int(layer)) for half, level, kind, layer in layers if half == "encoder" and kind not in _ATTENTIONS
    ]
    num_levels = 1 + max((level for level, _ in encoder), default=-1)
    block = "encoder.down.{}.block.0" if location.naming == "ldm" else "encoder.down_blocks.{}.resnets.0"
    attending = {(half, int(level)) for half, level, kind, _ in layers if kind in _ATTENTIONS}
    # LDM counts the decoder's levels from full size, diffusers from the latent.
    up_levels = reversed(range(num_levels)) if location.naming == "ldm" else range(num_levels)
    try:
        return {
            "in_channels": shapes["encoder.conv_in.weight"][1],
            "out_channels": shapes["decoder.conv_out.weight"][0],
            "latent_channels": shapes["decoder.conv_in.weight"][1],
            "block_out_channels": [shapes[f"{block.format(level)}.conv1.weight"][0] for level in range(num_levels)],
            "layers_per_block": 1 + max(layer for _, layer in encoder),
            "down_block_types": [
                f"{'Attn' if ('encoder', level) in attending else ''}DownEncoderBlock2D" for level in range(num_levels)
            ],
            "up_block_types": [
                f"{'Attn' if ('decoder', level) in attending else ''}UpDecoderBlock2D" for level in up_levels
            ],
            "use_quant_conv": "quant_conv.weight" in shapes,
            "use_post_quant_conv": "post_quant_conv.weight" in shapes,
            "mid_block_add_attention": any(
                ".mid.attn_1." in name or "mid_block.attentions." in name for name in shapes
            ),
        }
    except (KeyError, IndexError, ValueError):
        raise UserError(
            f"{weights.path} has no config, and its tensors do not show the architecture "
            "of a VAE; pass its config (--config on the command line)."
        ) from None


def _is_alike(preset: VAEConfig, structure: Mapping[str, Any]) -> bool:
    plain = json.loads(json.dumps(dataclasses.asdict(preset)))
    return all(plain[name] == value for name, value in structure.items())


def _family_of_checkpoint(names: Iterable[str], alike: list[str]) -> str | None:
    """The family that the other models in a full checkpoint show, if the VAE could be of it."""
    names = list(names)
    for family, mark in _FULL_CHECKPOINT_MARKS.items():
        if family in alike and any(name.startswith(mark) for name in names):
            return family
    return None
