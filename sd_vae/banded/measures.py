"""What can be done about memory, what each measure takes, and the first that fits a budget.

A plan is made by running the very code of the measure on tensors of device "meta", which have a shape and no memory,
while every allocation is counted; only the compiled kernels are replaced, by the scratch memory that they ask for.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from sd_vae.banded.engines import CompiledEngine, TorchEngine
from sd_vae.banded.network import BandedNetwork
from sd_vae.config import VAEConfig
from sd_vae.errors import UserError
from sd_vae.ops import dispatch
from sd_vae.ops.workspace import Workspace

if TYPE_CHECKING:
    from sd_vae.autoencoder import AutoencoderKL

__all__ = ["Measure", "MemoryPlan", "choose_measure", "plan_memory"]

Action = Literal["encode", "decode"]
MIB = 2**20
GIB = 2**30
CPU_BANDS = (8 * MIB, 4 * MIB, 2 * MIB, MIB)
GPU_BANDS = (64 * MIB, 32 * MIB, 16 * MIB)


@dataclass(frozen=True)
class Measure:
    """One way to run a half of the network in bands."""

    band_bytes: int
    """Aimed size of a band; four rows where those are more."""
    compiled: bool
    """The compiled CPU kernels, or PyTorch."""
    spilled: bool = False
    """Feature maps stay in host memory, and bands go to the GPU to be worked on."""

    def __str__(self) -> str:
        place = ", maps in host memory" if self.spilled else ""
        return f"bands of {self.band_bytes // MIB} MiB{place}"

    def run(self, half: nn.Module, action: Action, x: Tensor, *, keep_weights: bool, num_groups: int) -> Tensor:
        """Return the half's result, one picture after another: so a picture's result does not depend on its batch."""
        slab_bytes = max(self.band_bytes, 4 * _widest_row(half, action, x.shape[-1]) * x.element_size())
        with torch.no_grad(), Workspace(slab_bytes, device="meta" if x.is_meta else "cpu") as workspace:
            engine = self._engine(
                workspace, half, x, band_bytes=slab_bytes, keep_weights=keep_weights, num_groups=num_groups
            )
            step: Any = getattr(BandedNetwork(engine), action)
            results = [step(half, picture) for picture in x.split(1)]
        return results[0] if len(results) == 1 else torch.cat(results)

    def _engine(self, workspace: Workspace, half: nn.Module, x: Tensor, **options: Any) -> TorchEngine:
        if self.compiled:
            kind = CompiledEngine
            if x.is_meta:
                from sd_vae.banded.planning import PlannedEngine

                kind = PlannedEngine
            return kind(workspace, device=x.device, **options)
        device = _execution_device(half, x)
        storage = torch.device("meta" if x.is_meta else "cpu") if self.spilled else device
        engine: type[TorchEngine] = TorchEngine
        if self.spilled and x.is_meta:
            from sd_vae.banded.planning import SpilledPlan

            engine = SpilledPlan
        return engine(
            workspace,
            device=device,
            storage=storage,
            dtype=x.dtype,
            band_bytes=options["band_bytes"],
            num_groups=options["num_groups"],
        )


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Predicted peak memory of a call above the loaded weights, in GiB, input and result included."""

    untiled_gib: float
    """A plain forward pass without gradients."""
    banded_gib: float
    """With `enable_tiling()`."""
    measures: tuple[tuple[str, float], ...]
    """Every measure that a budget can bring about, and what it takes, the first preferred."""


