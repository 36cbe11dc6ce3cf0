"""`sd-vae distill`: a TAESD-sized autoencoder for the latents of any VAE."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

import sd_vae
from sd_vae.cli import console
from sd_vae.cli.default_vae import parse_with_vae
from sd_vae.errors import UserError

if TYPE_CHECKING:
    from diffusers import AutoencoderTiny
    from PIL import Image

    from sd_vae.autoencoder import AutoencoderKL
    from sd_vae.latents.distillation import Step

__all__ = ["Args", "run"]

OWN = ("config.json", "diffusion_pytorch_model.safetensors", "comfyui.safetensors", "comparison.jpg", "report.json")
"""What stands in an output folder."""

MAX_MEASURED = 16
"""Pictures that the student is measured on."""

SHOWN = 4
"""Pictures on the comparison."""


@dataclass(frozen=True, kw_only=True)
class Args:
    """Teach a small fast autoencoder (diffusers' AutoencoderTiny, TAESD's size) what a VAE does; docs/distill.md.

    The folder opens in diffusers, in sd-vae eval, and, by comfyui.safetensors in models/vae, in ComfyUI. A linear
    preview, which needs no training, is made by sd-vae latents preview.
    """

    vae: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="VAE")]
    """Folder, file or hub id of the VAE to learn from, or the name of one that ships; left out, `mini`."""
    data: str
    """Pictures: a folder, parquet file or folder, WebDataset tars, or hf://DATASET[:SPLIT]."""
    out: Path
    """Folder to write."""
    validation: str | None = None
    """Pictures to measure the student on; by default some of --data, which it has seen."""
    start: Path | None = None
    """AutoencoderTiny to begin with, such as TAESD or one of an interrupted run; by default random weights."""
    steps: int = 5000
    """Optimizer steps."""
    batch_size: int = 8
    """Crops a step."""
    size: int = 128
    """Side of the square crops, in pixels, a multiple of the VAE's factor."""
    lr: float = 5e-4
    """Largest learning rate."""
    perceptual_net: Literal["none", "alex", "squeeze", "vgg", "ms_dssim"] = "none"
    """Judge the decoder by a perceptual distance too: LPIPS on that network, or multi-scale SSIM."""
    perceptual_backbone: str | None = None
    """File with the torchvision weights of the LPIPS network; by default the torch hub cache."""
    perceptual_weight: float = 0.5
    """Weight of that, beside the absolute difference of pixels."""
    num_workers: int = 2
    """Processes that read pictures; 0 reads in this one."""
    seed: int = 0
    """Seed of weights, crops and draws."""
    config: str | None = None
    """Preset (sd1, sdxl, sd3, flux, mini), config.json or its folder, where the VAE brings none."""
    device: str = "cpu"
    """Where to compute: cpu, cuda, cuda:1, mps."""
    overwrite: bool = False
    """Replace a student that an earlier run made."""
    json: bool = False
    """Print the result as one JSON object."""


def run(argv: list[str]) -> None:
    """Teach, measure, save.

    Args:
        argv: The command's arguments.

    Raises:
        UserError: As `sd_vae.latents.distillation.distill`, the pictures cannot be read, or `--out` is taken.
        KeyboardInterrupt: Stopped; what was learned is saved.
    """
    args = parse_with_vae(Args, argv, command="distill")

    import torch

    from sd_vae.data import DataConfig, open_training_source, training_loader
    from sd_vae.files import require_own_folder
    from sd_vae.latents.distillation import DistillConfig, build_student, distill
    from sd_vae.losses import PerceptualConfig, build_perceptual

    require_own_folder(args.out, OWN, kind="a student", overwrite=args.overwrite)
    config = DistillConfig(steps=args.steps, lr=args.lr, perceptual_weight=args.perceptual_weight, seed=args.seed)
    if args.batch_size < 1:
        raise UserError(f"--batch-size is {args.batch_size}, it must be at least 1.")
    data = DataConfig(train=args.data, size=args.size, num_workers=args.num_workers)
    source = open_training_source(data, args.seed)
    perceptual = None
    if args.perceptual_net != "none":
        perceptual = build_perceptual(PerceptualConfig(net=args.perceptual_net, backbone=args.perceptual_backbone))
        assert perceptual is not None, "a perceptual term of weight 1 is always built"
        perceptual.to(args.device)
    vae = sd_vae.load_vae(args.vae, args.config, device=args.device)
    if args.size % vae.factor:
        raise UserError(f"--size is {args.size}, it must be a multiple of the VAE's factor, {vae.factor}.")
    torch.manual_seed(args.seed)  # the student's weights
    student = build_student(vae) if args.start is None else _load(args.start)
    batches = training_loader(source, data, batch_size=args.batch_size, seed=args.seed)
    began = time.perf_counter()
    stopped_at = None
    with _progress(args.steps) as (progress, done):
        try:
            distill(
                vae, (batch.x for batch in batches), config, student=student, perceptual=perceptual, progress=progress
            )
        except KeyboardInterrupt:
            if not done:
                raise
            stopped_at = len(done)
    seconds = time.perf_counter() - began
    pictures = _pictures(args.validation or args.data)
    report = {"vae": args.vae, "data": args.data, "steps": len(done), "seconds": seconds} | done[-1].losses
    report |= {"measured_on": "validation" if args.validation else "training pictures"}
    report |= _save(vae, student, pictures, report, args)
    if stopped_at is not None:
        raise KeyboardInterrupt(f"stopped after {stopped_at} steps; what was learned is in {args.out}, see --start.")
    if args.json:
        console.print_json(report)
        return
    console.print_fields(
        {name: f"{value:.4g}" if isinstance(value, float) else value for name, value in report.items()}
    )


