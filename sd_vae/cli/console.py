"""What every command shares: parsing its arguments, talking on standard error, the result on standard output."""

import contextlib
import dataclasses
import io
import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from sd_vae.cli.complaints import one_line
from sd_vae.errors import UserError
from sd_vae.files import finite

__all__ = ["parse", "print_fields", "print_json", "print_table", "say"]

T = TypeVar("T")


def parse(arguments_type: type[T], argv: Sequence[str], *, command: str, default: T | None = None) -> T:
    """Return a command's arguments, parsed by tyro from its dataclass; `--help` prints and exits 0.

    Args:
        arguments_type: Dataclass with a docstring under each field.
        argv: What stands behind the command's name.
        command: Its name.
        default: Values for what argv leaves out.

    Raises:
        UserError: tyro's complaint, as one line.
    """
    import tyro

    settings: dict[str, Any] = {} if default is None else {"default": default}
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(
                arguments_type,
                args=list(argv),
                prog=f"sd-vae {command}",
                config=(tyro.conf.FlagCreatePairsOff,),
                **settings,
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        raise UserError(f"{one_line(complaint.getvalue())} See sd-vae {command} --help.") from None


def say(text: str) -> None:
    """Tell the user what happens, on standard error."""
    print(text, file=sys.stderr, flush=True)


def print_json(value: Any) -> None:
    """Print a result as one JSON object on standard output; dataclasses are taken apart, NaN and infinity are null."""
    plain = dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else value
    print(json.dumps(finite(plain), default=str, allow_nan=False))


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table on standard output; the first column is text, the others are numbers set to the right.

    Square brackets are text like any other: they are often part of a file's name.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title), title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(Text(column), justify="left" if index == 0 else "right")
    for row in rows:
        table.add_row(*map(Text, row))
    Console().print(table)


def print_fields(values: Mapping[str, Any]) -> None:
    """Print names and values, one a line, on standard output."""
    width = max(map(len, values))
    for name, value in values.items():
        print(f"{name:{width}}  {value}")
