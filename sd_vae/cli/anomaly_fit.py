"""`sd-vae anomaly fit`: what is normal, learned from normal pictures, as one file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from sd_vae.cli import console
from sd_vae.cli.default_vae import parse_with_vae

if TYPE_CHECKING:
    from torch import Tensor

    from sd_vae.cli.anomaly_pictures import Pictures
    from sd_vae.data import PictureTransform
    from sd_vae.latents.anomaly import Threshold

__all__ = ["Args", "plain", "print_thresholds", "run"]


@dataclass(frozen=True, kw_only=True)
class Args:
    """Learn from normal pictures what is normal: how well the VAE reconstructs them, and what their latents are like.

    A small network is taught too, on defects that are painted into normal pictures: lines, blur, noise, patches.
    """

    vae: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="VAE")]
    """Folder, file or hub id of a VAE, in any layout, or the name of one that ships; left out, `mini`."""
    normal: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="NORMAL")]
    """Normal pictures: a folder, parquet file or folder, WebDataset tars, or hf://DATASET[:SPLIT]."""
    out: Path
    """File to write, such as model.safetensors."""
    config: str | None = None
    """Preset (sd1, sdxl, sd3, flux, mini), config.json or its folder, where the VAE brings none."""

    size: int = 256
    """Side of the square that is cut from each picture, centred, after its shorter side was resized to it."""
    native: bool = False
    """Keep each picture's size, cut to multiples of the VAE's factor; instead of --size."""
    limit: int | None = None
    """Read so many pictures at most."""
    image_column: str | None = None
    """Column of a table with the pictures, or kind of file in a tar."""

    calibration: float = 0.25
    """Share of the pictures that nothing is fitted to: alarms are calibrated on them."""
    false_alarm_rate: float = 0.05
    """Rate for which thresholds are printed; `anomaly score` takes any."""
    steps: int = 3000
    """Batches of 8 normal squares and the same 8 with painted defects that a network learns from, on the CPU: minutes a
    thousand. 0 leaves the network and its scores out."""
    perceptual_net: Literal["none", "alex", "squeeze", "vgg"] = "none"
    """Network of LPIPS, for the score of that name; none leaves it out."""
    perceptual_backbone: str | None = None
    """File with the torchvision weights of that network; by default the torch hub cache."""
    seed: int = 0
    """Of the painted defects and of the network."""

    device: str = "auto"
    """Where the VAE computes: cpu, cuda, cuda:1, mps; auto takes an accelerator where there is one."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """What the VAE computes in."""
    workers: int = 2
    """Processes that read and decode pictures; 0 for none."""
    strict: bool = False
    """Stop at the first picture that cannot be used, instead of leaving it out."""
    overwrite: bool = False
    """Replace the file that is there."""
    json: bool = False
    """Print the result as one JSON object on standard output."""


def run(argv: list[str]) -> None:
    """Fit, write the file, print the thresholds.

    Raises:
        UserError: Whatever is wrong with the arguments, the VAE or the data.
    """
    args = parse_with_vae(Args, argv, command="anomaly fit")

    import sd_vae
    from sd_vae.cli.anomaly_pictures import Pictures, bar, choose_device, load_lpips, memory_errors
    from sd_vae.data import open_records
    from sd_vae.files import require_writable_target
    from sd_vae.latents.anomaly import FitConfig, Origin, choose_threshold, fit, save_detector, vae_fingerprint

    config = FitConfig(
        calibration=args.calibration,
        num_steps=args.steps,
        seed=args.seed,
    )
    require_writable_target(args.out, overwrite=args.overwrite)
    records = open_records(args.normal, columns=(), image_column=args.image_column)
    net = None if args.perceptual_net == "none" else args.perceptual_net
    perceptual = load_lpips(net, args.perceptual_backbone)
    device = choose_device(args.device)
    vae = sd_vae.load_vae(args.vae, args.config, dtype=args.dtype, device=device).eval()
    transform = _transform(args, vae.factor)
    pictures = Pictures(records, transform, num_workers=args.workers, strict=args.strict, limit=args.limit)
    if pictures.num_records is not None:  # now, not after the work
        choose_threshold([0.0] * int(pictures.num_records * args.calibration), args.false_alarm_rate)
    console.say(f"learning what is normal from {args.normal} on {device}.")
    pixels = _Pixels(pictures)
    with bar() as progress, memory_errors(device):
        detector = fit(vae, pixels, config, perceptual=perceptual, progress=progress)
    pictures.tell_rejects(console.say)
    origin = Origin(
        vae=args.vae,
        fingerprint=vae_fingerprint(vae),
        latent_channels=vae.config.latent_channels,
        transform=transform,
        normal=args.normal,
        num_normal=pixels.count,
        num_calibrated=len(detector.calibration["pixel"]),
        num_steps=args.steps,
        seed=args.seed,
        lpips_net=detector.lpips_net,
    )
    save_detector(args.out, detector, origin)
    thresholds = {name: choose_threshold(detector.calibration[name], args.false_alarm_rate) for name in detector.scores}
    if args.json:
        console.print_json(asdict(origin) | {"out": str(args.out), "thresholds": plain(thresholds)})
    else:
        print_thresholds(thresholds)
    console.say(f"detector: {args.out}")


class _Pixels:
    """The pixels of pictures, as often as they are asked for."""

    def __init__(self, pictures: Pictures) -> None:
        self.count = 0
        self._pictures = pictures

    def __iter__(self) -> Iterator[Tensor]:
        """Yield (3, H, W) in uint8."""
        self.count = 0
        for picture in self._pictures:
            self.count += 1
            yield picture.views[0].x


def _transform(args: Args, factor: int) -> PictureTransform:
    from sd_vae.data import PictureTransform

    if args.native:
        return PictureTransform(native=True, factor=factor)
    return PictureTransform(size=args.size, factor=factor, allow_upscale=True)


def plain(thresholds: Mapping[Any, Threshold]) -> dict[str, Any]:
    """Return thresholds as JSON's own values; an interval is an object of value, low and high."""
    return {
        name: {
            "wanted_rate": one.wanted_rate,
            "score": one.score._asdict(),
            "false_alarm_rate": one.false_alarm_rate._asdict(),
            "num_pictures": one.num_pictures,
        }
        for name, one in thresholds.items()
    }


def print_thresholds(thresholds: Mapping[Any, Threshold]) -> None:
    """Print where alarms begin, a score a line."""
    first = next(iter(thresholds.values()))
    console.print_table(
        f"alarms above these scores, for {first.wanted_rate:.1%} false ones; 95% intervals, from {first.num_pictures} "
        "normal pictures that nothing was fitted to",
        ["score", "threshold", "false alarms, truly"],
        [
            [
                name,
                f"{one.score.value:.4g} ({one.score.low:.4g} to {one.score.high:.4g})",
                f"{one.false_alarm_rate.value:.1%} ({one.false_alarm_rate.low:.1%} to {one.false_alarm_rate.high:.1%})",
            ]
            for name, one in thresholds.items()
        ],
    )
