"""`sd-vae COMMAND`: the only code that parses arguments, prints and exits.

One file a command, imported when it is called, so that `--help` needs neither torch nor diffusers. Exit codes: 0 done,
2 the user can mend it (one line on standard error), 1 a defect of ours (traceback), 130 interrupted.
"""

import importlib
import sys
from collections.abc import Sequence

import sd_vae
from sd_vae.errors import UserError

__all__ = ["COMMANDS", "main"]

COMMANDS = {
    "demo": "train, save, load in diffusers and evaluate a small VAE on real photos, without a hub",
    "train": "train or fine-tune a VAE from a recipe, or resume a run",
    "reconstruct": "encode and decode pictures, side by side and with metrics",
    "eval": "measure a VAE by a named protocol, beside others, and write a report",
    "encode": "turn a data set of pictures into latents, by one process or many, and go on after a stop",
    "latents": "check, measure, look at and convert a store of latents",
    "decode": "latents back to pictures, from a store or from what another trainer reads",
    "sample": "pictures of latents drawn from a prior, N(0, I) or one fitted to a store",
    "compress": "pictures to small files of quantised latents",
    "decompress": "small files of quantised latents back to pictures",
    "interpolate": "from picture to picture through the latent space, as a sheet or a film",
    "augment": "variants of pictures with their labels, from the posterior, by mixing and along attributes",
    "distill": "teach a small fast autoencoder, for diffusers and ComfyUI, what a VAE does",
    "app": "a page in the browser to play with a VAE",
    "convert": "rewrite a checkpoint in another layout, verified by loading it back",
    "inspect": "what is in a checkpoint: layout, config, dtype, parameters, problems",
    "anomaly": "find pictures that are unlike normal ones, and where",
    "bench": "speed and memory beside diffusers on this machine, and which version of what runs",
}
"""Command to one line of help; each lives in the module of its name."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code.

    Args:
        argv: Command and its arguments; those of the process by default.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return _dispatch(arguments)
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        print(str(interrupt) or "interrupted.", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output left, as `| head` does
        sys.stderr.close()
        return 0


def _dispatch(arguments: list[str]) -> int:
    name = arguments[0] if arguments else "--help"
    if name in ("-h", "--help"):
        print(_usage())
        return 0
    if name in ("-V", "--version"):
        print(f"sd-vae {sd_vae.__version__}")
        return 0
    if name not in COMMANDS:
        raise UserError(f"unknown command {name!r}; choose one of: {', '.join(COMMANDS)}.")
    importlib.import_module(f"sd_vae.cli.{name}").run(arguments[1:])
    return 0


def _usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {summary}" for name, summary in COMMANDS.items()]
    return "\n".join(
        [
            "usage: sd-vae COMMAND [ARGUMENTS]",
            "",
            "A KL autoencoder for Stable Diffusion: train it, convert it, look at it.",
            "",
            *lines,
            "",
            "sd-vae COMMAND --help explains one command.",
        ]
    )