def plan_memory(
    config: VAEConfig | Mapping[str, Any],
    height: int,
    width: int,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    *,
    action: Action = "decode",
    batch_size: int = 1,
) -> MemoryPlan:
    """Return what encoding or decoding pictures of height x width pixels will take; nothing of that size is allocated.

    Args:
        config: The architecture; `vae.config` will do.
        height: Pixels, a multiple of the factor.
        width: Likewise.
        dtype: Of weights and activations.
        device: Where it will run; only its type counts.
        action: "decode", the larger of the two, or "encode".
        batch_size: Pictures in the call. Bands are of one at a time; untiled, all are in memory at once.

    Raises:
        UserError: Not a config, a size that the factor does not divide, a dtype that is not a float, an unknown device
            or action, or no picture.
    """
    from sd_vae.banded.planning import predict

    if not isinstance(config, VAEConfig):
        if not isinstance(config, Mapping):
            raise UserError(f"config is {config!r}, it must be a VAEConfig; take vae.config or PRESETS['sd1'].")
        config = VAEConfig.from_dict(config, source="config")
    if not all(isinstance(side, Integral) and side > 0 and side % config.factor == 0 for side in (height, width)):
        raise UserError(
            f"image size {height}x{width} is not a whole positive multiple of {config.factor} in both directions."
        )
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise UserError(f"dtype is {dtype!r}, it must be a float type such as torch.float32.")
    if action not in ("encode", "decode"):
        raise UserError(f"unknown action {action!r}; choose encode or decode.")
    if not isinstance(batch_size, Integral) or batch_size < 1:
        raise UserError(f"batch_size is {batch_size!r}, it must be a whole number of at least 1.")
    kind = _device_kind(device)
    text = json.dumps(config.to_dict(), sort_keys=True)
    measures = _measures(kind, compiled=dtype == torch.float32 and not _no_kernels())
    taken = [predict(text, action, batch_size, height, width, dtype, kind, measure) for measure in measures]
    return MemoryPlan(
        untiled_gib=predict(text, action, batch_size, height, width, dtype, kind, None) / GIB,
        banded_gib=taken[0] / GIB,
        measures=tuple((str(measure), num_bytes / GIB) for measure, num_bytes in zip(measures, taken, strict=True)),
    )


def _device_kind(device: str | torch.device) -> str:
    """Type of a device that maps can live on."""
    try:
        kind = torch.device(device).type
    except (RuntimeError, TypeError):
        kind = "meta"
    if kind == "meta":
        raise UserError(f"device is {device!r}, it must be one such as cpu or cuda.")
    return kind


def choose_measure(vae: AutoencoderKL, action: Action, x: Tensor) -> Measure:
    """Return the first measure that keeps a call within the model's budget.

    Raises:
        UserError: None does; names the smallest budget that can be met.
    """
    from sd_vae.banded.planning import predict

    half: nn.Module = vae.encoder if action == "encode" else vae.decoder
    plain = dispatch.opaque(x) or dispatch.not_compiled(x) or next(half.parameters()).dtype != x.dtype
    measures = _measures(x.device.type, compiled=not plain)
    if vae.max_memory_gib is None:
        return measures[0]
    scale = 1 if action == "encode" else vae.factor
    size = x.shape[-2] * scale, x.shape[-1] * scale
    text = json.dumps(VAEConfig.from_dict(dict(vae.config), source="the model").to_dict(), sort_keys=True)
    taken = []
    for measure in measures:
        taken.append(predict(text, action, len(x), *size, x.dtype, x.device.type, measure))
        if taken[-1] <= vae.max_memory_gib * GIB:
            return measure
    least = min(taken)
    count = f"{len(x)} times " if len(x) > 1 else ""
    raise UserError(
        f"max_memory_gib is {vae.max_memory_gib:g}, and to {action} {count}{size[0]}x{size[1]} pixels takes at least "
        f"{least / GIB + 0.005:.2f} GiB ({measures[taken.index(least)]}); give it that much, or a smaller picture."
    )


def _no_kernels() -> bool:
    """Whether the compiled kernels cannot run here, or may not."""
    return dispatch.reference_is_forced() or dispatch.compiled_unavailable() is not None


def _measures(device: str, *, compiled: bool) -> list[Measure]:
    """Every measure for a device, the quickest first."""
    if device == "cpu":
        return [Measure(size, compiled) for size in CPU_BANDS]
    kept = [Measure(size, compiled=False) for size in GPU_BANDS]
    return kept + [Measure(size, compiled=False, spilled=True) for size in GPU_BANDS]


def _execution_device(half: nn.Module, x: Tensor) -> torch.device:
    """Where accelerate's offloading wants the arithmetic done; x's device without it."""
    for module in half.modules():
        device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
        if device is not None:
            return torch.device(device)
    return x.device


def _widest_row(half: nn.Module, action: Action, width: int) -> int:
    """Most values that one row of any feature map has."""
    blocks: Any = half.down_blocks if action == "encode" else half.up_blocks
    channels = [block.resnets[-1].norm2.num_channels for block in blocks]
    scale = 0.5 if action == "encode" else 2
    rows = (int(width * scale**level) * max(channels[max(level - 1, 0) : level + 1]) for level in range(len(channels)))
    return max(rows)
