"""`sd-vae sample`: pictures of latents that are drawn from a prior."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

import sd_vae
from sd_vae.cli import console
from sd_vae.cli.default_vae import parse_with_vae
from sd_vae.cli.tools import best_device, picture_progress, require_at_least
from sd_vae.errors import UserError

if TYPE_CHECKING:
    from PIL import Image

    from sd_vae.autoencoder import AutoencoderKL
    from sd_vae.latents.prior import FieldPrior

__all__ = ["Args", "run"]

SHEET, LISTING = "sheet.png", "samples.json"
MAX_SHOWN = 64
"""Pictures on the sheet."""


@dataclass(frozen=True, kw_only=True)
class Args:
    """Draw latents from a prior and decode them: single pictures and a contact sheet.

    These are not photos, and with most VAEs cannot be. N(0, I) is what the KL term pulls latents towards; at the usual
    weight of 1e-6 it does not get them there, so that N(0, I) decodes to noise or to a mist. A prior fitted to latents
    of photos has their colours and textures, and no things. To generate photos, train a diffusion model on the latents:
    see examples/train_on_latents.py.
    """

    vae: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="VAE")]
    """Folder, file or hub id of the VAE, or the name of one that ships; left out, `mini`."""
    out: Path
    """Folder to write: sheet.png with the first 64, the single pictures and samples.json."""
    n: int = 16
    """How many pictures."""
    prior: Literal["normal", "fitted"] | None = None
    """normal: N(0, I). fitted: Gaussian fields with the covariances of --data, over channels and space. By default
    fitted where there is --data."""
    data: Annotated[Path | None, tyro.conf.arg(metavar="LATENTS")] = None
    """Latent store that the prior is fitted to, as sd-vae encode makes it with this VAE."""
    components: int = 4
    """Fields in the fitted prior, one for each group of pictures that are alike, at most."""
    temperature: float = 1.0
    """Factor of what departs from the prior's mean: below 1 calmer, above 1 wilder."""
    size: tuple[int, ...] = (512,)
    """Side of the pictures in pixels, or height and width."""
    seed: int = 0
    """Seed of the draws; picture k is the same in every run, however many are drawn."""
    side: int = 256
    """Largest side of a picture on the sheet, in pixels."""
    config: str | None = None
    """Architecture of the VAE where nothing beside it tells: a config.json, its folder, or a preset."""
    device: str = "auto"
    """Where to compute: cpu, cuda, cuda:1, mps; auto takes an accelerator where there is one."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """What to compute in; with --data, the encoder's type in the store."""
    overwrite: bool = False
    """Replace an earlier run's folder."""
    json: bool = False
    """Print the result as one JSON object."""


def run(argv: list[str]) -> None:
    """Run the command.

    Args:
        argv: Its arguments.

    Raises:
        UserError: As `sd_vae.latents.prior.fit_prior`, `sd_vae.latents.sample.sample` and `sd_vae.load_vae`; the store
            is another encoder's; or `--out` holds something else.
    """
    args = parse_with_vae(Args, argv, command="sample")
    fitted = _is_fitted(args)
    if len(args.size) not in (1, 2):
        raise UserError(f"--size has {len(args.size)} values, give one side, or height and width.")
    require_at_least(args, n=1, components=1, side=1)
    _require_target(args)

    from sd_vae.files import atomic_folder, write_json
    from sd_vae.images import to_pil
    from sd_vae.latents.preview import contact_sheet
    from sd_vae.latents.sample import sample

    vae = sd_vae.load_vae(args.vae, args.config, dtype=args.dtype, device=best_device(args.device))
    prior = _fit(args, vae) if fitted else None
    size = (args.size[0], args.size[-1])
    drawn = sample(vae, prior, num=args.n, size=size, temperature=args.temperature, seed=args.seed)
    names: list[str] = []
    pictures: list[Image.Image] = []
    with atomic_folder(args.out, overwrite=args.overwrite) as folder, picture_progress("sampling", args.n) as progress:
        for number, one in enumerate(drawn):
            names.append(f"{number:04d}.png")
            picture = to_pil(one.x)
            picture.save(folder / names[-1])
            if len(pictures) < MAX_SHOWN:
                picture.thumbnail((args.side, args.side))
                pictures.append(picture)
            progress(number + 1, args.n)
        contact_sheet(pictures, side=args.side).save(folder / SHEET)
        result = _result(args, prior, names)
        write_json(folder / LISTING, result)
    if args.json:
        console.print_json(result)
        return
    if prior is not None:
        _print_components(prior)
    console.say(f"{args.out / SHEET}: {len(names)} pictures, each beside it as {names[0]} and on.")


def _is_fitted(args: Args) -> bool:
    """Whether the prior is to be fitted.

    Raises:
        UserError: The arguments contradict each other.
    """
    if args.prior == "fitted" and args.data is None:
        raise UserError("--prior is fitted and no --data says to what; give a latent store, as sd-vae encode makes it.")
    if args.prior == "normal" and args.data is not None:
        raise UserError(f"--prior is normal and --data is {args.data}, which it does not read; leave one of them out.")
    return args.data is not None


def _fit(args: Args, vae: AutoencoderKL) -> FieldPrior:
    from sd_vae.cli.stores import require_encoder
    from sd_vae.latents import LatentStore
    from sd_vae.latents.prior import fit_prior

    assert args.data is not None
    require_encoder(LatentStore.open(args.data), vae, args.vae)
    with picture_progress("fitting the prior") as progress:
        return fit_prior(args.data, num_components=args.components, seed=args.seed, progress=progress)


def _result(args: Args, prior: FieldPrior | None, names: list[str]) -> dict[str, Any]:
    """What stands in samples.json."""
    components = [
        {
            "weight": field.weight,
            "num_pictures": field.num_pictures,
            "mean": field.mean.tolist(),
            "std": field.std.tolist(),
        }
        for field in (prior.components if prior else ())
    ]
    return {
        "out": str(args.out),
        "vae": args.vae,
        "prior": "fitted" if prior else "normal",
        "data": None if args.data is None else str(args.data),
        "components": components,
        "temperature": args.temperature,
        "size": [args.size[0], args.size[-1]],
        "seed": args.seed,
        "pictures": names,
    }


def _print_components(prior: FieldPrior) -> None:
    """The table of the fields: how far from N(0, I) the latents are."""

    def listed(values: Any) -> str:
        shown = " ".join(f"{value:.2f}" for value in values[:8].tolist())
        return shown + (" ..." if len(values) > 8 else "")

    console.print_table(
        "prior: mean and std of z by channel, where N(0, I) has 0 and 1",
        ["pictures", "share", "mean", "std"],
        [
            [str(field.num_pictures), f"{field.weight:.0%}", listed(field.mean), listed(field.std)]
            for field in prior.components
        ],
    )


def _require_target(args: Args) -> None:
    """Check that `--out` may be made, in place of at most an earlier run's."""
    from sd_vae.files import require_own_folder

    names = {path.name for path in args.out.iterdir()} if args.out.is_dir() else set()
    own = {name for name in names if name.endswith(".png")} | {LISTING} if LISTING in names else set()
    require_own_folder(args.out, own, kind="a folder of samples", overwrite=args.overwrite)
