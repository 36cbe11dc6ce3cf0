"""Which version of every operation a model runs, and why: what `sd_vae.ops.dispatch` answers, layer by layer.

The shapes come from a walk through the network without memory; the questions are then put to dispatch, or to the
banded engine, with stand-ins of those shapes, so that what is reported is what is decided when it runs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sd_vae.autoencoder import Attention, AutoencoderKL, Downsample2D, Upsample2D
from sd_vae.banded.engines import Prepared
from sd_vae.banded.planning import PlannedEngine
from sd_vae.benchmarking.inputs import caller, random_input
from sd_vae.ops import dispatch
from sd_vae.ops.dispatch import Choice
from sd_vae.ops.operations import SILU
from sd_vae.ops.workspace import Workspace
from sd_vae.tiling import why_whole

__all__ = ["LayerGroup", "VersionsInUse", "versions_in_use"]

Operation = Literal["conv3x3", "upsample_conv", "downsample_conv", "conv1x1", "group_norm_silu", "attention", "conv"]
TOO_NARROW = "PyTorch's own: it reads or writes few channels"


@dataclass(frozen=True, kw_only=True)
class LayerGroup:
    """Layers of one operation that run the same version for the same reason."""

    operation: Operation
    """As `sd_vae.ops` calls it; "conv" is called as it is everywhere."""
    version: str
    """Of `sd_vae.ops.dispatch`."""
    why: str
    """What decided."""
    layers: tuple[str, ...]
    """Names of the modules."""
    widths: tuple[str, ...]
    """Channels in and out that occur among them."""


@dataclass(frozen=True, kw_only=True)
class VersionsInUse:
    """How one action runs at one size."""

    action: Literal["encode", "decode"]
    size: int
    """Pixels of a side."""
    whole: str | None
    """Why feature maps are held whole; None where they are held in row bands."""
    groups: tuple[LayerGroup, ...]
    """In the order of their first layers."""


@dataclass(frozen=True)
class _Layer:
    name: str
    operation: Operation
    module: Any
    shape: tuple[int, ...]
    """Of what the operation is given."""


@torch.no_grad()
def versions_in_use(vae: AutoencoderKL, action: Literal["encode", "decode"], size: int) -> VersionsInUse:
    """Return which versions run, without running them.

    Args:
        vae: The model as it will run: device, dtype, tiling.
        action: Which half.
        size: Pixels of a square picture's side.
    """
    whole = why_whole(vae, action, random_input(vae, action, size, size))
    choose = _choose_whole if whole else _choose_banded
    groups: dict[tuple[Operation, Choice], list[_Layer]] = {}
    for layer in _layers(vae, action, size):
        groups.setdefault((layer.operation, choose(layer, vae)), []).append(layer)
    return VersionsInUse(
        action=action,
        size=size,
        whole=whole,
        groups=tuple(_group(operation, choice, layers) for (operation, choice), layers in groups.items()),
    )


def _layers(vae: AutoencoderKL, action: Literal["encode", "decode"], size: int) -> list[_Layer]:
    """Every layer of a half in the order in which they run, with the shape that each is given."""
    with torch.device("meta"):
        twin: Any = AutoencoderKL.from_config(dict(vae.config))
    found: list[_Layer] = []

    def watch(name: str, operation: Operation) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, given: tuple[Tensor, ...]) -> None:
            batch_size, channels, height, width = given[0].shape
            if operation == "upsample_conv":  # the reference convolves the doubled map, or a padded one
                height, width = height // 2, width // 2
            elif operation == "downsample_conv":
                height, width = height - 1, width - 1
            module = vae.get_submodule(name)
            found.append(_Layer(name, operation, module, (batch_size, channels, height, width)))

        return hook

    for name, module in twin.named_modules():
        operation = _operation(module, twin.get_submodule(name.rpartition(".")[0]))
        if operation is not None:
            module.register_forward_pre_hook(watch(name, operation))
    with dispatch.reference():
        caller(twin, action)(random_input(twin, action, size, size))
    return found


def _operation(module: nn.Module, parent: nn.Module) -> Operation | None:
    """What the model calls for a module; None for what holds others or is part of one."""
    if isinstance(module, Attention):
        return "attention"
    if isinstance(module, nn.GroupNorm):
        return None if isinstance(parent, Attention) else "group_norm_silu"
    if not isinstance(module, nn.Conv2d):
        return None
    if isinstance(parent, Upsample2D):
        return "upsample_conv"
    if isinstance(parent, Downsample2D):
        return "downsample_conv"
    if not hasattr(parent, "conv1"):  # outside the residual blocks: the network's first and last layers
        return "conv"
    return "conv3x3" if module.kernel_size == (3, 3) else "conv1x1"


def _choose_whole(layer: _Layer, vae: AutoencoderKL) -> Choice:
    """What an operation decides when it is given a whole map."""
    x = torch.empty(layer.shape, device=vae.device, dtype=vae.dtype, memory_format=torch.channels_last)
    match layer.operation:
        case "conv3x3":
            return dispatch.choose_conv3x3(x, layer.module, None)
        case "upsample_conv":
            return dispatch.choose_upsample(x, layer.module)
        case "downsample_conv":
            return dispatch.choose_downsample(x, layer.module)
        case "group_norm_silu":
            return dispatch.choose_norm(x, layer.module, SILU)
        case "attention":
            return Choice("reference", "PyTorch's scaled_dot_product_attention")
        case "conv1x1":
            return Choice("reference", "PyTorch's own: one matrix product")
        case "conv":
            return Choice("reference", TOO_NARROW)


def _choose_banded(layer: _Layer, vae: AutoencoderKL) -> Choice:
    """What the compiled engine decides for a layer that is given row bands."""
    if layer.operation == "attention":
        return Choice("reference", "PyTorch's scaled_dot_product_attention, over the whole map")
    if layer.operation == "group_norm_silu":
        return Choice("compiled", "statistics as a band is written; scale, shift and SiLU as it is read")
    if layer.name in ("quant_conv", "post_quant_conv"):
        return Choice("reference", TOO_NARROW)
    with Workspace(0, device="meta") as workspace:
        options: dict[str, Any] = {"band_bytes": 0, "num_groups": 1, "keep_weights": False}
        prepared = PlannedEngine(workspace, device=torch.device("meta"), **options).prepare(layer.module)
    if not isinstance(prepared, Prepared):
        from sd_vae.ops.winograd import unsupported

        reason = unsupported(layer.module.in_channels, layer.module.out_channels)
        return Choice("reference", f"PyTorch's own: {reason or 'not a plain convolution'}")
    how = {
        "upsample_conv": "Winograd F(4x4, 3x3) of the doubled map, never made",
        "downsample_conv": "no padded copy",
        "conv1x1": "beside the convolution that reads the same bands",
    }
    return Choice("compiled", how.get(layer.operation, "Winograd F(4x4, 3x3)"))


def _group(operation: Operation, choice: Choice, layers: list[_Layer]) -> LayerGroup:
    widths = (_width(layer.module, layer.shape[1]) for layer in layers)
    return LayerGroup(
        operation=operation,
        version=choice.version,
        why=choice.why,
        layers=tuple(layer.name for layer in layers),
        widths=tuple(dict.fromkeys(widths)),
    )


def _width(module: Any, num_channels: int) -> str:
    return f"{num_channels}->{module.out_channels}" if isinstance(module, nn.Conv2d) else str(num_channels)
