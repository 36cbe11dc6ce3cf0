"""JPEG and WebP over their whole range of qualities, on the photos of an evaluation: what a VAE is held against.

A VAE spends one number of bits a pixel and is a point; a codec can spend any, and comparing at one rate alone hides how
much more or less it would need for the same quality.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from .codecs import encode
from .measures import Measures
from .probes import Findings, Trial
from .results import Plot

__all__ = ["QUALITIES", "RATE", "Rates", "rate_metrics"]

QUALITIES = (5, 15, 40, 75, 90)
"""Of both codecs: from far below what a VAE spends to far above."""

RATE = "Rate"
"""Title of the plots."""


class Rates:
    """Every codec at several qualities.

    Args:
        codecs: Some of `eval.codecs.CODECS`.
        measures: What is measured; of its metrics those that `rate_metrics` names.
    """

    def __init__(self, codecs: Sequence[str], measures: Measures) -> None:
        self._codecs = tuple(codecs)
        self._measures = {name: measures.functions[name] for name in rate_metrics(measures)}

    def __call__(self, trial: Trial) -> Mapping[str, float]:
        """Return bits and metrics of one photo in every quality."""
        found = {"pixels": float(trial.x.width * trial.x.height)}
        for codec in self._codecs:
            for quality in QUALITIES:
                coded = encode(trial.x, codec, quality)
                found[f"{codec}\n{quality}\nbits"] = 8.0 * coded.num_bytes
                for name, measure in self._measures.items():
                    found[f"{codec}\n{quality}\n{name}"] = measure(coded.recon, trial.x)
        return found

    def conclude(self, found: Sequence[Mapping[str, float]]) -> Findings:
        """Return a plot for every metric, a curve a codec: bits of all photos over their pixels, means over photos."""
        num_pixels = math.fsum(one["pixels"] for one in found)

        def point(codec: str, quality: int, name: str) -> tuple[float, float]:
            bits, values = (math.fsum(one[f"{codec}\n{quality}\n{what}"] for one in found) for what in ("bits", name))
            return bits / num_pixels, values / len(found)

        return Findings(
            plots=tuple(
                Plot(
                    title=RATE,
                    x_label="bits per pixel",
                    metric=name,
                    lines={
                        codec: tuple(sorted(point(codec, quality, name) for quality in QUALITIES))
                        for codec in self._codecs
                    },
                )
                for name in self._measures
            )
        )


def rate_metrics(measures: Measures) -> list[str]:
    """Return the metrics that are drawn over the rate: PSNR and LPIPS, those that are measured."""
    return [name for name in measures.table if name == "psnr_db" or name.startswith("lpips")]
