"""What `sd-vae anomaly score` writes and prints: heat maps, scores.csv, scores.json, the page, the tables."""

from __future__ import annotations

import csv
import heapq
import io
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sd_vae.cli import console
from sd_vae.cli.anomaly_fit import plain, print_thresholds
from sd_vae.cli.reconstruct import output_stems
from sd_vae.errors import UserError

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from eval.page import Figure, Section
    from eval.results import Evaluation
    from sd_vae.latents.anomaly import Detection, Detector, Threshold

__all__ = ["BASELINE", "OWN", "Report", "Scored", "print_report", "write_files"]

REPORT_VERSION = 1
"""Version of the layout of scores.json."""
OWN = ("report.html", "scores.csv", "scores.json", "maps")
"""What is written."""
BASELINE = "pixel variance"
"""The trivial score that stands beside the others: the variance of a picture's pixel values, in [-1, 1]."""
ANY = "any"
"""All abnormal pictures, where there are several kinds."""


@dataclass(frozen=True, kw_only=True)
class Scored:
    """One picture."""

    name: str
    """Its name."""
    label: str | None
    """What the data says that it is."""
    scores: Mapping[Any, float]
    """Score to value."""
    maps: Mapping[Any, Tensor]
    """Score to its map (h, w)."""
    pixel_variance: float
    """Of all its values, in [-1, 1]."""
    size: tuple[int, int]
    """Height and width."""


@dataclass(kw_only=True)
class Report:
    """What is found, gathered picture by picture; maps and pixels are kept of the least normal ones only."""

    detector: Detector
    """What is normal."""
    thresholds: Mapping[Any, Threshold]
    """Score to where alarms begin."""
    by: Any
    """Score that raises alarms."""
    folder: Path
    """Where to write."""
    normal: tuple[str, ...]
    """Labels of normal pictures."""
    maps: Literal["alarms", "all", "none"]
    """Of which pictures heat maps are written."""
    top: int
    """So many pictures are shown."""
    scored: list[Scored] = field(default_factory=list)
    """In the order of the data, without maps."""
    detections: dict[str, dict[Any, Detection]] = field(default_factory=dict)
    """Kind of abnormal picture to score to how well it tells; empty without labels."""
    _shown: list[tuple[float, int, Image.Image]] = field(default_factory=list)
    _stems: dict[str, str] = field(default_factory=dict)

    def add(self, scored: Scored, pixels: Tensor) -> None:
        """Take in a picture and its pixels (3, H, W) in uint8; its heat map is written where it is wanted."""
        index, value = len(self.scored), scored.scores[self.by]
        self.scored.append(replace(scored, maps={}))
        is_wanted = self.maps == "all" or (self.maps == "alarms" and self.is_alarm(scored))
        is_shown = self.top > 0 and (len(self._shown) < self.top or value > self._shown[0][0])
        if not (is_wanted or is_shown):
            return
        strip = self._strip(scored, pixels)
        if is_wanted:
            (self.folder / "maps").mkdir(exist_ok=True)
            strip.save(self.folder / "maps" / f"{self._stem(scored.name)}.png")
        if is_shown:
            (heapq.heappush if len(self._shown) < self.top else heapq.heapreplace)(self._shown, (value, -index, strip))

    def is_alarm(self, scored: Scored) -> bool:
        """Whether a picture lies above the threshold."""
        return bool(scored.scores[self.by] > self.thresholds[self.by].score.value)

    @property
    def least_normal(self) -> list[tuple[Scored, Image.Image]]:
        """The pictures that are shown, the least normal first, each with its strip."""
        return [(self.scored[-index], strip) for _, index, strip in sorted(self._shown, key=lambda one: one[:2])[::-1]]

    def kind(self, kind: str) -> list[Scored]:
        """Return the pictures of one kind, or all that are labelled and not normal."""
        if kind == ANY:
            return [one for one in self.scored if one.label is not None and one.label not in self.normal]
        return [one for one in self.scored if one.label == kind]

    def detect(self) -> None:
        """Measure how well the scores tell labelled pictures apart.

        Raises:
            UserError: There are labels, and none of them is a normal one.
        """
        from sd_vae.latents.anomaly import measure_detection

        labels = dict.fromkeys(one.label for one in self.scored if one.label is not None)
        kinds = [label for label in labels if label not in self.normal]
        if not kinds:
            return
        if len(kinds) == len(labels):
            raise UserError(
                f"the pictures are labelled {', '.join(map(repr, kinds[:6]))}, none of which is normal "
                f"({', '.join(self.normal)}); say which are by --normal, or read no labels by --label-column none."
            )
        usual = [one for one in self.scored if one.label in self.normal]
        for kind in [*kinds, ANY] if len(kinds) > 1 else kinds:
            unusual = self.kind(kind)
            self.detections[kind] = {
                name: measure_detection([one.scores[name] for one in usual], [one.scores[name] for one in unusual])
                for name in self.thresholds
            }
            self.detections[kind][BASELINE] = measure_detection(
                [one.pixel_variance for one in usual], [one.pixel_variance for one in unusual]
            )

    def _strip(self, scored: Scored, pixels: Tensor) -> Image.Image:
        """The picture and its heat map side by side."""
        from eval.pictures import side_by_side
        from sd_vae.images import to_pil, to_unit_range
        from sd_vae.latents.anomaly.heat import heat_map

        name: Any = self.by if self.by in scored.maps else "joint"  # pooled latents have no map
        x = to_unit_range(pixels)
        return side_by_side([to_pil(x), heat_map(x, scored.maps[name], self.detector.ranges[name])])

    def _stem(self, name: str) -> str:
        """A file's stem for a picture, `FOLDER_FILE` for one in a folder, no two the same."""
        self._stems[name] = name.replace("/", "_")
        return output_stems(self._stems.values())[self._stems[name]]


