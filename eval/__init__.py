"""Evaluate reconstructions: `eval.evaluate(vaes, data)`. Importing this is cheap; torch comes with the first use."""

from typing import TYPE_CHECKING, Any

__all__ = ["evaluate"]

if TYPE_CHECKING:
    from .evaluator import evaluate


def __getattr__(name: str) -> Any:
    """Import `evaluate` on first use."""
    if name == "evaluate":
        from .evaluator import evaluate

        return evaluate
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
