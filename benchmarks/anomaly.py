"""How well `sd-vae anomaly` tells photos with defects from the same photos without, and food from everything else.

    python -m benchmarks.anomaly VAE --photos ../shared/data/photos_train --work ../anomaly --plot docs/anomaly.jpg

Normal photos are those that `benchmarks.mini_data` trains on; the held-out ones are scored as they are and with a
defect of each kind. The commands are run as a user would; WORK keeps the photos, the detectors and the reports. Prints
the table of `docs/anomaly.md`, and how many of each kind raise an alarm at a false-alarm rate of 5%.
"""

import argparse
import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.anomaly_defects import DEFECTS, make_defect
from benchmarks.figures import Figure, to_markdown
from benchmarks.mini_data import is_held_out
from sd_vae.cli import main as sd_vae
from sd_vae.images import list_images, open_image
from sd_vae.latents.preview import contact_sheet

__all__ = ["alarm_rates", "make_photos", "measure_defects", "sheet", "table", "to_figures"]

BAR = 0.9
"""AUROC that every kind of defect is to reach."""
SCORE = {
    "scratches": "lines",
    "blur": "blur",
    "blurred_patch": "blur",
    "noise_patch": "noise",
    "foreign_patch": "patch",
}
"""Kind of defect to the score that is to find it; `learned`, which raises alarms, is printed beside."""
TRIVIAL = "pixel variance"
"""What `sd-vae anomaly score` calls the score that any other has to beat."""
SHEET_SIDE = 192
"""Pixels of a picture in the sheet."""
FOOD = "feedme"
"""The folder of the photos that holds food."""


def make_photos(photos: Path, work: Path, *, size: int, limit: int, kinds: Iterable[str] = DEFECTS) -> None:
    """Write `normal/`, `defects/` with `good/` and each kind, and the same of food against everything else.

    Args:
        photos: Folder of folders of photos.
        work: Folder to write.
        size: Side of the squares in pixels.
        limit: Normal photos at most.
        kinds: Defects to make.
    """
    named = {f"{path.parent.name}/{path.name}": path for path in list_images(photos)}
    normal = sorted((name for name in named if not is_held_out(name)), key=_shuffled)
    held_out = sorted(name for name in named if is_held_out(name))
    for name in normal[:limit]:
        _save(_square(named[name], size), work / "normal" / _file(name))
    squares = [_square(named[name], size) for name in held_out]
    for index, (name, square) in enumerate(zip(held_out, squares, strict=True)):
        _save(square, work / "defects" / "good" / _file(name))
        rng = np.random.default_rng((1, index))
        donor = squares[(index + int(rng.integers(1, len(squares)))) % len(squares)]
        for kind in kinds:
            _save(make_defect(kind, square, donor, index), work / "defects" / kind / _file(name))
    food = [name for name in normal if name.startswith(f"{FOOD}/")]
    for name in food[:limit]:
        _save(_square(named[name], size), work / "food" / _file(name))
    for name, square in zip(held_out, squares, strict=True):
        _save(square, work / "kinds" / ("good" if name.startswith(f"{FOOD}/") else "other") / _file(name))