def _load(folder: Path) -> AutoencoderTiny:
    """An `AutoencoderTiny` from its folder.

    Raises:
        UserError: There is none.
    """
    from eval.models import load_autoencoder

    model = load_autoencoder(folder)
    if type(model).__name__ != "AutoencoderTiny":
        raise UserError(f"{folder} holds a {type(model).__name__}, --start takes an AutoencoderTiny; leave it out.")
    return model


def _pictures(spec: str) -> list[Image.Image]:
    """Some pictures of a source, evenly over it."""
    from sd_vae.data import open_images

    images = open_images(spec)
    count = min(MAX_MEASURED, len(images))
    return [images.load(index * len(images) // count) for index in range(count)]


def _save(
    vae: AutoencoderKL, student: AutoencoderTiny, pictures: list[Image.Image], report: dict[str, Any], args: Args
) -> dict[str, Any]:
    """Write the folder; returns what the student is worth."""
    from sd_vae.checkpoints.formats import write_safetensors
    from sd_vae.files import atomic_folder, write_json
    from sd_vae.latents.distillation import COMFYUI, comfyui_tensors
    from sd_vae.latents.preview import contact_sheet

    found, rows = _compare(vae, student, pictures)
    with atomic_folder(args.out, overwrite=args.overwrite) as folder:
        student.save_pretrained(folder)
        try:
            write_safetensors(folder / COMFYUI, comfyui_tensors(student, vae))
        except UserError as error:
            found["comfyui"] = f"no {COMFYUI}: {error}"
        contact_sheet(rows, columns=3).save(folder / "comparison.jpg", quality=85)
        write_json(folder / "report.json", report | found)
    return {"out": str(args.out), **found}


def _compare(
    vae: AutoencoderKL, student: AutoencoderTiny, pictures: list[Image.Image]
) -> tuple[dict[str, Any], list[Image.Image]]:
    """Mean PSNRs and times over the central squares of pictures, and some of these with both reconstructions."""
    import statistics

    import torch

    from eval.metrics import psnr_db
    from eval.photos import fit_photo
    from sd_vae.images import to_pil, to_tensor
    from sd_vae.latents.distillation import scaled

    sums: dict[str, list[float]] = {}
    rows: list[Image.Image] = []
    for picture in pictures:
        side = max(min(256, *picture.size) // vae.factor, 1) * vae.factor
        square = fit_photo(picture, side)
        x = to_tensor(square).to(vae.device)
        with torch.no_grad():
            z = vae.encode(x).latent_dist.mode()
            began = time.perf_counter()
            taught = to_pil(vae.decode(z).sample)
            middle = time.perf_counter()
            learned = to_pil(student.decode(scaled(vae, z)).sample)
            ended = time.perf_counter()
            both = to_pil(student.decode(student.encode(x).latents).sample)
        values = {
            "student_to_vae_psnr_db": psnr_db(learned, taught),
            "student_psnr_db": psnr_db(learned, square),
            "vae_psnr_db": psnr_db(taught, square),
            "student_both_halves_psnr_db": psnr_db(both, square),
            "vae_decode_s": middle - began,
            "student_decode_s": ended - middle,
        }
        for name, value in values.items():
            sums.setdefault(name, []).append(value)
        if len(rows) < 3 * SHOWN:
            rows += [square, taught, learned]
    return {name: statistics.fmean(values) for name, values in sums.items()}, rows


@contextmanager
def _progress(steps: int) -> Iterator[tuple[Callable[[Step], None], list[Step]]]:
    """A bar on standard error with rate, time left and losses; yields what moves it, and the steps done."""
    from tqdm import tqdm

    done: list[Step] = []
    with tqdm(desc="distilling", total=steps, unit="step", file=sys.stderr) as bar:

        def show(step: Step) -> None:
            done.append(step)
            bar.set_postfix({name: f"{value:.4f}" for name, value in step.losses.items()}, refresh=False)
            bar.update()

        yield show, done
