"""`sd-vae anomaly ACTION`: which pictures are unlike normal ones, and where. One file an action."""

from __future__ import annotations

import importlib

from sd_vae.errors import UserError

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
    name = argv[0] if argv else "--help"
    if name in ("-h", "--help"):
        print(_usage())
        return
    if name not in ACTIONS:
        raise UserError(f"unknown action {name!r} of sd-vae anomaly; choose one of: {', '.join(ACTIONS)}.")
    importlib.import_module(f"sd_vae.cli.anomaly_{name}").run(argv[1:])


def _usage() -> str:
    width = max(map(len, ACTIONS))
    return "\n".join(
        [
            "usage: sd-vae anomaly ACTION [ARGUMENTS]",
            "",
            "Find pictures that are unlike normal ones, by what a VAE makes of them.",
            "",
            *(f"  {name:{width}}  {summary}" for name, summary in ACTIONS.items()),
            "",
            "sd-vae anomaly ACTION --help explains one action.",
        ]
    )
