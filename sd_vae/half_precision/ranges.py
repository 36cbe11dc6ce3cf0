"""How large activations get: pictures run through every layer in float32, beside what float16 holds.

The layers looked at are those of plain diffusers, on its untiled path, because that is the code which most often runs
a VAE in float16. A row is what one layer hands on: each convolution, linear layer, GroupNorm and activation function;
the sum of each residual block and attention; and each attention's logits. PyTorch's fused attention keeps logits in
float32 also for float16 (no overflow at 2e6, PyTorch 2.15 on a CPU), older attention code does not, so they count.

Shapes: B batch, D feature channels, H W size of a feature map, N = HW positions.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from sd_vae.checks import require_image
from sd_vae.data.sources import ImageSource
from sd_vae.errors import UserError
from sd_vae.images import to_tensor

if TYPE_CHECKING:
    from sd_vae._diffusers import DiffusersAutoencoderKL

__all__ = ["FLOAT16_MAX", "Kind", "LayerRange", "Outcome", "ProbeReport", "Recorder", "load_pictures", "probe"]

FLOAT16_MAX = 65504.0
"""Largest finite float16."""

Kind = Literal["conv", "linear", "norm", "activation", "sum", "logits"]

_KINDS: dict[str, Kind] = {
    "Conv2d": "conv",
    "Linear": "linear",
    "GroupNorm": "norm",
    "SiLU": "activation",
    "Mish": "activation",
    "GELU": "activation",
    "ReLU": "activation",
    "ResnetBlock2D": "sum",
    "Attention": "sum",
}
_ROWS = 1024  # of the N x N logits at a time


@dataclass(frozen=True, kw_only=True)
class LayerRange:
    """The largest magnitude that one layer handed on."""

    name: str
    """Module, with `.logits` behind an attention's name for its logits."""
    kind: Kind
    """What was looked at: the module's result, a residual sum, or attention's logits after their scale."""
    peak: float
    """Largest magnitude over all pictures, in float32."""
    margin: float
    """65504 over the peak; below 1 float16 overflows."""
    overflows: bool
    """The peak is above 65504."""
    variance: float | None = None
    """Smallest variance of a group that a GroupNorm was given; its eps is small beside it."""


@dataclass(frozen=True, kw_only=True)
class ProbeReport:
    """Every layer's largest magnitude."""

    layers: tuple[LayerRange, ...]
    """Worst first."""
    num_pictures: int
    """Pictures that were run through."""

    @property
    def overflowing(self) -> tuple[LayerRange, ...]:
        """The layers that float16 does not hold."""
        return tuple(layer for layer in self.layers if layer.overflows)

    def __getitem__(self, name: str) -> LayerRange:
        """Return the layer of that name."""
        return next(layer for layer in self.layers if layer.name == name)


class Outcome(NamedTuple):
    """What a VAE makes of one picture."""

    mean: Tensor
    logvar: Tensor
    x: Tensor


@torch.no_grad()
def probe(
    vae: DiffusersAutoencoderKL, pictures: Sequence[Tensor], *, progress: Callable[[int, int], None] | None = None
) -> ProbeReport:
    """Return the range of every layer over pictures that are encoded and, from the posterior's mean, decoded.

    Args:
        vae: Ours or diffusers'; it is not changed, and run in float32 whatever its dtype.
        pictures: Images (B, 3, H, W) in [-1, 1], H and W multiples of the factor.
        progress: Told (done, total) after each.

    Raises:
        UserError: No picture, one of the wrong shape, or values that are not finite even in float32.
    """
    twin = float32_twin(vae)
    with Recorder(twin) as recorder:
        for done, x in enumerate(require_pictures(pictures, twin), start=1):
            run(twin, x)
            if progress:
                progress(done, len(pictures))
    return recorder.report(num_pictures=len(pictures))


