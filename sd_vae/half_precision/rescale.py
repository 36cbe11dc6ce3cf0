"""Weights that float16 can run: the streams that overflow it, scaled down by powers of two, and nothing else changed.

A power of two changes no digit of a weight, and a GroupNorm does not see the scale of its input, except beside its eps:
a stream of scale s acts as with eps / s^2, because no checkpoint carries eps. That change is predicted, by running the
original with those eps, and measured, by running the new weights; both must be small, and the two must agree.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sd_vae.config import VAEConfig
from sd_vae.errors import UserError
from sd_vae.half_precision.ranges import (
    FLOAT16_MAX,
    LayerRange,
    Outcome,
    ProbeReport,
    Recorder,
    float32_twin,
    require_pictures,
    run,
)
from sd_vae.half_precision.streams import Network, Stream, layer_scales, norm_scales, trace

if TYPE_CHECKING:
    from sd_vae._diffusers import DiffusersAutoencoderKL
    from sd_vae.autoencoder import AutoencoderKL

__all__ = ["MARGIN", "MAX_CHANGE", "Rescaling", "choose_scales", "rescale_for_float16"]

MARGIN = 4.0
"""What a rescaled stream leaves between its peak in the probe and the largest float16."""
MAX_CHANGE = 1e-4
"""Largest change of an outcome, of its largest magnitude."""

_AGREEMENT = 1e-5  # between prediction and measurement, as between any two paths; they were bit-equal wherever tried
_NAMED = 6  # layers in an error


@dataclass(frozen=True, kw_only=True)
class Rescaling:
    """What a rescaling has changed."""

    scales: dict[str, float]
    """Power of two by stream, named after the layer that it begins at; for to_q, whose inverse to_k takes."""
    num_layers: int
    """Layers whose weights have changed."""
    predicted_change: float
    """Largest change of mean, logvar and decode, of their largest magnitude, when the original runs with eps / s^2."""
    measured_change: float
    """The same between the new weights and the original."""
    before: ProbeReport
    """Ranges of the original."""
    after: ProbeReport
    """Ranges of the new weights; nothing overflows."""


@torch.no_grad()
def rescale_for_float16(
    vae: DiffusersAutoencoderKL, pictures: Sequence[Tensor], *, progress: Callable[[int, int], None] | None = None
) -> tuple[AutoencoderKL, Rescaling]:
    """Return a copy of a VAE, in float32, whose activations on these pictures fit float16, and what was changed.

    The copy has the same keys, and the same config except `force_upcast`, which is False. Where nothing overflows its
    weights are the same too.

    Args:
        vae: Ours or diffusers', in any dtype; it is not changed.
        pictures: Images (B, 3, H, W) in [-1, 1], H and W multiples of the factor.
        progress: Told (done, total) after each of three runs a picture.

    Raises:
        UserError: As `probe`; something overflows that no rescaling mends; a weight does not fit float16; or an
            outcome would change by more than `MAX_CHANGE`.
    """
    from sd_vae.autoencoder import AutoencoderKL

    original = float32_twin(vae)
    count = _Counter(progress, 3 * len(require_pictures(pictures, original)))
    with Recorder(original) as recorder:
        outcomes = [count(run(original, x)) for x in pictures]
    before = recorder.report(num_pictures=len(pictures))

    network = trace(VAEConfig.from_dict(dict(original.config), source="the model's config"))
    scales = choose_scales(network, before)
    rescaled = copy.deepcopy(original)
    num_layers = _scale_weights(rescaled, network, scales)
    for norm, scale in norm_scales(network, scales):
        original.get_submodule(norm).eps /= scale**2  # the twin's own; only its weights are shared

    predicted = measured = 0.0
    with Recorder(rescaled) as recorder:
        for x, expected in zip(pictures, outcomes, strict=True):
            prediction = count(run(original, x, expected.mean))
            outcome = count(run(rescaled, x, expected.mean))
            disagreement = _change(prediction, outcome)
            assert disagreement <= _AGREEMENT, f"the rescaled weights are {disagreement:.1e} off the prediction"
            predicted = max(predicted, _change(expected, prediction))
            measured = max(measured, _change(expected, outcome))
    after = recorder.report(num_pictures=len(pictures))
    assert not after.overflowing, f"{after.overflowing[0].name} overflows after the rescaling"
    if max(predicted, measured) > MAX_CHANGE:
        raise UserError(_too_much(network, scales, before, predicted, measured))

    result = AutoencoderKL.from_diffusers(rescaled)
    result.register_to_config(force_upcast=False)
    return result, Rescaling(
        scales=scales,
        num_layers=num_layers,
        predicted_change=predicted,
        measured_change=measured,
        before=before,
        after=after,
    )


def choose_scales(network: Network, report: ProbeReport) -> dict[str, float]:
    """Return, for each stream that overflows, the largest power of two that leaves `MARGIN`.

    Raises:
        UserError: Names what overflows outside the streams, such as a GroupNorm's own output, and each q and k of
            which one cannot give the other room.
    """
    ranges = {layer.name: layer for layer in report.layers}
    mendable: set[str] = set()
    scales = {}
    for stream in network.streams.values():
        scale = _scale(stream, ranges)
        if scale is None:
            continue
        mendable.update(stream.places)
        if stream.counterpart:
            mendable.add(stream.counterpart)
        if scale != 1.0:
            scales[stream.name] = scale
    hopeless = [layer for layer in report.overflowing if layer.name not in mendable]
    if hopeless:
        raise UserError(
            f"float16 cannot hold {len(hopeless)} results that no rescaling mends, because what follows them sees "
            f"their scale: {_describe(hopeless)}; run this VAE in bfloat16 or float32."
        )
    return scales


def _scale(stream: Stream, ranges: Mapping[str, LayerRange]) -> float | None:
    """A stream's scale, 1 where it fits; None where k has no room for what q must give, or q for k."""
    peak = max(ranges[place].peak for place in stream.places)
    if stream.counterpart is None:
        return _fitting(peak)
    peak_k = ranges[stream.counterpart].peak
    scale = _fitting(peak) if peak > FLOAT16_MAX else 1 / _fitting(peak_k)
    return scale if peak * scale <= FLOAT16_MAX and peak_k / scale <= FLOAT16_MAX else None


