"""Deeper questions, asked on every photo beside the metrics: each a probe with a conclusion.

A probe sees one photo at a time and answers in numbers; from all of them it concludes plots, checks or regions. Several
processes therefore share the work as they share the metrics.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from PIL import Image

from .photos import Photo
from .results import Check, Plot, Region

__all__ = ["Findings", "Probe", "Trial"]


@dataclass(frozen=True)
class Trial:
    """One photo, and what became of it."""

    photo: Photo
    """Name and columns."""
    original: Image.Image
    """Upright 8-bit RGB in its own size."""
    x: Image.Image
    """As it was encoded."""
    recons: Mapping[str, Image.Image]
    """Row name to reconstruction."""


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What a probe concludes."""

    plots: tuple[Plot, ...] = ()
    """Curves."""
    checks: tuple[Check, ...] = ()
    """Questions that were answered."""
    regions: tuple[Region, ...] = ()
    """Parts of photos that were measured apart."""


class Probe(Protocol):
    """A question that is asked on every photo."""

    def __call__(self, trial: Trial) -> Mapping[str, float]:
        """Return what is found on one photo, by names of the probe's own choice."""

    def conclude(self, found: Sequence[Mapping[str, float]]) -> Findings:
        """Return the conclusion from all photos; it must not depend on their order."""
