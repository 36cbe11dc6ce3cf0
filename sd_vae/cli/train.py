"""`sd-vae train`: start a run from a recipe with a few overrides, or go on with one."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import sys
from dataclasses import dataclass
from pathlib import Path

from sd_vae.cli.console import parse, print_json, say
from sd_vae.cli.validating import evaluator_of
from sd_vae.errors import UserError
from training.config import TrainConfig, load_recipe

__all__ = ["run"]


@dataclass(frozen=True, kw_only=True)
class Args(TrainConfig):
    """Train or fine-tune a VAE from a recipe, or go on with an interrupted run.

    A recipe fills the fields below; options on the command line override it. The first line that a run prints says how
    many processes really run: several are started by `torchrun --nproc_per_node N -m training ...` on CPUs and by
    `accelerate launch -m training ...` on GPUs, with the same arguments.
    """

    config: str | None = None
    """Recipe: a YAML file, or one that ships, such as from_scratch, ldm_kl_f8, finetune_decoder, domain_adapt_lora."""
    resume: str | None = None
    """Run folder to go on with; needs no other option."""
    find_batch_size: bool = False
    """On a GPU, lower batch_size until a step fits into memory, and raise gradient_accumulation_steps to make up."""
    overwrite: bool = False
    """Replace the run that is in --out."""
    json: bool = False
    """Print the result as one JSON object on standard output."""


def run(argv: list[str]) -> None:
    """Train, and say where the VAE is."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name in ("--config", "--resume"):
        first.add_argument(name)
    try:
        chosen, others = first.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise UserError(f"{error.argument_name} needs a value. See sd-vae train --help.") from None
    is_help = "-h" in argv or "--help" in argv
    if chosen.resume and (chosen.config or [option for option in others if option != "--json"]):
        raise UserError("--resume takes everything from the run folder; leave the other options out.")
    if not (chosen.config or chosen.resume or is_help):
        raise UserError("say what to train with --config RECIPE, or what to go on with by --resume RUN.")

    recipe = load_recipe(chosen.config or "from_scratch")
    fields = {field.name: getattr(recipe, field.name) for field in dataclasses.fields(TrainConfig)}
    args = parse(Args, argv, command="train", default=Args(**fields))
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for library in ("httpx", "datasets", "accelerate", "fsspec"):
        logging.getLogger(library).setLevel(logging.WARNING)

    from training.run_folder import unfinished
    from training.trainer import resume, train

    if args.resume:
        result = resume(args.resume, evaluate=evaluator_of(unfinished(Path(args.resume))))
    else:
        config = TrainConfig(**{name: getattr(args, name) for name in fields})
        config.require_complete()
        if args.find_batch_size:
            from training.batch_size import find_batch_size

            config = find_batch_size(config, overwrite=args.overwrite)
        result = train(config, overwrite=args.overwrite, evaluate=evaluator_of(config))
    if not result.report:
        return  # not the main process
    if args.json:
        print_json({"vae": str(result.vae), **result.report})
    say(f"trained VAE: {result.vae}")
