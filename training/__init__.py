"""Train an autoencoder: `training.train(config)`, `accelerate launch -m training --config RECIPE`."""

import importlib
from typing import TYPE_CHECKING, Any

__all__ = ["RunResult", "TrainConfig", "load_recipe", "resume", "train"]

_HOMES = {"RunResult": ".run_folder", "TrainConfig": ".config", "load_recipe": ".config"}

if TYPE_CHECKING:
    from .config import TrainConfig, load_recipe
    from .run_folder import RunResult
    from .trainer import resume, train


def __getattr__(name: str) -> Any:
    """Import a public name on first use: the config needs no torch, the trainer does."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES.get(name, ".trainer"), __name__), name)
