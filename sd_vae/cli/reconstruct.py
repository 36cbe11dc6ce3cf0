"""`sd-vae reconstruct`: anybody's pictures through any VAE and back, side by side, measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

import sd_vae
from sd_vae.cli.console import print_json, print_table, say
from sd_vae.cli.default_vae import holds_pictures, parse_with_vae
from sd_vae.errors import UserError

if TYPE_CHECKING:
    from eval.evaluator import Perceptual
    from eval.results import Evaluation, ReconPictures

__all__ = ["Args", "output_stems", "run"]


OWN = {"report.html", "report.json", "per_image.csv"}
"""What stands in an output folder beside the pictures."""

MAX_LISTED = 3
"""Pictures named in an error or in the report's origin."""


@dataclass(frozen=True, kw_only=True)
class Args:
    """Encode and decode pictures: reconstructions, side-by-side pictures, a report, PSNR and SSIM."""

    vae: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="VAE")]
    """Folder, file or hub id of a VAE, in any layout, or the name of one that ships; left out, `mini`."""
    images: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="IMAGE...")]
    """Pictures of any size; a folder stands for the pictures in and below it."""
    out: Path
    """Folder to write."""
    config: str | None = None
    """Preset (sd1, sdxl, sd3, flux, mini), config.json or its folder, where the VAE brings none."""
    size: int | None = None
    """Resize the short side to this many pixels and keep the central square; by default pictures keep their size."""
    device: str = "auto"
    """Where to compute: cpu, cuda, cuda:1, mps; auto takes an accelerator where there is one."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """What to compute in."""
    perceptual_net: Literal["none", "ms_dssim", "alex", "squeeze", "vgg"] = "none"
    """Measure a perceptual distance too: multi-scale SSIM, or LPIPS on that network."""
    perceptual_backbone: str | None = None
    """File with the torchvision weights of the LPIPS network; by default the torch hub cache."""
    overwrite: bool = False
    """Replace the folder that is there."""
    json: bool = False
    """Print the report as one JSON object on standard output."""


def run(argv: list[str]) -> None:
    """Reconstruct pictures, write them with a report, print the numbers."""
    args = parse_with_vae(Args, argv, command="reconstruct", lacks_vae=lambda args: holds_pictures(Path(args.vae)))

    from eval.photos import find_files, list_photos
    from sd_vae.files import atomic_folder, read_json

    paths = find_files(args.images)
    names = [photo.name for photo in list_photos(paths)]
    _require_apart(args.out, [Path(args.vae), *paths])
    _require_target(args.out, overwrite=args.overwrite)
    _require_readable(paths)

    from eval.evaluator import evaluate
    from eval.report import write_report

    device = _device(args.device)
    perceptual = _perceptual(args, device)
    vae = sd_vae.load_vae(args.vae, args.config, dtype=args.dtype, device=device)
    with atomic_folder(args.out, overwrite=args.overwrite) as folder, _progress() as progress, _memory(device):
        evaluation = evaluate(
            {Path(args.vae).name or args.vae: vae},
            paths,
            size=args.size,
            strict=True,
            perceptual=perceptual,
            on_pictures=_writer(folder, names),
            progress=progress,
        )
        write_report(folder, evaluation, title="Reconstructions", provenance=_provenance(args, device))
    if args.json:
        print_json(read_json(args.out / "report.json"))
    else:
        _print_numbers(evaluation)
    speed = next(iter(evaluation.speed.values()))
    say(f"{speed.seconds:.1f} s on {device}, {speed.megapixels_per_s:.2f} megapixels/s.")
    say(f"pictures and report: {args.out / 'report.html'}")


def output_stems(names: Iterable[str]) -> dict[str, str]:
    """Return a file stem for each picture name, so that no `STEM.png` and `STEM_compare.png` fall on one another.

    Names of one stem get -2, -3, ... in their order. Upper and lower case count as equal, as on some disks.
    """
    stems: dict[str, str] = {}
    taken: set[str] = set()
    for name in names:
        plain = Path(name).stem
        stem, number = plain, 1
        while taken & {stem.casefold(), f"{stem}_compare".casefold()}:
            number += 1
            stem = f"{plain}-{number}"
        taken |= {stem.casefold(), f"{stem}_compare".casefold()}
        stems[name] = stem
    return stems


def _writer(folder: Path, names: list[str]) -> Callable[[str, Mapping[str, ReconPictures]], None]:
    """What writes a picture's reconstruction and its comparison as soon as they exist."""
    from eval.pictures import side_by_side

    stems = output_stems(names)

    def write(name: str, pictures: Mapping[str, ReconPictures]) -> None:
        (shown,) = pictures.values()
        shown.recon.save(folder / f"{stems[name]}.png")
        side_by_side([shown.original, shown.recon, shown.error]).save(folder / f"{stems[name]}_compare.png")

    return write


