"""`sd-vae anomaly score`: how far pictures are from normal, where, and which of them raise an alarm."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from sd_vae.cli import console
from sd_vae.errors import UserError

if TYPE_CHECKING:
    from sd_vae.autoencoder import AutoencoderKL
    from sd_vae.cli.anomaly_report import Scored
    from sd_vae.latents.anomaly import Detector, Origin
    from sd_vae.losses.perceptual import LPIPS

__all__ = ["Args", "run"]


@dataclass(frozen=True, kw_only=True)
class Args:
    """Score pictures by a detector, and write report.html, scores.csv, scores.json and heat maps.

    Labels, such as the names of the folders that pictures are sorted into, are used to say how well the scores tell:
    AUROC and average precision of each kind against the normal ones.
    """

    model: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="MODEL")]
    """File that `sd-vae anomaly fit` wrote."""
    data: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DATA")]
    """Folder of pictures, parquet file or folder, WebDataset tars, or hf://DATASET[:SPLIT]."""
    out: Path
    """Folder to write."""
    vae: str | None = None
    """Where the VAE is that the detector was fitted with; by default where it was then."""
    config: str | None = None
    """Preset, config.json or its folder, where the VAE brings none."""

    by: str | None = None
    """Score that raises alarms and ranks pictures, such as lines, blur, noise, patch or joint; by default learned, or
    joint where there is no network."""
    false_alarm_rate: float = 0.05
    """Share of normal pictures that may raise an alarm."""
    label_column: str = "label"
    """Column that says what a picture is; in a folder of folders, `label` is the folder's name."""
    normal: tuple[str, ...] = ("good", "normal")
    """Labels of normal pictures; every other label is a kind of abnormal one."""
    maps: Literal["alarms", "all", "none"] = "alarms"
    """Of which pictures to write heat maps, as PNG."""
    top: int = 12
    """So many of the least normal pictures are shown on the page."""
    image_column: str | None = None
    """Column of a table with the pictures, or kind of file in a tar."""
    perceptual_backbone: str | None = None
    """File with the torchvision weights of the detector's LPIPS network; by default the torch hub cache."""

    device: str = "auto"
    """Where the VAE computes: cpu, cuda, cuda:1, mps; auto takes an accelerator where there is one."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """What the VAE computes in; as for fit."""
    workers: int = 2
    """Processes that read and decode pictures; 0 for none."""
    strict: bool = False
    """Stop at the first picture that cannot be used, instead of leaving it out."""
    overwrite: bool = False
    """Replace the folder that is there."""
    json: bool = False
    """Print scores.json on standard output."""


def run(argv: list[str]) -> None:
    """Score, write the folder, print what was found.

    Raises:
        UserError: Whatever is wrong with the arguments, the detector, its VAE or the data.
    """
    args = console.parse(Args, argv, command="anomaly score")

    from sd_vae.cli.anomaly_pictures import Pictures, bar, choose_device, load_lpips, memory_errors
    from sd_vae.cli.anomaly_report import OWN, Report, print_report, write_files
    from sd_vae.data import open_records
    from sd_vae.files import atomic_folder, read_json, require_own_folder
    from sd_vae.latents.anomaly import choose_threshold, load_detector

    detector, origin = load_detector(args.model)
    by = _score_name(args, detector)
    thresholds = {name: choose_threshold(detector.calibration[name], args.false_alarm_rate) for name in detector.scores}
    require_own_folder(args.out, OWN, kind="a folder of anomaly scores", overwrite=args.overwrite)
    records = open_records(args.data, image_column=args.image_column)
    perceptual = load_lpips(detector.lpips_net, args.perceptual_backbone)
    device = choose_device(args.device)
    vae = _load_vae(args, origin, device)
    pictures = Pictures(records, origin.transform, num_workers=args.workers, strict=args.strict)
    console.say(f"scoring {args.data} on {device}.")
    with atomic_folder(args.out, overwrite=args.overwrite) as folder:
        report = Report(
            detector=detector,
            thresholds=thresholds,
            by=by,
            folder=folder,
            normal=args.normal,
            maps=args.maps,
            top=args.top,
        )
        with bar() as progress, memory_errors(device):
            for picture in pictures:
                report.add(_score(args, detector, vae, perceptual, picture), picture.views[0].x)
                progress("scoring", len(report.scored), pictures.num_records)
        if not report.scored:
            raise UserError(f"{args.data} holds no picture that can be scored; give another data set.")
        report.detect()
        write_files(report, title=f"{args.data}: anomalies", provenance=_provenance(args, origin, device))
    pictures.tell_rejects(console.say)
    if args.json:
        console.print_json(read_json(args.out / "scores.json"))
    else:
        print_report(report)
    console.say(f"report: {args.out / 'report.html'}")


def _score_name(args: Args, detector: Detector) -> Any:
    if args.by is None:
        return detector.scores[0]
    if args.by not in detector.scores:
        raise UserError(f"{args.model} has no score {args.by!r}; choose one of: {', '.join(detector.scores)}.")
    return args.by


def _load_vae(args: Args, origin: Origin, device: str) -> AutoencoderKL:
    """The VAE that the detector belongs to."""
    import sd_vae
    from sd_vae.latents.anomaly import vae_fingerprint

    place = args.vae or origin.vae
    try:
        vae = sd_vae.load_vae(place, args.config, dtype=args.dtype, device=device).eval()
    except UserError as error:
        if args.vae is not None:
            raise
        raise UserError(f"the VAE of {args.model} is not where it was: {error} Name its place by --vae.") from None
    given = vae_fingerprint(vae)
    if given != origin.fingerprint:
        raise UserError(
            f"{args.model} was fitted with a VAE of fingerprint {origin.fingerprint[:12]}, {place} has {given[:12]}; "
            "give that one by --vae, in the --dtype that it was fitted in, or fit again."
        )
    return vae


def _score(args: Args, detector: Detector, vae: AutoencoderKL, perceptual: LPIPS | None, picture: Any) -> Scored:
    from sd_vae.cli.anomaly_report import Scored
    from sd_vae.images import to_unit_range
    from sd_vae.latents.anomaly import score

    x = to_unit_range(picture.views[0].x)[None]
    found = score(detector, vae, x, perceptual)
    label = picture.columns.get(args.label_column)
    return Scored(
        name=picture.id,
        label=None if label is None else str(label),
        scores={name: float(values) for name, values in found.scores.items()},
        maps={name: values[0] for name, values in found.maps.items()},
        pixel_variance=float(x.var(correction=0)),
        size=(x.shape[-2], x.shape[-1]),
    )


def _provenance(args: Args, origin: Origin, device: str) -> dict[str, str]:
    """How the report came about, without anything that differs between two runs."""
    import platform

    import diffusers
    import torch

    import sd_vae

    return {
        "Detector": str(args.model),
        "VAE": args.vae or origin.vae,
        "Normal pictures": f"{origin.num_normal} of {origin.normal}, {origin.num_calibrated} of them for calibration",
        "Data": args.data,
        "Computed in": f"{args.dtype} on {device.partition(':')[0]}",
        "Versions": f"sd-vae {sd_vae.__version__}, torch {torch.__version__}, diffusers {diffusers.__version__}, "
        f"Python {platform.python_version()}",
    }
