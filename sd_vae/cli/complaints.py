"""tyro's complaints as one line: what, which value, what to type instead.

tyro draws a box of sections between rules: the first says what is wrong, the others repeat help. Its structured errors
are private, so the words are read; a complaint that no rule here knows keeps its own words, without box and help.
"""

import re
import textwrap

__all__ = ["one_line"]

_RULE = re.compile(r"[─-]{8,}$")
_KINDS = {"INT": "a whole number", "FLOAT": "a number"}


def one_line(complaint: str) -> str:
    """Return a complaint as one sentence.

    Args:
        complaint: The box that tyro wrote on standard error.
    """
    sections = _sections(complaint)
    if not sections:
        return "these arguments cannot be understood."
    for rule in (_missing_options, _missing_value, _wrong_value, _unknown_options):
        if sentence := rule(sections):
            return sentence
    return re.sub(r"^Error parsing (\w+: )?", "", _words(sections[0])).rstrip(".") + "."


def _sections(complaint: str) -> list[list[str]]:
    """Lines of each section, indented as in the box but without its title and frame, which ASCII terminals lack."""
    sections: list[list[str]] = [[]]
    for line in complaint.splitlines()[1:-1]:
        inner = re.sub(r"^[│|]|[\s│|]+$", "", line)
        if _RULE.match(inner.strip()):
            sections.append([])
        elif inner:
            sections[-1].append(inner)
    return [textwrap.dedent("\n".join(section)).split("\n") for section in sections if section]


def _words(lines: list[str]) -> str:
    return " ".join(" ".join(lines).split())


def _missing_options(sections: list[list[str]]) -> str:
    """A command without something that it needs, perhaps also with options that it does not know."""
    parts = []
    for title, *lines in sections:
        if title.startswith("Missing from"):  # what an option means is indented further than its name
            parts.append("missing: " + ", ".join(line.strip() for line in lines if re.match(r" {4}\S", line)))
        elif title.startswith("Unrecognized options:") and parts:
            parts.append(f"unknown: {_words(lines)}")
    return "; ".join(parts) + "." if parts else ""


def _missing_value(sections: list[list[str]]) -> str:
    """An option or argument with too few values behind it."""
    found = re.search(r"Missing value for argument '(.+?)'. Expected (\d+) values", _words(sections[0]))
    if found is None:
        return ""
    name, count = found.groups()
    number = "a value" if count == "1" else f"{count} values"
    return f"{name if name.startswith('-') else name.upper()} needs {number}."


def _wrong_value(sections: list[list[str]]) -> str:
    """A value of the wrong type, or none of the choices."""
    words = _words(sections[0])
    if found := re.search(r"invalid choice (.+) for argument '(.+?)'. Expected one of \((.+?),?\)", words):
        value, name, choices = found.groups()
        return f"{name} is {value}, it must be one of: {choices.replace(chr(39), '')}."
    wrong = re.search(r"Error parsing (--\S+): .*?(?:'([^']*)'|\['([^']*)'\].*)$", words.partition(" Got errors:")[0])
    kind = re.search(r"Argument helptext: --\S+ (\S+)", " ".join(_words(section) for section in sections[1:]))
    if wrong is None or kind is None:
        return ""
    name, *values = wrong.groups()
    wanted = kind[1].removeprefix("{None}|").lstrip("[")  # [INT [INT ...]]: one value or several
    return f"{name} is {values[0] or values[1]!r}, it must be {_KINDS.get(wanted, wanted)}."


def _unknown_options(sections: list[list[str]]) -> str:
    """Options that the command does not know, with those that look like them."""
    words = _words(sections[0])
    if not words.startswith("Unrecognized options: "):
        return ""
    unknown = words.removeprefix("Unrecognized options: ").replace(",", "")
    similar = [line.split()[0] for section in sections[1:] for line in section if re.match(r" {4}--", line)]
    hint = f"; did you mean {' or '.join(similar)}?" if similar else "."
    return f"unknown: {unknown}{hint}"
