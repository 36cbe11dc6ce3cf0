"""`sd-vae demo`: the whole story in minutes on two cores, on photos that ship with scikit-image, without a hub."""

from __future__ import annotations

import logging
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sd_vae
from sd_vae.cli.console import parse, print_json, print_table, say
from sd_vae.cli.validating import evaluator_of
from sd_vae.errors import UserError
from sd_vae.files import read_json
from sd_vae.weights import DEFAULT_VAE

if TYPE_CHECKING:
    from eval.results import Evaluation
    from sd_vae.autoencoder import AutoencoderKL
    from training.config import TrainConfig

__all__ = ["Args", "run"]

HELD_OUT = ("chelsea", "astronaut", "coffee")
"""scikit-image's photos that nothing is trained on."""

SIZE = 512
"""Side in pixels at which the held-out photos are evaluated: 64x64x4 latents."""

TUNED = "fine-tuned"
"""What the report calls the VAE that the demo has trained."""

OWN = ("photos", "run", "report.html", "report.json", "per_image.csv")
"""What the demo writes; a folder that holds anything else is never replaced."""


@dataclass(frozen=True, kw_only=True)
class Args:
    """Reconstruct photos with the VAE that ships, fine-tune it, load it in diffusers, evaluate it, write a report.

    The photos are those that ship inside scikit-image. Opens no network connection. A few minutes on two cores.
    """

    out: Path
    """Folder to write: report.html, report.json, the run, the photos."""
    steps: int | None = None
    """Optimizer steps, in place of the recipe's."""
    overwrite: bool = False
    """Replace the demo that is in --out."""
    json: bool = False
    """Print the report as one JSON object on standard output."""


def run(argv: list[str]) -> None:
    """Reconstruct, fine-tune, reload in diffusers, run pipelines, evaluate, report."""
    args = parse(Args, argv, command="demo")
    if args.steps is not None and args.steps < 1:
        raise UserError(f"--steps is {args.steps}, it must be at least 1.")
    _prepare_folder(args.out, overwrite=args.overwrite)
    logging.basicConfig(level=logging.INFO, format="  %(message)s", stream=sys.stderr)
    started = time.perf_counter()

    say("1/6 photos: writing those that ship inside scikit-image")
    _write_photos(args.out / "photos")
    say(f"2/6 {DEFAULT_VAE}, which ships with sd-vae: 512x512 to 64x64x4 latents and back, on photos that it never saw")
    shipped = sd_vae.load_vae(DEFAULT_VAE)
    first = _evaluate(args.out, {DEFAULT_VAE: shipped})
    if not args.json:
        _print_numbers(first)

    from training.config import load_recipe

    recipe = load_recipe("demo")
    data = replace(
        recipe.data, train=str(args.out / "photos" / "train"), validation=str(args.out / "photos" / "held_out")
    )
    config = replace(recipe, out=str(args.out / "run"), steps=args.steps or recipe.steps, data=data)
    perceptual = config.loss.perceptual
    say("3/6 fine-tuning it on six photos, to show training")
    say(
        f"  NOTE: the perceptual term is {perceptual.net}, a small network of this project that was taught by LPIPS, "
        "and not LPIPS, whose network is a download; real recipes use LPIPS"
    )
    from training import train

    result = train(config, evaluate=evaluator_of(config))

    say("4/6 opening the trained folder with plain diffusers")
    ours, plain, fast = _load(result.vae)

    say("5/6 running it as vae= of Stable Diffusion pipelines (text to image, image to image)")
    in_pipelines = _check_pipelines(ours, result.vae)

    say("6/6 evaluating the held-out photos with both")
    differences = {"diffusers": plain, "fast kernels": fast, "pipelines": in_pipelines}
    evaluation = _evaluate(args.out, {DEFAULT_VAE: shipped, TUNED: ours})
    _report(args.out, evaluation, ours, config, differences)
    if args.json:
        print_json(read_json(args.out / "report.json"))
    else:
        _print_numbers(evaluation)
    say(f"{time.perf_counter() - started:.0f} s in all; open {args.out / 'report.html'}")


def _prepare_folder(out: Path, *, overwrite: bool) -> None:
    """Make an empty `out`; replace only what an earlier demo has left there."""
    from sd_vae.files import make_folder, require_own_folder

    require_own_folder(out, OWN, kind="a demo", overwrite=overwrite)
    if out.exists():
        shutil.rmtree(out)
    make_folder(out)


