"""From what was found on each photo to an `Evaluation`: means, intervals, comparisons, stamps."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence

from .codecs import EQUAL_BITS
from .compare import RESAMPLES, Bootstrap
from .latent_stats import LatentStats
from .measures import Measures
from .probes import Probe
from .protocols import Protocol
from .rates import RATE, rate_metrics
from .results import Comparison, Evaluation, PhotoResult, Plot, Row, Speed, photo_means
from .routes import Route
from .shares import Share

__all__ = ["summarise"]


def summarise(
    routes: Sequence[Route],
    protocol: Protocol,
    measures: Measures,
    found: Share,
    distances: Mapping[str, Mapping[str, float]],
    probes: Sequence[Probe],
) -> Evaluation:
    """Return the evaluation of everything that was found.

    Args:
        routes: One a row.
        protocol: How it was measured.
        measures: What was measured.
        found: On all photos.
        distances: Fréchet distances by row and metric.
        probes: What was tried beside; they conclude from what they found on each photo.
    """
    bootstrap = Bootstrap([photo.name for photo in found.sizes])
    columns = {name: _columns(photos, measures) for name, photos in found.results.items()}
    rows = tuple(_row(route, found, columns[route.name], distances.get(route.name, {}), bootstrap) for route in routes)
    findings = [probe.conclude([one[index] for one in found.probed]) for index, probe in enumerate(probes)]
    stamp = protocol.stamp() | measures.stamp
    stamp["intervals"] = f"95%, paired bootstrap over photos, {RESAMPLES} draws, seed 0, expanded percentiles"
    stamp["photos"] = str(len(found.sizes))
    stamp["photos sha256"] = _fingerprint(found.digests)
    return Evaluation(
        size=protocol.size,
        metrics=measures.table,
        photos=tuple(found.sizes),
        rows=rows,
        pictures=found.gallery.pictures(),
        speed=_speeds(routes, found),
        protocol=stamp,
        comparisons=tuple(_comparisons(rows, columns, measures, bootstrap)),
        plots=_plots(rows, measures, [plot for one in findings for plot in one.plots]),
        checks=tuple(check for one in findings for check in one.checks),
        regions=tuple(region for one in findings for region in one.regions),
        rejects=tuple(found.rejects),
    )


def _columns(photos: Sequence[PhotoResult], measures: Measures) -> dict[str, list[float]]:
    """Metric to its values, one a photo."""
    return {name: [photo.metrics[name] for photo in photos] for name in measures.table}


def _row(
    route: Route,
    found: Share,
    columns: Mapping[str, Sequence[float]],
    distances: Mapping[str, float],
    bootstrap: Bootstrap,
) -> Row:
    """One way of reconstruction, summed up."""
    photos = tuple(found.results[route.name])
    sums = [photo.latents for photo in photos if photo.latents is not None]
    intervals = bootstrap.intervals(columns)
    pooled: dict[str, float] = dict(distances)
    if "psnr_db" in columns:
        intervals["pooled_psnr_db"] = bootstrap.pooled_psnr(columns["psnr_db"])
        pooled = {"pooled_psnr_db": intervals["pooled_psnr_db"].value} | pooled
    bits = found.bits[route.name]
    num_pixels = [photo.width * photo.height for photo in found.sizes]
    return Row(
        name=route.name,
        kind=route.kind,
        means=photo_means(photos),
        intervals=intervals,
        pooled=pooled,
        fingerprint=route.fingerprint,
        bits_per_pixel=math.fsum(bits) / sum(num_pixels) if bits else None,
        latents=LatentStats.pooled(sums) if sums else None,
        photos=photos,
    )


def _comparisons(
    rows: Sequence[Row], columns: Mapping[str, Mapping[str, Sequence[float]]], measures: Measures, bootstrap: Bootstrap
) -> list[Comparison]:
    """The first row against every other."""
    first, *others = rows
    return [
        comparison
        for other in others
        for comparison in bootstrap.compare(
            first.name, columns[first.name], other.name, columns[other.name], measures.table
        )
    ]


def _plots(rows: Sequence[Row], measures: Measures, found: Sequence[Plot]) -> tuple[Plot, ...]:
    """Quality over bits, where at least two rows say how many they took, then everything else."""
    curves = {plot.metric: plot.lines for plot in found if plot.title == RATE}
    spent = {row.name: row.bits_per_pixel for row in rows if row.bits_per_pixel is not None}
    rates = [
        Plot(
            title=RATE,
            x_label="bits per pixel",
            metric=name,
            lines={
                row.name: ((spent[row.name], row.means[name]),)
                for row in rows
                if row.name in spent and row.name.removesuffix(EQUAL_BITS) not in curves.get(name, ())
            }
            | dict(curves.get(name, {})),
        )
        for name in rate_metrics(measures)
        if len(spent) > 1 or name in curves
    ]
    return (*rates, *(plot for plot in found if plot.title != RATE))


def _speeds(routes: Sequence[Route], found: Share) -> dict[str, Speed]:
    """How long the models took."""
    megapixels = sum(photo.width * photo.height for photo in found.sizes) / 1e6
    return {
        route.name: Speed(
            seconds=found.seconds[route.name],
            photos_per_s=len(found.sizes) / found.seconds[route.name],
            megapixels_per_s=megapixels / found.seconds[route.name],
        )
        for route in routes
        if route.kind == "vae"
    }


def _fingerprint(digests: Mapping[str, str]) -> str:
    """The sha256 over the photos' digests in the order of their names."""
    return hashlib.sha256("\n".join(digest for _, digest in sorted(digests.items())).encode()).hexdigest()
