"""Commands of several actions, `sd-vae COMMAND ACTION`: each action lives in a module of its own, COMMAND_ACTION."""

from __future__ import annotations

import importlib
from collections.abc import Mapping

from sd_vae.errors import UserError

__all__ = ["run_action"]


def run_action(argv: list[str], command: str, actions: Mapping[str, str], *, arguments: str, summary: str) -> None:
    """Run one action, or print which there are.

    Args:
        argv: The action's name and its arguments.
        command: Name of the command.
        actions: Action to one line of help.
        arguments: What follows an action, for the usage line.
        summary: What the command is for, in one sentence.

    Raises:
        UserError: There is no such action, or as the action.
    """
    name = argv[0] if argv else "--help"
    if name in ("-h", "--help"):
        width = max(map(len, actions))
        listed = "\n".join(f"  {action:{width}}  {line}" for action, line in actions.items())
        print(f"usage: sd-vae {command} ACTION {arguments}\n\n{summary}\n\n{listed}\n")
        print(f"sd-vae {command} ACTION --help explains one action.")
        return
    if name not in actions:
        raise UserError(f"unknown action {name!r} of sd-vae {command}; choose one of: {', '.join(actions)}.")
    importlib.import_module(f"sd_vae.cli.{command}_{name}").run(argv[1:])