def table(scores: dict[str, dict[str, dict[str, float]]]) -> list[str]:
    """Return lines of Markdown: a line a score, a column a kind, AUROC with its interval.

    Args:
        scores: Kind to score to the numbers of `scores.json`.
    """
    names = dict.fromkeys(name for by_score in scores.values() for name in by_score)
    lines = [f"| score | {' | '.join(scores)} |", f"|---|{'---|' * len(scores)}"]
    for name in names:
        cells = [_cell(by_score.get(name)) for by_score in scores.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def alarm_rates(pictures: Iterable[dict[str, Any]]) -> dict[str, float]:
    """Return the share of each label's pictures that raise an alarm.

    Args:
        pictures: Those of `scores.json`.
    """
    alarms: dict[str, list[bool]] = {}
    for picture in pictures:
        alarms.setdefault(picture["label"], []).append(picture["alarm"])
    return {label: sum(values) / len(values) for label, values in alarms.items()}


def sheet(maps: Path, kinds: Sequence[str], *, num_photos: int = 2) -> Image.Image:
    """Return the first pictures of each kind, a column a kind, each above its heat map.

    Args:
        maps: Folder `maps` of a report: a picture and its heat map side by side, as `KIND_NAME.png`.
        kinds: In the order of the columns.
        num_photos: Of each kind.
    """
    strips = [[open_image(path) for path in sorted(maps.glob(f"{kind}_*.png"))[:num_photos]] for kind in kinds]
    cells = []
    for row in zip(*strips, strict=True):
        side = row[0].height
        cells += [strip.crop((0, 0, side, side)) for strip in row]
        cells += [strip.crop((strip.width - side, 0, strip.width, side)) for strip in row]
    return contact_sheet(cells, columns=len(kinds), side=SHEET_SIDE)


def _cell(found: dict[str, float] | None) -> str:
    return "-" if found is None else f"{found['value']:.3f} ({found['low']:.2f} to {found['high']:.2f})"


def _run(vae: str, work: Path, normal: str, data: str, options: list[str]) -> dict[str, Any]:
    """Fit and score; what is in scores.json."""
    model, out = work / f"{normal}.safetensors", work / f"{data}_report"
    codes = [
        sd_vae(["anomaly", "fit", vae, str(work / normal), "--out", str(model), "--overwrite", *options]),
        sd_vae(["anomaly", "score", str(model), str(work / data), "--out", str(out), "--overwrite", "--maps", "all"]),
    ]
    if any(codes):
        raise SystemExit(max(codes))
    found: dict[str, Any] = json.loads((out / "scores.json").read_text())
    return found


def _aurocs(scores: dict[str, Any]) -> dict[str, dict[str, dict[str, float]]]:
    return {
        kind: {name: one["auroc"] for name, one in by_score.items()} for kind, by_score in scores["detection"].items()
    }


def _square(path: Path, size: int) -> np.ndarray:
    image = open_image(path)
    scale = size / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    left, top = (width - size) // 2, (height - size) // 2
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(resized.crop((left, top, left + size, top + size)))


def _save(pixels: np.ndarray, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def _file(name: str) -> str:
    return Path(name.replace("/", "_")).with_suffix(".png").name


def _shuffled(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def to_figures(found: dict[str, Any]) -> list[Figure]:
    """Return the bars of what `scores.json` says of the defects."""
    aurocs = _aurocs(found)
    return [
        Figure(name=f"AUROC of {kind}", value=aurocs[kind][score]["value"], must=BAR, note=_beside(aurocs[kind], score))
        for kind, score in SCORE.items()
    ]


def _beside(aurocs: dict[str, dict[str, float]], score: str) -> str:
    return f"by {score}; learned {aurocs['learned']['value']:.3f}, pixel variance {aurocs[TRIVIAL]['value']:.3f}"


def measure_defects(vae: str, work: Path, size: int, steps: int) -> dict[str, Any]:
    """Return scores.json of photos with defects, by a detector of normal ones; `make_photos` made them."""
    return _run(vae, work, "normal", "defects", ["--size", str(size), "--steps", str(steps)])


def main() -> None:
    """Make the photos, fit and score, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("vae", help="any VAE that sd-vae reads")
    parser.add_argument("--photos", type=Path, required=True, help="folder of folders of photos")
    parser.add_argument("--work", type=Path, required=True, help="folder for photos, detectors and reports")
    parser.add_argument("--size", type=int, default=256, help="side of the squares in pixels")
    parser.add_argument("--limit", type=int, default=1200, help="normal photos at most")
    parser.add_argument("--steps", type=int, default=3000, help="batches that the network learns from")
    parser.add_argument("--plot", type=Path, help="picture to write: defects and their heat maps")
    args = parser.parse_args()
    make_photos(args.photos, args.work, size=args.size, limit=args.limit)
    found = measure_defects(args.vae, args.work, args.size, args.steps)
    print("\n".join(table(_aurocs(found))))
    print(to_markdown(to_figures(found)))
    print("alarms:", ", ".join(f"{label} {rate:.0%}" for label, rate in alarm_rates(found["pictures"]).items()))
    if args.plot:
        sheet(args.work / "defects_report" / "maps", list(DEFECTS)).save(args.plot, quality=85)
    others = _run(args.vae, args.work, "food", "kinds", ["--size", str(args.size), "--steps", "0"])
    print("\n".join(table({"food against everything else": _aurocs(others)["other"]})))


if __name__ == "__main__":
    main()
