"""Writing a VAE in the layouts that other programs read, whole or not at all.

A diffusers folder says everything about its VAE. LDM and web-UI files hold tensors only: the scale is the model
family's (see `families`), and the architecture goes into the safetensors metadata and into a folder beside the file,
`<stem>_config`, which `from_single_file(file, config=folder)` takes.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from sd_vae.checkpoints.families import FAMILIES, family_of, fold
from sd_vae.checkpoints.formats import as_dtype, write_safetensors
from sd_vae.checkpoints.keymap import key_table
from sd_vae.checkpoints.layouts import CONFIG_KEY, config_folder
from sd_vae.checkpoints.load import some
from sd_vae.config import VAEConfig
from sd_vae.errors import UserError
from sd_vae.files import atomic_file, atomic_folder, require_writable_target, write_json

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from sd_vae._diffusers import DiffusersAutoencoderKL

__all__ = ["Layout", "export", "require_target", "save_vae", "staged"]

logger = logging.getLogger(__name__)

Layout = Literal["diffusers", "ldm", "webui"]

_PREFIX = {"ldm": "first_stage_model.", "webui": ""}
_OWN_FILES = ("config.json", "README.md", "reconstructions.png", "diffusion_pytorch_model")


def save_vae(
    vae: DiffusersAutoencoderKL,
    path: str | os.PathLike[str],
    layout: Layout = "diffusers",
    dtype: torch.dtype | str | None = None,
    *,
    family: str | None = None,
    overwrite: bool = False,
    metadata: Mapping[str, str] | None = None,
    variant: str | None = None,
) -> Path:
    """Write a VAE and return where it is; the model itself is not touched.

    Args:
        vae: Ours or diffusers', on any device and in any memory layout.
        path: Folder for the diffusers layout, a `.safetensors` file for the others.
        layout: "diffusers" folder; "ldm" file with `first_stage_model.`; "webui" file without.
        dtype: float32, float16 or bfloat16; the model's by default.
        family: Model family that the weights are folded for (sd1, sdxl, sd3, flux), so that its scale gives the same
            latents. A single file needs it unless the VAE's scale is one family's already.
        overwrite: Replace what is there.
        metadata: Text for the safetensors `__metadata__`.
        variant: Middle part of the weights' name in a diffusers folder, such as "fp16".

    Raises:
        UserError: Something is there already, `path` cannot be written, an argument does not fit the layout, the scale
            needs a family or cannot be folded, or the weights are not finite in this dtype.
    """
    tensors, config = export(vae, layout, dtype, family=family)
    with staged(Path(path), layout, tensors, config, overwrite=overwrite, metadata=metadata, variant=variant):
        pass
    return Path(path)


def export(
    vae: DiffusersAutoencoderKL, layout: Layout, dtype: torch.dtype | str | None = None, *, family: str | None = None
) -> tuple[dict[str, Tensor], VAEConfig]:
    """Return the weights by diffusers name and the config that a layout will hold, folded and cast.

    Raises:
        UserError: As `save_vae`.
    """
    _require_layout(layout)
    tensors, config = _take(vae)
    if family is not None:
        tensors, config = fold(tensors, config, family)
    elif layout != "diffusers" and family_of(config) is None:
        scales = ", ".join(f"{name} {preset.scaling_factor}" for name, preset in FAMILIES.items())
        raise UserError(
            f"a file of layout {layout} carries no scale, and this VAE's (scaling_factor {config.scaling_factor}, "
            f"shift_factor {config.shift_factor}, latents_mean {config.latents_mean}) is no model family's ({scales}); "
            'name the family it is for, family="sd1" or --for sd1, and the weights are folded to that scale exactly.'
        )
    if dtype is not None:
        wanted = as_dtype(dtype)
        tensors = {name: tensor.to(wanted) for name, tensor in tensors.items()}
    damaged = [name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())]
    if damaged:
        raise UserError(
            f"the weights are not finite in {tensors[damaged[0]].dtype}: {some(damaged)}; save another state of the "
            "model, or in a wider dtype (bfloat16 and float32 do not overflow where float16 does)."
        )
    if layout != "diffusers" and (config.norm_num_groups, config.act_fn) not in ((32, "silu"), (32, "swish")):
        logger.warning(
            "programs around %s files fix 32 norm groups and SiLU, this VAE has %d and %s: they need the config that "
            "is written beside it.",
            layout,
            config.norm_num_groups,
            config.act_fn,
        )
    return tensors, config


@contextmanager
def staged(
    path: Path,
    layout: Layout,
    tensors: Mapping[str, Tensor],
    config: VAEConfig,
    *,
    overwrite: bool = False,
    metadata: Mapping[str, str] | None = None,
    variant: str | None = None,
) -> Iterator[Path]:
    """Write weights to a temporary place, yield it for a last look, and give it its name unless that look raises.

    Raises:
        UserError: As `save_vae`.
    """
    require_target(path, layout, overwrite=overwrite, variant=variant)
    if layout == "diffusers":
        with atomic_folder(path, overwrite=overwrite) as folder:
            middle = f".{variant}" if variant else ""
            write_safetensors(folder / f"diffusion_pytorch_model{middle}.safetensors", tensors, metadata)
            write_json(folder / "config.json", _plain_config(config))
            yield folder
        return
    beside = config_folder(path)
    renamed = {_PREFIX[layout] + key.ldm: tensors[key.diffusers].reshape(key.ldm_shape) for key in key_table(config)}
    texts = {**(metadata or {}), CONFIG_KEY: json.dumps(_plain_config(config))}
    with atomic_file(path) as file:
        write_safetensors(file, renamed, texts)
        yield file
        with atomic_folder(beside, overwrite=overwrite) as folder:
            write_json(folder / "config.json", _plain_config(config))


def require_target(path: Path, layout: Layout, *, overwrite: bool = False, variant: str | None = None) -> None:
    """Check that a layout may be written at `path`, before the work whose result goes there.

    Raises:
        UserError: Something is there already, `path` cannot be written or does not fit the layout.
    """
    _require_path(path, layout, variant)
    if layout == "diffusers":
        _require_replaceable(path)
        require_writable_target(path, overwrite=overwrite)
        return
    beside = config_folder(path)
    require_writable_target(path, overwrite=overwrite)
    require_writable_target(beside, overwrite=overwrite)
    _require_replaceable(beside)


def _take(vae: DiffusersAutoencoderKL) -> tuple[dict[str, Tensor], VAEConfig]:
    """Weights, detached and on the CPU, and config of a model."""
    import torch

    from sd_vae._diffusers import DiffusersAutoencoderKL

    if not isinstance(vae, DiffusersAutoencoderKL):
        raise UserError(
            f"vae is a {type(vae).__name__}, not an AutoencoderKL; take the model out of what wraps it "
            "(accelerator.unwrap_model, or _orig_mod of a compiled one)."
        )
    config = VAEConfig.from_dict(dict(vae.config), source="the model's config")
    held = {name: tensor.detach() for name, tensor in vae.state_dict().items()}
    for name in [name for name in held if ".to_qkv." in name]:  # fused projections repeat q, k and v
        fused = held.pop(name)
        parts = [held[name.replace("to_qkv", part)] for part in ("to_q", "to_k", "to_v")]
        if not torch.equal(fused, torch.cat(parts)):
            raise UserError(
                f"{name} is not what to_q, to_k and to_v hold, so the projections were trained while fused; "
                "train with unfused projections."
            )
    names = [key.diffusers for key in key_table(config)]
    odd = sorted(set(names).symmetric_difference(held))
    if odd:
        raise UserError(f"the model's tensors are not those of its config: {some(odd)}; merge or remove its adapters.")
    meta = [name for name in names if held[name].is_meta]
    if meta:
        raise UserError(
            f"{len(meta)} tensors are on the meta device and have no values: {some(meta)}; load them first."
        )
    return {name: held[name].cpu() for name in names}, config


def _plain_config(config: VAEConfig) -> dict[str, Any]:
    """The `config.json` that diffusers reads."""
    import diffusers

    return {"_class_name": "AutoencoderKL", "_diffusers_version": diffusers.__version__, **config.to_dict()}


def _require_layout(layout: str) -> None:
    if layout not in get_args(Layout):
        raise UserError(f"unknown layout {layout!r}; choose one of: {', '.join(get_args(Layout))}.")


def _require_path(path: Path, layout: Layout, variant: str | None) -> None:
    """A folder for diffusers, a `.safetensors` file for the others; diffusers chooses its reader by that ending."""
    is_file_name = path.suffix in (".safetensors", ".ckpt", ".pt", ".pth", ".bin")
    if layout == "diffusers" and is_file_name:
        raise UserError(f"layout diffusers is a folder, and {path} names a file; give a name without {path.suffix}.")
    if layout != "diffusers" and path.suffix != ".safetensors":
        raise UserError(f"layout {layout} is one safetensors file, and {path} does not end in .safetensors; add that.")
    if layout != "diffusers" and variant:
        raise UserError(
            f"variant {variant!r} belongs to layout diffusers, this is {layout}; put it in the file's name."
        )


def _require_replaceable(folder: Path) -> None:
    """Only folders that hold a VAE and nothing else are ever replaced."""
    if not folder.is_dir():
        return
    others = sorted(item.name for item in folder.iterdir() if not item.name.startswith(_OWN_FILES))
    if others:
        raise UserError(f"{folder} holds other files ({some(others)}), which would be lost; choose another place.")