def write_files(report: Report, *, title: str, provenance: Mapping[str, str]) -> None:
    """Write scores.csv, scores.json and report.html."""
    from eval.page import render
    from sd_vae.files import write_json, write_text

    write_text(report.folder / "scores.csv", _csv(report))
    write_json(report.folder / "scores.json", _numbers(report, title, provenance))
    html = render(
        _evaluation(report),
        title=title,
        summary=_summary(report),
        curves={},
        sections=_sections(report),
        provenance=provenance,
        worst=0,
        worst_by=report.by,
    )
    write_text(report.folder / "report.html", html)


def print_report(report: Report) -> None:
    """Print thresholds, what the labels say, and what raised an alarm."""
    print_thresholds(report.thresholds)
    if report.detections:
        console.print_table(
            "AUROC against normal pictures (95% interval)",
            ["score", *report.detections],
            [
                [name, *(_area(report.detections[kind][name]) for kind in report.detections)]
                for name in (*report.thresholds, BASELINE)
            ],
        )
    for line in _summary(report):
        print(line)


def _area(found: Detection) -> str:
    return f"{found.auroc.value:.3f} ({found.auroc.low:.3f} to {found.auroc.high:.3f})"


def _summary(report: Report) -> list[str]:
    threshold = report.thresholds[report.by]
    alarms = [one for one in report.scored if report.is_alarm(one)]
    rate = threshold.false_alarm_rate
    lines = [
        f"{len(alarms)} of {len(report.scored)} pictures raise an alarm: their score {report.by} is above "
        f"{threshold.score.value:.4g}. Of normal pictures {rate.value:.1%} would ({rate.low:.1%} to {rate.high:.1%})."
    ]
    for kind, found in report.detections.items():
        one = found[report.by]
        raised = sum(report.is_alarm(each) for each in report.kind(kind))
        lines.append(
            f"{kind}: AUROC {_area(one)}, average precision {one.average_precision:.3f}, "
            f"{raised} of {one.num_abnormal} raise an alarm."
        )
    return lines


