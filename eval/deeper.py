"""Probes beyond one round trip at one size: many trips, other sizes, half precision, tiling, marked parts of photos.

Each is asked for by an option of `sd-vae eval` and answers on the photos of the evaluation, by its metrics.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from PIL import Image

from sd_vae.errors import UserError

from .measures import Measures
from .metrics import psnr_db
from .models import decode, encode, quiet_diffusers, require_autoencoder
from .photos import fit_photo
from .probes import Findings, Probe, Trial
from .protocols import Protocol
from .rates import Rates
from .regions import Regions
from .results import Check, Plot
from .roundtrip import padded
from .routes import VaeRoute

__all__ = ["Deeper", "DtypeCheck", "RoundTrips", "Sizes", "TilingCheck"]

MAX_LOSS_DB = 0.1
"""Half precision passes where the mean PSNR against the photo falls by no more than this."""

MAX_TILING_ERROR = 1e-4
"""Tiling passes where no value is off by more than this part of the largest magnitude."""


class RoundTrips:
    """Every model's own output through it again and again: what repeated editing costs.

    Args:
        vaes: Models by row name.
        protocol: Mode or sample, rounding to 8 bits between trips.
        measures: What is measured, always against the photo.
        num_trips: Trips in all, at least 2.

    Raises:
        UserError: Fewer than 2 trips.
    """

    def __init__(self, vaes: Mapping[str, Any], protocol: Protocol, measures: Measures, num_trips: int) -> None:
        if num_trips < 2:
            raise UserError(f"round trips are {num_trips}, they must be at least 2; one is what is always measured.")
        self._routes = [VaeRoute(name, vae, protocol) for name, vae in vaes.items()]
        self._measures = measures
        self._num_trips = num_trips

    def __call__(self, trial: Trial) -> Mapping[str, float]:
        """Return the metrics of every trip of one photo."""
        found: dict[str, float] = {}
        for route in self._routes:
            recon = trial.recons[route.name]
            for trip in range(1, self._num_trips + 1):
                if trip > 1:
                    recon = route(recon, f"{trial.photo.name} trip {trip}").recon
                values = self._measures.of(recon, trial.x)
                found |= {_key(route.name, name, trip): value for name, value in values.items()}
        return found

    def conclude(self, found: Sequence[Mapping[str, float]]) -> Findings:
        """Return a curve for every metric."""
        trips = range(1, self._num_trips + 1)
        return Findings(plots=_plots("Repeated round trips", "round trips", self._routes, self._measures, trips, found))


class Sizes:
    """The same photos at other sizes: the shorter side resized, the central square kept.

    Args:
        vaes: Models by row name.
        protocol: Everything but the size.
        measures: What is measured.
        sizes: Sides in pixels.

    Raises:
        UserError: A size is below 1 or given twice.
    """

    def __init__(self, vaes: Mapping[str, Any], protocol: Protocol, measures: Measures, sizes: Sequence[int]) -> None:
        if len(set(sizes)) < len(sizes):
            raise UserError(f"a size is given twice among {', '.join(map(str, sizes))}; give each once.")
        for size in sizes:
            dataclasses.replace(protocol, size=size)  # checks it
            measures.require_size(Image.new("RGB", (size, size)))
        self._routes = [VaeRoute(name, vae, protocol) for name, vae in vaes.items()]
        self._filter: Literal["bilinear", "bicubic", "lanczos"] = protocol.resize_filter
        self._measures = measures
        self._sizes = sorted(sizes)

    def __call__(self, trial: Trial) -> Mapping[str, float]:
        """Return the metrics of one photo at every size."""
        found: dict[str, float] = {}
        for size in self._sizes:
            x = fit_photo(trial.original, size, self._filter)
            for route in self._routes:
                values = self._measures.of(route(x, trial.photo.name).recon, x)
                found |= {_key(route.name, name, size): value for name, value in values.items()}
        return found

    def conclude(self, found: Sequence[Mapping[str, float]]) -> Findings:
        """Return a curve for every metric."""
        label = "side of the square, pixels"
        return Findings(plots=_plots("Sizes", label, self._routes, self._measures, self._sizes, found))


class DtypeCheck:
    """A copy of a model in half precision beside itself.

    Args:
        name: Row of the model.
        vae: The model, in float32.
        protocol: Mode or sample, rounding.
        dtype: bfloat16 or float16.

    Raises:
        UserError: The model itself is in half precision already.
    """

    def __init__(self, name: str, vae: Any, protocol: Protocol, dtype: Literal["bfloat16", "float16"]) -> None:
        require_autoencoder(name, vae)
        own = next(vae.parameters()).dtype
        if own != torch.float32:
            raise UserError(
                f"{name} runs in {str(own).removeprefix('torch.')}, half precision is checked against float32; leave "
                "--dtype out."
            )
        self._name, self._dtype = name, dtype
        with quiet_diffusers():
            half = copy.deepcopy(vae).to(getattr(torch, dtype)).eval()
        self._route = VaeRoute(name, half, protocol)

    def __call__(self, trial: Trial) -> Mapping[str, float]:
        """Return the PSNR that half precision loses, and how close its picture is to the float32 one."""
        try:
            recon = self._route(trial.x, trial.photo.name).recon
        except UserError:  # values that are not finite are what is looked for
            return {"failed": 1.0}
        full = trial.recons[self._name]
        pair = psnr_db(full, trial.x), psnr_db(recon, trial.x)
        loss = 0.0 if pair[0] == pair[1] else pair[0] - pair[1]
        return {"failed": 0.0, "loss": loss, "between": psnr_db(recon, full)}

    def conclude(self, found: Sequence[Mapping[str, float]]) -> Findings:
        """Return whether every photo came back, and none of the quality was lost."""
        failed = int(math.fsum(one["failed"] for one in found))
        whole = [one for one in found if not one["failed"]]
        loss = math.fsum(one["loss"] for one in whole) / len(whole) if whole else math.nan
        closest = min((one["between"] for one in whole), default=math.nan)
        facts = {
            "photos that did not come back": f"{failed} of {len(found)}",
            "mean PSNR lost": f"{loss:.4f} dB, at most {MAX_LOSS_DB} is right",
            "least PSNR against the float32 picture": f"{closest:.2f} dB",
        }
        check = Check(
            title=f"{self._dtype} against float32",
            row=self._name,
            facts=facts,
            passed=not failed and loss <= MAX_LOSS_DB,
        )
        return Findings(checks=(check,))


class TilingCheck:
    """A model with tiling against itself without.

    Args:
        name: Row of the model.
        vae: The model; tiling is on for the tiled run only.

    Raises:
        UserError: The model has no tiling.
    """

    def __init__(self, name: str, vae: Any) -> None:
        require_autoencoder(name, vae)
        if not _can_tile(vae):
            raise UserError(f"{name} is a {type(vae).__name__}, which cannot tile; leave --tiling-check out.")
        self._name, self._vae = name, vae

    def __call__(self, trial: Trial) -> Mapping[str, float]:
        """Return the largest difference of latents and of pixels, relative to the largest magnitude."""
        x = padded(self._vae, trial.x)
        z = encode(self._vae, x).z
        recon = decode(self._vae, z)
        self._vae.enable_tiling()
        try:
            differences = {"encode": encode(self._vae, x).z - z, "decode": decode(self._vae, z) - recon}
        finally:
            self._vae.disable_tiling()
        largest = {"encode": z.abs().max(), "decode": recon.abs().max()}
        return {half: float(error.abs().max() / largest[half]) for half, error in differences.items()}

    def conclude(self, found: Sequence[Mapping[str, float]]) -> Findings:
        """Return whether no value of any photo is off."""
        worst = {half: max(one[half] for one in found) for half in ("encode", "decode")}
        facts = {
            f"largest difference, {half}": f"{value:.1e} of the largest magnitude, "
            f"at most {MAX_TILING_ERROR:.0e} is right"
            for half, value in worst.items()
        }
        passed = max(worst.values()) <= MAX_TILING_ERROR
        return Findings(checks=(Check(title="Tiled against untiled", row=self._name, facts=facts, passed=passed),))


@dataclass(frozen=True, kw_only=True)
class Deeper:
    """What is asked beyond the metrics."""

    round_trips: int = 0
    """Trips of every model's own output, 0 for none."""
    sizes: tuple[int, ...] = ()
    """Sides in pixels of central squares to evaluate too."""
    dtypes: tuple[Literal["bfloat16", "float16"], ...] = ()
    """Half precisions to try on the first model."""
    tiling: bool = False
    """Try the first model with tiling."""
    rates: tuple[str, ...] = ()
    """Codecs to draw over the rate, in several qualities."""

    def probes(self, vaes: Mapping[str, Any], protocol: Protocol, measures: Measures) -> list[Probe]:
        """Return what is asked as probes; marked parts of photos are always measured.

        Raises:
            UserError: What cannot be asked of these models.
        """
        name, first = next(iter(vaes.items()))
        found: list[Probe] = [Regions(measures, protocol.size)]
        if self.round_trips:
            found.append(RoundTrips(vaes, protocol, measures, self.round_trips))
        if self.sizes:
            found.append(Sizes(vaes, protocol, measures, self.sizes))
        found += [DtypeCheck(name, first, protocol, dtype) for dtype in self.dtypes]
        if self.tiling:
            found.append(TilingCheck(name, first))
        if self.rates:
            found.append(Rates(self.rates, measures))
        return found


def _can_tile(vae: Any) -> bool:
    return hasattr(vae, "enable_tiling") and hasattr(vae, "disable_tiling")


def _key(row: str, metric: str, at: int) -> str:
    return f"{row}\n{metric}\n{at}"


def _plots(
    title: str,
    x_label: str,
    routes: Sequence[VaeRoute],
    measures: Measures,
    places: Sequence[int],
    found: Sequence[Mapping[str, float]],
) -> tuple[Plot, ...]:
    """A plot for every metric, means over photos."""

    def mean(row: str, metric: str, at: int) -> float:
        return math.fsum(one[_key(row, metric, at)] for one in found) / len(found)

    return tuple(
        Plot(
            title=title,
            x_label=x_label,
            metric=metric,
            lines={route.name: tuple((float(at), mean(route.name, metric, at)) for at in places) for route in routes},
        )
        for metric in measures.table
    )
