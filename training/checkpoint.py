"""A run's checkpoints: written whole or not at all, pruned, found again.

`checkpoints/step-NNNNNNN/` holds `model.safetensors` and `ema.safetensors` (the VAE's own parameter names, fp32), with
an adversarial term `discriminator.safetensors` and `lecam.safetensors`, with a learned log-variance
`output.safetensors`; `optimizer.pt` (optimizers, schedules and gradient scaler; tensors and numbers only, read without
running a pickle) and `state.json` (step, samples consumed, format version). `checkpoints/last` is a link to the newest.
"""

import logging
import os
import pickle
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from sd_vae.errors import UserError
from sd_vae.files import atomic_folder, read_json, write_json
from sd_vae.validation import STRICT, from_plain

__all__ = ["Progress", "load_checkpoint", "newest_checkpoint", "save_checkpoint"]

FORMAT_VERSION = 1

_DAMAGE = (
    *(OSError, EOFError, SafetensorError, RuntimeError, pickle.UnpicklingError),  # of a file
    *(KeyError, ValueError, TypeError, AttributeError),  # of what is in it
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a run is, and what it has met."""

    __pydantic_config__ = STRICT

    step: int
    """Optimizer steps taken."""
    samples: int
    """Pictures consumed by all processes together: the position in the data order."""
    num_pictures: int
    """Pictures in the source, on which the order depends."""
    validation: dict[str, float] = field(default_factory=dict)
    """Metrics of the last validation."""
    unreadable: tuple[str, ...] = ()
    """Pictures that could not be read so far, on any process."""
    skipped: int = 0
    """Updates that were not taken because loss or gradient was not finite."""
    rejects: int = 0
    """Attempts to read a picture that failed so far, on all processes."""
    retries: int = 0
    """Requests over the network that were made again so far, on all processes."""
    best: float | None = None
    """Best value so far of the metric that chooses best/."""
    num_processes: int = 0
    """Processes that trained; 0 where an older version did not say."""


def save_checkpoint(
    folder: Path, progress: Progress, models: dict[str, nn.Module], states: dict[str, Any], *, keep: int
) -> Path:
    """Write a checkpoint and remove the oldest beyond `keep`.

    Args:
        folder: The run's `checkpoints` folder.
        progress: Stored with it.
        models: Name to module, each a file of safetensors.
        states: Name to object with `state_dict`.
        keep: Newest checkpoints that stay, this one included.

    Returns:
        The checkpoint's folder.

    Raises:
        UserError: It cannot be written; checkpoints that were there stay.
    """
    path = folder / f"step-{progress.step:07d}"
    for half in folder.glob(".step-*.tmp"):  # what a process left that was killed while it wrote
        shutil.rmtree(half, ignore_errors=True)
    try:
        with atomic_folder(path, overwrite=True) as temporary:
            for name, model in models.items():
                tensors = {key: value.contiguous() for key, value in model.state_dict().items()}
                save_file(tensors, temporary / f"{name}.safetensors", metadata={"format": "pt"})
            torch.save({name: state.state_dict() for name, state in states.items()}, temporary / "optimizer.pt")
            write_json(temporary / "state.json", {"format_version": FORMAT_VERSION, **asdict(progress)})
    except (UserError, SafetensorError, RuntimeError) as error:  # the last two, too, mean a full disk
        before = _complete(folder)
        rest = f"go on from {before[-1].name}, which is whole: --resume {folder.parent}" if before else "start anew"
        raise UserError(
            f"cannot write {path}: {_reason(error.__cause__ or error)}; check the disk and its free space, then {rest}."
        ) from error
    _link_last(path)
    for old in _complete(folder)[:-keep]:
        shutil.rmtree(old)
    return path


def load_checkpoint(path: Path, models: dict[str, nn.Module], states: dict[str, Any]) -> Progress:
    """Load a checkpoint into models and states, strictly, and return how far it was.

    Raises:
        UserError: A file is missing or damaged, or belongs to another model or format.
    """
    state = read_json(path / "state.json")
    found = state.get("format_version") if isinstance(state, dict) else None
    if found != FORMAT_VERSION:
        raise UserError(
            f"{path} has checkpoint format {found}, this version reads {FORMAT_VERSION}; "
            "resume with the version that wrote it."
        )
    try:
        for name, model in models.items():
            model.load_state_dict(load_file(path / f"{name}.safetensors"))
        loaded = torch.load(path / "optimizer.pt", map_location="cpu", weights_only=True)
        for name, item in states.items():
            item.load_state_dict(loaded[name])
        del state["format_version"]
        return from_plain(Progress, state, source="state.json")
    except _DAMAGE as error:
        raise UserError(
            f"cannot resume from {path}: {_reason(error)}; remove it to resume from the one before."
        ) from error


def _reason(error: BaseException) -> str:
    """An error's words on one line, not too many; its kind where it has none."""
    words = (error.strerror if isinstance(error, OSError) else None) or str(error)
    return " ".join(words.split())[:300].rstrip(".") or type(error).__name__


def newest_checkpoint(folder: Path) -> Path:
    """Return the newest complete checkpoint in a run's `checkpoints` folder.

    Raises:
        UserError: There is none.
    """
    found = _complete(folder)
    if not found:
        raise UserError(f"{folder} holds no checkpoint to resume from; start the run anew with --overwrite.")
    return found[-1]


def _complete(folder: Path) -> list[Path]:
    """Checkpoints oldest first; a folder gets its name only when it is complete."""
    return sorted(path for path in folder.glob("step-*") if (path / "state.json").is_file())


def _link_last(path: Path) -> None:
    """Point `last` at a checkpoint, for people; loading looks at the folders themselves."""
    link, temporary = path.parent / "last", path.parent / ".last.tmp"
    try:
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(path.name)
        os.replace(temporary, link)
    except OSError as error:  # file systems without links, Windows without the right
        logger.warning("could not link %s to %s: %s", link, path.name, error)
