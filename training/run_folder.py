"""The folder of a run: where it may start, and what a finished run says of itself."""

import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from sd_vae.autoencoder import AutoencoderKL
from sd_vae.checkpoints import save_vae
from sd_vae.data.remote import is_remote, without_secrets
from sd_vae.errors import UserError
from sd_vae.files import file_errors, finite, make_folder, require_own_folder, write_json, write_text

from .config import TrainConfig, load_recipe
from .config_extras import BEST_METRICS
from .records import CARD_PICTURE, model_card
from .validation import Evaluated, save_picture

__all__ = [
    "RunLock",
    "RunResult",
    "is_better",
    "make_run_folder",
    "require_new_run",
    "save_best",
    "shareable",
    "unfinished",
    "with_absolute_paths",
    "write_result",
]

LOCK = "run.lock"
"""There while a run writes into its folder."""

OWN = (
    *("config.yaml", "metrics.jsonl", "samples", "checkpoints", "tensorboard", "wandb", "vae", "best", "evaluation"),
    *("adapter", "report.json", LOCK),
)
"""What a run writes; a folder that holds anything else is never replaced."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunResult:
    """Where a finished run is and how it ended."""

    folder: Path
    """Run folder."""
    report: dict[str, Any]
    """What report.json holds."""

    @property
    def vae(self) -> Path:
        """The trained VAE, a diffusers folder."""
        return self.folder / "vae"


def require_new_run(config: TrainConfig, *, overwrite: bool) -> None:
    """Check that a run may start in its `out`; nothing is removed yet.

    Raises:
        UserError: Something is there, it is no run, it cannot be written, or what the run reads lies in it (it would be
            removed) or around it (the run would train on its own samples).
    """
    folder = Path(config.out)
    with file_errors("write", folder):  # a name that no file system takes
        require_own_folder(folder, OWN, kind="a run folder", overwrite=overwrite)
    for name, source in _sources(config):
        if not Path(source).exists():
            continue
        place, out = Path(source).resolve(), folder.resolve()
        if place.is_relative_to(out):
            raise UserError(f"{name} is {source}, inside out, {folder}, which is written anew; choose another --out.")
        if out.is_relative_to(place) and name.startswith("data."):
            raise UserError(
                f"out is {folder}, inside {name}, {source}: the run's pictures would become data; choose another --out."
            )


class RunLock:
    """Keeps a second run out of a folder; the system takes it back when the process ends, however it ends.

    Args:
        folder: Run folder.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / LOCK
        self._lock = FileLock(self._path, is_singleton=False)

    def acquire(self) -> None:
        """Take it.

        Raises:
            UserError: Another run has it, or it cannot be written.
        """
        with file_errors("write", self._path):
            try:
                self._lock.acquire(timeout=0)
            except Timeout:
                raise UserError(
                    f"another run is writing into {self._path.parent}; wait until it ends or stop it, or choose "
                    "another --out."
                ) from None

    def release(self) -> None:
        """Give it back; nothing where it was not taken."""
        if self._lock.is_locked:
            self._path.unlink(missing_ok=True)
            self._lock.release()


def make_run_folder(folder: Path, lock: RunLock, *, is_new: bool) -> None:
    """Make a run's folder and lock it, empty for a new run: `require_new_run` has looked at what is there.

    Raises:
        UserError: It cannot be made, or another run is writing into it.
    """
    make_folder(folder)
    lock.acquire()
    for item in list(folder.iterdir()) if is_new else ():
        if item.name == LOCK:
            continue
        shutil.rmtree(item) if item.is_dir() and not item.is_symlink() else item.unlink()


def is_better(metric: str, values: Mapping[str, float], best: float | None) -> bool:
    """Whether a validation is the best so far by a metric.

    Raises:
        UserError: The validation has no such metric.
    """
    if metric not in values:
        raise UserError(
            f"report.best_metric is {metric}, which this run does not measure; choose: {', '.join(values)}."
        )
    return best is None or (values[metric] > best if BEST_METRICS[metric] else values[metric] < best)


