"""Plain values (JSON, YAML) to frozen dataclasses, strictly: pydantic finds the problems, this names them for a reader.

Every problem is reported at once: unknown keys with the nearest known one, wrong types with their path, and broken
rules that a dataclass raises in `__post_init__`.
"""

import dataclasses
import difflib
import functools
import json
from collections.abc import Mapping
from typing import Any, TypeVar, cast

from sd_vae.errors import UserError

__all__ = ["STRICT", "from_plain"]

T = TypeVar("T")

STRICT = {"extra": "forbid", "strict": True}
"""What a dataclass sets as `__pydantic_config__`: unknown keys are errors, "3" is not 3, true is not 1."""


def from_plain(cls: type[T], values: Mapping[str, Any], *, source: str) -> T:
    """Return an instance of dataclass `cls` with the given values.

    Args:
        cls: Dataclass, nested at will, whose classes set `__pydantic_config__ = STRICT`.
        values: Field names to plain values; lists stand for tuples.
        source: What the values come from, the first words of the error, such as a file name.

    Raises:
        UserError: One line with every problem: its path, its value, the remedy.
    """
    from pydantic import ValidationError

    try:
        # Through JSON, because in strict mode only JSON's lists may become tuples.
        return cast("T", _adapter(cast("Any", cls)).validate_json(json.dumps(values, default=str)))
    except ValidationError as error:
        problems = [_describe(cls, item) for item in error.errors()]
        raise UserError(f"{source}: {'; '.join(dict.fromkeys(problems))}.") from None


@functools.cache
def _adapter(cls: Any) -> Any:
    """Pydantic's validator of a dataclass; building one takes milliseconds."""
    from pydantic import TypeAdapter

    return TypeAdapter(cls)


def _describe(cls: type[Any], item: Any) -> str:
    """One problem of pydantic's as words."""
    location = [part for part in item["loc"] if not str(part).startswith(("function-", "union-"))]
    path = ".".join(str(part) for part in location)
    match item["type"]:
        case "unexpected_keyword_argument" | "extra_forbidden":
            return f"unknown key {path!r}" + _suggest(cls, location)
        case "missing" | "missing_argument":
            return f"{path} is missing, give it a value"
        case "value_error":
            return str(item["ctx"]["error"]).rstrip(".")
        case _:
            expected = str(item["msg"]).removeprefix("Input should be ")
            return f"{path} is {item['input']!r}, it should be {expected}"


def _suggest(cls: type[Any], location: list[Any]) -> str:
    """', did you mean X?' for the nearest field beside an unknown key, or the list of fields."""
    for part in location[:-1]:
        types = {field.name: field.type for field in dataclasses.fields(cls)}
        inner = types.get(str(part))
        if not (isinstance(inner, type) and dataclasses.is_dataclass(inner)):
            return ""
        cls = inner
    names = [field.name for field in dataclasses.fields(cls)]
    close = difflib.get_close_matches(str(location[-1]), names, n=1)
    return f", did you mean {close[0]!r}?" if close else f", known here: {', '.join(names)}"
