"""`sd-vae latents ACTION`: check, measure, look at and convert a store of latents. One file an action."""

from __future__ import annotations

import importlib

from sd_vae.errors import UserError

__all__ = ["ACTIONS", "run"]

ACTIONS = {
    "verify": "read a store from end to end, encode some pictures again, name every damage",
    "stats": "mean, std, covariance, KL and active units, and the scale that follows from them",
    "preview": "pictures through the decoder, and a matrix from latents to colours",
    "direction": "an attribute vector from two stores, pictures with it and pictures without",
    "export": "write a store in the layout of another trainer",
}
"""Action to one line of help; each lives in the module latents_ACTION."""


def run(argv: list[str]) -> None:
    """Run one action.

    Args:
        argv: Its name and its arguments.

    Raises:
        UserError: There is no such action, or as the action.
    """
    name = argv[0] if argv else "--help"
    if name in ("-h", "--help"):
        print(_usage())
        return
    if name not in ACTIONS:
        raise UserError(f"unknown action {name!r} of sd-vae latents; choose one of: {', '.join(ACTIONS)}.")
    importlib.import_module(f"sd_vae.cli.latents_{name}").run(argv[1:])


def _usage() -> str:
    width = max(map(len, ACTIONS))
    return "\n".join(
        [
            "usage: sd-vae latents ACTION STORE [ARGUMENTS]",
            "",
            "Check, measure, look at and convert a store of latents, as sd-vae encode makes them.",
            "",
            *(f"  {name:{width}}  {summary}" for name, summary in ACTIONS.items()),
            "",
            "sd-vae latents ACTION --help explains one action.",
        ]
    )