def save_best(folder: Path, vae: AutoencoderKL, metric: str, values: Mapping[str, float], step: int) -> None:
    """Keep weights in `best/`, a diffusers folder, in place of those that were there."""
    metadata = {"step": str(step), "chosen_by": metric, "validation": json.dumps(finite(dict(values)))}
    save_vae(vae, folder / "best", metadata=metadata, overwrite=True)


def unfinished(folder: Path) -> TrainConfig:
    """Return the config of an interrupted run.

    Raises:
        UserError: The folder is no run, or is finished.
    """
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{folder} is not a run folder (no config.yaml in it); give the --out of a training.")
    if (folder / "report.json").is_file():
        raise UserError(f"{folder} is finished (it has a report.json); its VAE is {folder / 'vae'}.")
    return dataclasses.replace(load_recipe(folder / "config.yaml"), out=str(folder))


def with_absolute_paths(config: TrainConfig) -> TrainConfig:
    """The config with local paths made absolute, so that a run can be resumed from anywhere."""
    return _with_sources(config, lambda spec: str(Path(spec).resolve()) if _is_local(spec) else spec)


def shareable(config: TrainConfig) -> TrainConfig:
    """The config for others to read: local paths shortened to their last part, addresses without what is secret."""

    def public(spec: str) -> str:
        return Path(spec).name if _is_local(spec) else without_secrets(spec) if is_remote(spec) else spec

    return dataclasses.replace(_with_sources(config, public), out=Path(config.out).name)


def write_result(
    config: TrainConfig, vae: AutoencoderKL, report: dict[str, Any], evaluated: Evaluated | None = None
) -> RunResult:
    """Save a trained VAE with its provenance and model card, then the report that makes its run a finished one."""
    folder, public = Path(config.out), shareable(config)
    facts = {name: value for name, value in report.items() if name != "unreadable"}  # which names files of this machine
    metadata = {"recipe": json.dumps(dataclasses.asdict(public)), "training": json.dumps(finite(facts))}
    save_vae(vae, folder / "vae", metadata=metadata, overwrite=True)
    write_text(folder / "vae" / "README.md", model_card(public, report, evaluated))
    if evaluated is not None and evaluated.picture is not None:
        save_picture(evaluated.picture, folder / "vae" / CARD_PICTURE)
    write_json(folder / "report.json", report)
    return RunResult(folder=folder, report=report)


def _with_sources(config: TrainConfig, change: Callable[[str], str]) -> TrainConfig:
    """The config with the names of what it reads changed."""

    def changed(spec: str | None) -> str | None:
        return None if spec is None else change(spec)

    data, perceptual, adversarial = config.data, config.loss.perceptual, config.loss.adversarial
    sources = tuple(change(spec) for spec in data.sources)
    return dataclasses.replace(
        config,
        data=dataclasses.replace(
            data,
            train=sources if isinstance(data.train, tuple) else sources[0],
            validation=changed(data.validation),
        ),
        model=dataclasses.replace(config.model, pretrained=changed(config.model.pretrained)),
        loss=dataclasses.replace(
            config.loss,
            perceptual=dataclasses.replace(perceptual, backbone=changed(perceptual.backbone)),
            adversarial=dataclasses.replace(adversarial, pretrained=changed(adversarial.pretrained)),
        ),
    )


def _is_local(spec: str) -> bool:
    """Whether a source is a path of this machine: it is there, or stands for tars, of which some may be missing."""
    return Path(spec).exists() or (spec.endswith(".tar") and "://" not in spec)


def _sources(config: TrainConfig) -> list[tuple[str, str]]:
    """What a run reads, with the name of its field."""
    sources = [
        *(("data.train", spec) for spec in config.data.sources),
        ("data.validation", config.data.validation),
        ("model.pretrained", config.model.pretrained),
        ("loss.perceptual.backbone", config.loss.perceptual.backbone),
        ("loss.adversarial.pretrained", config.loss.adversarial.pretrained),
    ]
    return [(name, spec) for name, spec in sources if spec is not None]