def load_pictures(source: ImageSource, factor: int, *, limit: int, size: int) -> list[Tensor]:
    """Return pictures to probe with, evenly spread over a source.

    Args:
        source: Pictures by number.
        factor: Pixels a latent cell.
        limit: Pictures at most.
        size: Longest side in pixels; each picture's middle is taken, up to this, in multiples of the factor.

    Returns:
        Images (1, 3, H, W) in [-1, 1].

    Raises:
        UserError: `limit` or `size` is too small, or a picture is smaller than a latent cell or cannot be read.
    """
    if limit < 1 or size < factor:
        raise UserError(
            f"a probe takes at least 1 picture of at least {factor} pixels, not {limit} of {size}; raise the number or "
            "the size."
        )
    count = min(limit, len(source))
    found = []
    for index in (number * len(source) // count for number in range(count)):
        x = to_tensor(source.load(index))
        height, width = (min(side, size) // factor * factor for side in x.shape[-2:])
        if not height or not width:
            shape = f"{x.shape[-2]}x{x.shape[-1]}"
            raise UserError(
                f"{source.name(index)} is {shape}, smaller than the factor {factor}; leave it out of the pictures."
            )
        top, left = (x.shape[-2] - height) // 2, (x.shape[-1] - width) // 2
        found.append(x[..., top : top + height, left : left + width])
    return found


def require_pictures(pictures: Sequence[Tensor], vae: DiffusersAutoencoderKL) -> Sequence[Tensor]:
    """Return the pictures, each of a shape that the VAE takes.

    Raises:
        UserError: There is none, or one of the wrong shape.
    """
    if not pictures:
        raise UserError("a probe needs at least one picture, it was given none; name some photos.")
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    for x in pictures:
        require_image(x, vae.config.in_channels, factor)
    return pictures


def float32_twin(vae: DiffusersAutoencoderKL) -> DiffusersAutoencoderKL:
    """Return a plain diffusers VAE in eval mode with these weights in float32: shared where they are that already."""
    from sd_vae.autoencoder import AutoencoderKL

    twin = AutoencoderKL.from_diffusers(vae).to_diffusers()
    if any(weight.dtype != torch.float32 for weight in twin.parameters()):
        twin = copy.deepcopy(twin).float()
    return twin.eval()


def run(vae: DiffusersAutoencoderKL, x: Tensor, z: Tensor | None = None) -> Outcome:
    """Return posterior and decode of images, on the CPU; z (B, C, h, w) is decoded in place of the mean if given."""
    device = next(vae.parameters()).device
    posterior = vae.encode(x.to(device, torch.float32)).latent_dist
    decoded = vae.decode(posterior.mean if z is None else z.to(device)).sample
    return Outcome(posterior.mean.cpu(), posterior.logvar.cpu(), decoded.cpu())


class Recorder:
    """Takes the largest magnitude of what every layer of a model hands on, between `with` and its end.

    Args:
        vae: A plain diffusers VAE.
    """

    def __init__(self, vae: nn.Module) -> None:
        self._vae = vae
        self._peaks: dict[str, float] = {}
        self._kinds: dict[str, Kind] = {}
        self._variances: dict[str, float] = {}
        self._keys: dict[str, Tensor] = {}
        self._hooks = ExitStack()

    def __enter__(self) -> Recorder:
        for name, module in self._vae.named_modules():
            kind = _KINDS.get(type(module).__name__)
            if kind is None:
                continue
            hook = self._layer_hook(name, kind)
            self._hooks.callback(module.register_forward_hook(hook).remove)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hooks.close()

    def report(self, *, num_pictures: int) -> ProbeReport:
        """Return the layers, worst first, in the network's order where they are equal."""
        names = sorted(self._peaks, key=lambda name: -self._peaks[name])
        layers = tuple(
            LayerRange(
                name=name,
                kind=self._kinds[name],
                peak=self._peaks[name],
                margin=FLOAT16_MAX / self._peaks[name] if self._peaks[name] else math.inf,
                overflows=self._peaks[name] > FLOAT16_MAX,
                variance=self._variances.get(name),
            )
            for name in names
        )
        return ProbeReport(layers=layers, num_pictures=num_pictures)

    def _layer_hook(self, name: str, kind: Kind) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def look(module: nn.Module, given: tuple[Any, ...], result: Tensor) -> None:
            self._note(name, kind, result)
            if isinstance(module, nn.GroupNorm):
                groups = given[0].reshape(len(given[0]), module.num_groups, -1)  # (B, groups, N D/groups)
                variance = float(groups.var(dim=-1, correction=0).min())
                self._variances[name] = min(variance, self._variances.get(name, math.inf))
            attention, _, projection = name.rpartition(".")
            if projection == "to_q":
                self._keys[attention] = result
            elif projection == "to_k":
                self._note(f"{attention}.logits", "logits", _largest_logit(self._keys.pop(attention), result))

        return look

    def _note(self, name: str, kind: Kind, result: Tensor) -> None:
        low, high = (float(bound) for bound in torch.aminmax(result))
        peak = max(-low, high)
        if not math.isfinite(peak):
            raise UserError(
                f"{name} gives values that are not finite in float32; the weights are damaged, use another copy."
            )
        self._kinds[name] = kind
        self._peaks[name] = max(peak, self._peaks.get(name, 0.0))


def _largest_logit(q: Tensor, k: Tensor) -> Tensor:
    """The largest magnitude of q k^T / sqrt(D) for q and k (B, N, D), a few rows at a time."""
    scale = q.shape[-1] ** -0.5
    peaks = [(rows @ k.transpose(-1, -2)).abs().amax() * scale for rows in q.split(_ROWS, dim=-2)]
    return torch.stack(peaks).amax()