def _require_target(out: Path, *, overwrite: bool) -> None:
    """Check that `out` may be made, in place of at most an earlier reconstruction."""
    from sd_vae.files import require_own_folder

    names = {path.name for path in out.iterdir()} if out.is_dir() else set()
    pictures = {name for name in names if name.endswith(".png")} if "report.json" in names else set()
    require_own_folder(out, OWN | pictures, kind="a reconstruction", overwrite=overwrite)


def _require_apart(out: Path, sources: Iterable[Path]) -> None:
    """Check that replacing `out` would not remove what is read."""
    for source in sources:
        if source.resolve().is_relative_to(out.resolve()):
            raise UserError(f"{source} is inside the output folder {out}, which is written anew; choose another --out.")


def _require_readable(paths: Iterable[Path]) -> None:
    """Open every picture once, so that damaged ones are named before the work, not in its midst.

    Raises:
        UserError: Lists the first of those that cannot be read.
    """
    from sd_vae.images import open_image

    problems: list[str] = []
    for path in paths:
        try:
            open_image(path)
        except UserError as error:
            problems.append(str(error).rstrip("."))
    if problems:
        raise UserError(f"{_some(problems, '; ')}.")


def _some(items: list[str], separator: str) -> str:
    """The first few, and how many more there are."""
    more = [f"and {len(items) - MAX_LISTED} more"] if len(items) > MAX_LISTED else []
    return separator.join(items[:MAX_LISTED] + more)


def _device(name: str) -> str:
    """The device that `auto` stands for."""
    import torch

    if name != "auto":
        return name
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return accelerator.type if accelerator else "cpu"


def _perceptual(args: Args, device: str) -> Perceptual | None:
    """The perceptual distance that was asked for, on its device."""
    if args.perceptual_net == "none":
        if args.perceptual_backbone is not None:
            raise UserError(
                f"--perceptual-backbone is {args.perceptual_backbone} but --perceptual-net is none; "
                "say which network it is: alex, squeeze or vgg."
            )
        return None
    from sd_vae.losses import PerceptualConfig, build_perceptual

    built = build_perceptual(PerceptualConfig(net=args.perceptual_net, backbone=args.perceptual_backbone))
    assert built is not None, "a perceptual term of weight 1 is always built"
    return built.to(device)


def _provenance(args: Args, device: str) -> dict[str, str]:
    """How the report came about."""
    import platform

    import diffusers
    import torch

    return {
        "VAE": args.vae,
        "Pictures": _some([str(path) for path in args.images], ", "),
        "Computed in": f"{args.dtype} on {device}",
        "Versions": f"sd-vae {sd_vae.__version__}, torch {torch.__version__}, diffusers {diffusers.__version__}, "
        f"Python {platform.python_version()}",
    }


@contextmanager
def _progress() -> Iterator[Callable[[int, int], None]]:
    """A bar on standard error with rate and time left; yields what moves it to (done, total)."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        Task,
        TextColumn,
        TimeRemainingColumn,
    )
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text(f"{task.speed:.2f} pictures/s" if task.speed else "")

    columns = [TextColumn("reconstructing"), BarColumn(), MofNCompleteColumn(), Rate(), TimeRemainingColumn()]
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("")
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextmanager
def _memory(device: str) -> Iterator[None]:
    """Turn a device that is out of memory into what the user can do about it."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"{device} is out of memory: {str(error).splitlines()[0].rstrip('.')}; make pictures smaller with --size, "
            "or use --dtype bfloat16 or --device cpu."
        ) from error


def _print_numbers(evaluation: Evaluation) -> None:
    """The table on standard output: one line a picture, their mean last."""
    (row,) = evaluation.rows
    lines = [(photo.name, photo.metrics) for photo in row.photos] + [("mean", row.means)]
    print_table(
        f"{row.name}: reconstructions",
        ["picture", *(metric.heading for metric in evaluation.metrics.values())],
        [[name, *(metric.format(values[key]) for key, metric in evaluation.metrics.items())] for name, values in lines],
    )