def _write_photos(folder: Path) -> None:
    """Write scikit-image's colour photos as PNG: `train` and `held_out`."""
    import skimage.data
    from PIL import Image

    from sd_vae.files import atomic_folder

    left, right, _ = skimage.data.stereo_motorcycle()
    photos: Mapping[str, Any] = {
        "train/hubble": skimage.data.hubble_deep_field(),
        "train/ihc": skimage.data.immunohistochemistry(),
        "train/motorcycle_left": left,
        "train/motorcycle_right": right,
        "train/retina": skimage.data.retina(),
        "train/rocket": skimage.data.rocket(),
        **{f"held_out/{name}": getattr(skimage.data, name)() for name in HELD_OUT},
    }
    with atomic_folder(folder) as temporary:
        for name, pixels in photos.items():
            path = temporary / f"{name}.png"
            path.parent.mkdir(exist_ok=True)
            Image.fromarray(pixels).save(path)


def _load(folder: Path) -> tuple[AutoencoderKL, float, float]:
    """The trained VAE, and how far plain diffusers is from it: from its plain path, and from its fast one.

    That is the largest difference over posterior moments and decoded picture, relative to the largest magnitude.
    """
    import diffusers
    import torch

    from sd_vae import ops

    ours = sd_vae.load_vae(folder)
    theirs = diffusers.AutoencoderKL.from_pretrained(folder).eval()
    x = torch.linspace(-1, 1, 3 * 64 * 64).reshape(1, 3, 64, 64)
    with torch.inference_mode():
        z = theirs.encode(x).latent_dist.mean

        def run(vae: diffusers.AutoencoderKL) -> tuple[torch.Tensor, torch.Tensor]:
            return vae.encode(x).latent_dist.parameters, vae.decode(z).sample

        with ops.reference():
            plain = _largest_difference(run(ours), run(theirs))
        fast = _largest_difference(run(ours), run(theirs))
    say(f"  largest difference to our class: {plain:.1e} of the largest magnitude; to its fast kernels: {fast:.1e}")
    return ours, plain, fast


def _check_pipelines(ours: AutoencoderKL, folder: Path) -> float:
    """Largest relative difference between pipelines that run our class and the same ones that run diffusers' class.

    The UNet is tiny and has random weights, so the pictures mean nothing and are not shown: what is checked is that a
    pipeline takes the VAE and treats it as its own.
    """
    import diffusers
    import torch

    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = diffusers.UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(8, 16),
            norm_num_groups=4,
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=8,
            attention_head_dim=4,
        )
        prompt = {"prompt_embeds": torch.randn(1, 4, 8), "negative_prompt_embeds": torch.randn(1, 4, 8)}
        image = torch.rand(1, 3, 64, 64)
    outputs = []
    for vae in (ours, diffusers.AutoencoderKL.from_pretrained(folder)):
        parts: dict[str, Any] = dict.fromkeys(
            ("text_encoder", "tokenizer", "safety_checker", "feature_extractor", "image_encoder")
        )
        parts |= {"vae": vae, "unet": unet, "scheduler": diffusers.DDIMScheduler(clip_sample=False, steps_offset=1)}
        common = {**prompt, "num_inference_steps": 2, "output_type": "pt"}
        pictures = []
        for pipeline, inputs in (
            (diffusers.StableDiffusionPipeline, {"height": 64, "width": 64}),
            (diffusers.StableDiffusionImg2ImgPipeline, {"image": image, "strength": 0.5}),
        ):
            pipe = pipeline(**parts, requires_safety_checker=False)
            pipe.set_progress_bar_config(disable=True)
            pictures.append(pipe(**common, **inputs, generator=torch.Generator().manual_seed(0)).images)
        outputs.append(tuple(pictures))
    difference = _largest_difference(*outputs)
    say(f"  both run, and give what they give with diffusers' own class: difference {difference:.1e}")
    say("  (their UNet has random weights: this checks the plumbing, its pictures mean nothing and are not shown)")
    return difference


def _largest_difference(ours: Sequence[Any], theirs: Sequence[Any]) -> float:
    """Largest absolute difference over pairs of tensors, each relative to the other side's largest magnitude."""
    return max(float((one - other).abs().max() / other.abs().max()) for one, other in zip(ours, theirs, strict=True))