def _csv(report: Report) -> str:
    """One line a picture: name, label, alarm, every score, pixel variance; all digits."""
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["picture", "label", "alarm", *report.thresholds, "pixel_variance"])
    for one in report.scored:
        values = [repr(one.scores[name]) for name in report.thresholds]
        label = "" if one.label is None else one.label
        writer.writerow([one.name, label, int(report.is_alarm(one)), *values, repr(one.pixel_variance)])
    return table.getvalue()


def _numbers(report: Report, title: str, provenance: Mapping[str, str]) -> dict[str, Any]:
    return {
        "format": "sd-vae anomaly scores",
        "version": REPORT_VERSION,
        "title": title,
        "by": report.by,
        "thresholds": plain(report.thresholds),
        "detection": {
            kind: {
                name: {
                    "auroc": one.auroc._asdict(),
                    "average_precision": one.average_precision,
                    "num_normal": one.num_normal,
                    "num_abnormal": one.num_abnormal,
                }
                for name, one in found.items()
            }
            for kind, found in report.detections.items()
        },
        "pictures": [
            {
                "name": one.name,
                "label": one.label,
                "alarm": report.is_alarm(one),
                "scores": dict(one.scores),
                "pixel_variance": one.pixel_variance,
            }
            for one in report.scored
        ],
        "provenance": dict(provenance),
    }


def _sections(report: Report) -> list[Section]:
    """What the page has beside the scores."""
    from eval.page import Figure, Section

    figures: list[Figure] = [
        Figure(
            picture=strip,
            caption=f"{one.name}{f' ({one.label})' if one.label else ''}: {report.by} {one.scores[report.by]:.4g}"
            f"{', alarm' if report.is_alarm(one) else ''}",
        )
        for one, strip in report.least_normal
    ]
    found = [
        Section(
            title="Least normal",
            text=[
                f"The pictures with the highest {report.by}. Right: where; black is what half of the cells of normal "
                "pictures lie below, brightest what 99.9% of them do.",
            ],
            figures=figures,
        ),
        Section(
            title="Where alarms begin",
            text=["Thresholds and the true rate of false alarms, with 95% intervals."],
            facts={
                name: f"{one.score.value:.4g} ({one.score.low:.4g} to {one.score.high:.4g}); false alarms "
                f"{one.false_alarm_rate.value:.1%} ({one.false_alarm_rate.low:.1%} to {one.false_alarm_rate.high:.1%})"
                for name, one in report.thresholds.items()
            },
        ),
    ]
    for kind, by_score in report.detections.items():
        counts = next(iter(by_score.values()))
        found.append(
            Section(
                title=f"Told from normal: {kind}",
                text=[f"{counts.num_abnormal} pictures against {counts.num_normal} normal ones; 0.5 is chance."],
                facts={
                    name: f"AUROC {_area(one)}, average precision {one.average_precision:.3f}"
                    for name, one in by_score.items()
                },
            )
        )
    return found


def _evaluation(report: Report) -> Evaluation:
    """The scores in the form that the page takes."""
    from eval.metrics import Metric
    from eval.results import Evaluation, PhotoResult, PhotoSize, Row, photo_means
    from sd_vae.latents.anomaly import SCORES

    metrics = {
        str(name): Metric(
            label=name, higher_is_better=False, digits=3, about=f"{SCORES[name][:1].upper()}{SCORES[name][1:]}."
        )
        for name in report.thresholds
    }
    results = tuple(
        PhotoResult(name=one.name, metrics=dict(one.scores), latent_shape=None, latents=None) for one in report.scored
    )
    return Evaluation(
        size=None,
        metrics=metrics,
        photos=tuple(PhotoSize(name=one.name, width=one.size[1], height=one.size[0]) for one in report.scored),
        rows=(Row(name="scores", kind="vae", means=photo_means(results), latents=None, photos=results),),
    )
