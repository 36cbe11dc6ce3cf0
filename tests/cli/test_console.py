"""What commands share: tyro's complaints in one line, tables that leave names alone, JSON that every reader takes."""

import json
import math

import pytest

from sd_vae.cli.complaints import one_line
from sd_vae.cli.console import print_json, print_table


def box(*lines: str) -> str:
    return "\n".join(["╭─ Title ───────────╮", *(f"│ {line:40} │" for line in lines), "╰─────────────────────╯"])


def test_table_prints_square_brackets_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    print_table("[bold]title", ["[b]name"], [["[red]x.png"]])

    out = capsys.readouterr().out
    assert all(name in out for name in ("[bold]title", "[b]name", "[red]x.png"))


def test_json_has_null_for_what_is_not_finite(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"a": math.nan, "b": [math.inf, 1.5], "c": (-math.inf,)})

    assert json.loads(capsys.readouterr().out) == {"a": None, "b": [None, 1.5], "c": [None]}


def test_one_line_joins_an_option_wrapped_over_lines() -> None:
    assert one_line(box("Error parsing data: data.size is", "0, it must be 1.", "─" * 20, "help")) == (
        "data.size is 0, it must be 1."
    )


def test_one_line_reads_boxes_of_terminals_without_unicode() -> None:
    lines = ["Required options", "-" * 20, " Missing from x:", "     --out PATH", "         Folder.", " " + "-" * 20]

    assert one_line("\n".join([*(f" {line} " for line in lines), "  help", " ", ""])) == "missing: --out PATH."


def test_one_line_keeps_the_words_of_a_complaint_it_does_not_know() -> None:
    assert one_line(box("Something new is wrong", "─" * 20, "For full helptext, run x --help")) == (
        "Something new is wrong."
    )


def test_one_line_says_something_when_tyro_says_nothing() -> None:
    assert one_line("") == "these arguments cannot be understood."
