"""`sd-vae anomaly ACTION`: which pictures are unlike normal ones, and where. One file an action."""

from __future__ import annotations

from sd_vae.cli.actions import run_action

__all__ = ["ACTIONS", "run"]

ACTIONS = {
    "fit": "learn from normal pictures what is normal",
    "score": "scores and heat maps of pictures, alarms at a chosen rate of false ones, a report",
}
"""Action to one line of help; each lives in the module anomaly_ACTION."""


def run(argv: list[str]) -> None:
    """Run one action.

    Args:
        argv: Its name and its arguments.

    Raises:
        UserError: There is no such action, or as the action.
    """
    run_action(
        argv,
        "anomaly",
        ACTIONS,
        arguments="[ARGUMENTS]",
        summary="Find pictures that are unlike normal ones, by what a VAE makes of them.",
    )