def _fitting(peak: float) -> float:
    if peak <= FLOAT16_MAX:
        return 1.0
    return float(2.0 ** math.floor(math.log2(FLOAT16_MAX / (MARGIN * peak))))


def _scale_weights(vae: DiffusersAutoencoderKL, network: Network, scales: Mapping[str, float]) -> int:
    """Scale a model's layers in place and return how many.

    Raises:
        UserError: A weight is too large for float16, before or after.
    """
    changed = list(layer_scales(network, scales))
    for name, weight_scale, bias_scale in changed:
        layer = vae.get_submodule(name)
        layer.weight.mul_(weight_scale)
        layer.bias.mul_(bias_scale)
    large = [name for name, weight in vae.named_parameters() if float(weight.abs().max()) > FLOAT16_MAX]
    if large:
        raise UserError(
            f"float16 holds at most {FLOAT16_MAX:.0f}, and {len(large)} rescaled weight tensors are above that: "
            f"{', '.join(large[:_NAMED])}; run this VAE in bfloat16 or float32."
        )
    return len(changed)


def _change(expected: Outcome, outcome: Outcome) -> float:
    """The largest difference in mean, logvar and picture, each of its largest magnitude."""
    pairs = zip(expected, outcome, strict=True)
    return max(float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-12)) for theirs, ours in pairs)


def _too_much(
    network: Network, scales: Mapping[str, float], before: ProbeReport, predicted: float, measured: float
) -> str:
    seen = {norm: before[norm].variance or 0.0 for norm, _ in norm_scales(network, scales)}
    worst, scale = min(norm_scales(network, scales), key=lambda found: found[1] ** 2 * seen[found[0]])
    return (
        f"rescaling would change the outcome by {predicted:.1e} of its largest magnitude as predicted and "
        f"{measured:.1e} as measured, above {MAX_CHANGE:.0e}: at a scale of 2^{math.log2(scale):.0f}, GroupNorm's eps "
        f"is not small beside the variance that {worst} sees, {seen[worst]:.1e} at least; run this VAE in bfloat16 or "
        "float32."
    )


def _describe(layers: Sequence[LayerRange]) -> str:
    named = [f"{layer.name} ({_WORDS.get(layer.kind, layer.kind)}, {layer.peak:.3g})" for layer in layers[:_NAMED]]
    more = [f"and {len(layers) - _NAMED} more"] if len(layers) > _NAMED else []
    return ", ".join(named + more)


_WORDS = {"norm": "GroupNorm's own output", "logits": "attention logits", "linear": "projection"}


class _Counter:
    """Counts what passes through it."""

    def __init__(self, progress: Callable[[int, int], None] | None, total: int) -> None:
        self._progress, self._total, self._done = progress, total, 0

    def __call__(self, outcome: Outcome) -> Outcome:
        self._done += 1
        if self._progress:
            self._progress(self._done, self._total)
        return outcome
