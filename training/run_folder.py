"""The folder of a run: where it may start, and what a finished run says of itself."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

from sd_vae.errors import UserError
from sd_vae.files import require_writable_target

from .config import TrainConfig

__all__ = ["RunResult", "require_new_run", "with_absolute_paths"]


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


def require_new_run(folder: Path, *, overwrite: bool) -> None:
    """Check that a run may start in `folder`, and remove the run that is there when asked to."""
    is_run = (folder / "config.yaml").is_file()
    if overwrite and folder.exists() and any(folder.iterdir()) and not is_run:
        raise UserError(f"{folder} exists and is not a run folder, so it is not replaced; choose another --out.")
    require_writable_target(folder, overwrite=overwrite)
    if is_run:
        shutil.rmtree(folder)


def with_absolute_paths(config: TrainConfig) -> TrainConfig:
    """The config with local paths made absolute, so that a run can be resumed from anywhere."""

    def absolute(spec: str) -> str:
        return str(Path(spec).resolve()) if Path(spec).exists() else spec

    data, model = config.data, config.model
    validation = None if data.validation is None else absolute(data.validation)
    pretrained = None if model.pretrained is None else absolute(model.pretrained)
    return dataclasses.replace(
        config,
        data=dataclasses.replace(data, train=absolute(data.train), validation=validation),
        model=dataclasses.replace(model, pretrained=pretrained),
    )