def _evaluate(out: Path, vaes: Mapping[str, AutoencoderKL]) -> Evaluation:
    """Evaluate the held-out photos."""
    from eval import evaluate
    from sd_vae.losses import PerceptualConfig, build_perceptual

    perceptual = build_perceptual(PerceptualConfig(net="distilled"))
    return evaluate(dict(vaes), out / "photos" / "held_out", size=SIZE, perceptual=perceptual, box_blocks=(16, 8))


def _report(
    out: Path, evaluation: Evaluation, ours: AutoencoderKL, config: TrainConfig, differences: Mapping[str, float]
) -> None:
    """Write report.html and report.json."""
    from eval.report import Section, write_report
    from eval.sanity import shuffled_latents_psnr_db, zero_latents_psnr_db
    from training.records import read_metrics, versions

    held_out = out / "photos" / "held_out"
    zeros = zero_latents_psnr_db(ours, held_out, size=SIZE)
    shuffled = shuffled_latents_psnr_db(ours, held_out, size=SIZE)
    rows = read_metrics(out / "run" / "metrics.jsonl")
    perceptual = config.loss.perceptual
    names = {"loss": "loss", "reconstruction": "L2", perceptual.net: perceptual.net}
    names |= {"kl": "KL", "validation/psnr_db": "validation PSNR, dB"}
    curves = {label: [(int(row["step"]), row[key]) for row in rows if key in row] for key, label in names.items()}
    checks = Section(
        title="What was checked",
        text=["The trained folder was opened by plain diffusers and run in two of its pipelines, as vae=."],
        facts={
            "PSNR from latents of zero": f"{zeros:.2f} dB",
            "PSNR from another photo's latents": f"{shuffled:.2f} dB",
            "Difference to plain diffusers": f"{differences['diffusers']:.1e} of the largest magnitude",
            "The same with our fast kernels": f"{differences['fast kernels']:.1e} of the largest magnitude",
            "Difference inside pipelines": f"{differences['pipelines']:.1e} of the largest magnitude",
        },
    )
    provenance = {
        "Command": f"sd-vae demo --steps {config.steps}",
        "Recipe": f"training/recipes/demo.yaml: {config.model.pretrained}, {config.steps} steps of "
        f"{config.batch_size} crops of {config.data.size}x{config.data.size}, seed {config.seed}",
        "Loss": f"L2 + {perceptual.weight:g} x {perceptual.net} + "
        f"{config.loss.kl.weight:g} x KL ({config.loss.kl.convention})",
        "Photos": "those that ship inside scikit-image; Chelsea, the astronaut and the coffee were held out",
        "Versions": ", ".join(f"{name} {number}" for name, number in versions().items()),
    }
    write_report(
        out,
        evaluation,
        title="The VAE that ships, and the same fine-tuned for minutes",
        summary=_summary(evaluation),
        curves=curves,
        sections=[checks],
        provenance=provenance,
    )


def _summary(evaluation: Evaluation) -> list[str]:
    """The result in two sentences."""
    psnr = {row.name: row.means["psnr_db"] for row in evaluation.rows}
    above = psnr[DEFAULT_VAE] - psnr["8x8 box average"]
    return [
        f"On photos that it was not trained on, {DEFAULT_VAE} reconstructs at {psnr[DEFAULT_VAE]:.2f} dB PSNR through "
        f"64x64x4 latents, {abs(above):.2f} dB {'above' if above > 0 else 'below'} an average over 8x8 blocks of the "
        "photo, which keeps 64x64x3 numbers.",
        f"Fine-tuned for minutes on six other photos it is at {psnr[TUNED]:.2f} dB on these. That shows how training "
        "goes; six photos teach it nothing about others.",
    ]


def _print_numbers(evaluation: Evaluation) -> None:
    """Print the report's means."""
    columns = ["", *(metric.label for metric in evaluation.metrics.values()), "KL per element", "scaling factor"]
    rows = []
    for row in evaluation.rows:
        numbers = [f"{row.means[name]:.{metric.digits}f}" for name, metric in evaluation.metrics.items()]
        stats = row.latents
        latent = ["", ""] if stats is None else [f"{stats.kl_per_element:.3f}", f"{stats.scaling_factor:.4f}"]
        rows.append([row.name, *numbers, *latent])
    print_table("held-out photos, means", columns, rows)
