"""The folder of a run: where it may start, and what a finished run says of itself."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sd_vae.autoencoder import AutoencoderKL
from sd_vae.checkpoints import save_vae
from sd_vae.errors import UserError
from sd_vae.files import finite, make_folder, require_own_folder, write_json, write_text

from .config import TrainConfig
from .records import model_card

__all__ = ["RunResult", "make_run_folder", "require_new_run", "shareable", "with_absolute_paths", "write_result"]

OWN = ("config.yaml", "metrics.jsonl", "samples", "checkpoints", "tensorboard", "vae", "report.json")
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


def make_run_folder(folder: Path, *, is_new: bool) -> None:
    """Make a run's folder, empty for a new run: `require_new_run` has looked at what is there.

    Raises:
        UserError: It cannot be made.
    """
    if is_new and folder.exists():
        shutil.rmtree(folder)
    make_folder(folder)


def with_absolute_paths(config: TrainConfig) -> TrainConfig:
    """The config with local paths made absolute, so that a run can be resumed from anywhere."""
    return _with_sources(config, lambda spec: str(Path(spec).resolve()))


def shareable(config: TrainConfig) -> TrainConfig:
    """The config for others to read: local paths shortened to their last part."""
    return dataclasses.replace(_with_sources(config, lambda spec: Path(spec).name), out=Path(config.out).name)


def write_result(config: TrainConfig, vae: AutoencoderKL, report: dict[str, Any]) -> RunResult:
    """Save a trained VAE with its provenance and model card, then the report that makes its run a finished one."""
    folder, public = Path(config.out), shareable(config)
    metadata = {"recipe": json.dumps(dataclasses.asdict(public)), "training": json.dumps(finite(report))}
    save_vae(vae, folder / "vae", metadata=metadata, overwrite=True)
    write_text(folder / "vae" / "README.md", model_card(public, report))
    write_json(folder / "report.json", report)
    return RunResult(folder=folder, report=report)


def _with_sources(config: TrainConfig, change: Callable[[str], str]) -> TrainConfig:
    """The config with the local paths that it reads changed."""

    def changed(spec: str | None) -> str | None:
        return spec if spec is None or not _is_local(spec) else change(spec)

    data, perceptual, adversarial = config.data, config.loss.perceptual, config.loss.adversarial
    sources = tuple(change(spec) if _is_local(spec) else spec for spec in data.sources)
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
