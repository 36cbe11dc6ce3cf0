"""`sd-vae latents ACTION`: check, measure, look at and convert a store of latents. One file an action."""

from __future__ import annotations

from sd_vae.cli.actions import run_action

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
    run_action(
        argv,
        "latents",
        ACTIONS,
        arguments="STORE [ARGUMENTS]",
        summary="Check, measure, look at and convert a store of latents, as sd-vae encode makes them.",
    )
