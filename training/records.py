"""What a run writes for people to read: metrics.jsonl, TensorBoard events, the model card."""

import dataclasses
import hashlib
import json
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sd_vae.errors import UserError
from sd_vae.files import file_errors, finite, read_text, write_text

from .certificate import described
from .config import ModelConfig, TrainConfig
from .validation import Evaluated

__all__ = ["CARD_PICTURE", "MetricsLog", "loss_terms", "model_card", "read_metrics", "versions"]

CARD_PICTURE = "reconstructions.png"
"""Beside the model card: photos and what becomes of them."""


class MetricsLog:
    """Rows of numbers by step, to `metrics.jsonl` and, where asked, TensorBoard and Weights & Biases.

    Args:
        folder: Run folder.
        config: Says where else rows and pictures go.
        step: Rows after this step are cut off: a resumed run writes them again.

    Raises:
        UserError: Weights & Biases is asked for and missing or out of reach.
    """

    def __init__(self, folder: Path, config: TrainConfig, *, step: int) -> None:
        self.path = folder / "metrics.jsonl"
        rows = [row for row in read_metrics(self.path) if row["step"] <= step] if self.path.exists() else []
        write_text(self.path, "".join(json.dumps(row) + "\n" for row in rows))
        self._writer: Any = None
        self._wandb = _open_wandb(folder, config)
        if config.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            with file_errors("write", folder / "tensorboard"):
                self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, values: Mapping[str, float], picture: Image.Image | None = None) -> None:
        """Append one row and flush it; a picture goes to where pictures can be looked at."""
        with file_errors("write", self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(finite({"step": step, **values})) + "\n")
        if self._writer is not None:
            with file_errors("write", self.path.parent / "tensorboard"):
                for name, value in values.items():
                    self._writer.add_scalar(name, value, step)
                if picture is not None:
                    self._writer.add_image("reconstructions", np.asarray(picture), step, dataformats="HWC")
        if self._wandb is not None:
            import wandb

            pictures = {} if picture is None else {"reconstructions": wandb.Image(picture)}
            self._wandb.log({**values, **pictures}, step=step)

    def close(self) -> None:
        """Finish the events file."""
        if self._writer is not None:
            with file_errors("write", self.path.parent / "tensorboard"):
                self._writer.close()
        if self._wandb is not None:
            self._wandb.finish()


def _open_wandb(folder: Path, config: TrainConfig) -> Any:
    """The run of Weights & Biases that a run folder has, the same one after it is resumed; None where none is asked."""
    if config.report.wandb_project is None:
        return None
    try:
        import wandb
    except ImportError as error:
        raise UserError(
            'report.wandb_project needs Weights & Biases; install it: pip install "sd-vae[wandb]", or leave it out.'
        ) from error
    try:
        return wandb.init(
            project=config.report.wandb_project,
            name=folder.resolve().name,
            id=hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16],
            resume="allow",
            dir=str(folder),
            config=dataclasses.asdict(config),
        )
    except (OSError, wandb.Error) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise UserError(
            f"cannot open the Weights & Biases project {config.report.wandb_project}: {reason}; log in with "
            "`wandb login`, set WANDB_MODE=offline, or leave report.wandb_project out."
        ) from error


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Return the rows of a `metrics.jsonl`; a last line that a crash cut off is left out.

    Raises:
        UserError: Another line is no row, or the file cannot be read.
    """
    rows = []
    lines = read_text(path).splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            row["step"] + 0
        except (ValueError, KeyError, TypeError):
            if number == len(lines):
                break
            raise UserError(f"{path} line {number} is not a row of metrics: {line[:40]!r}; remove it.") from None
        rows.append(row)
    return rows


def loss_terms(values: Mapping[str, float]) -> str:
    """Return the loss and its terms of both networks for a progress bar; what else a step says is in the log."""
    others = ("grad_norm", "_weight", "_real", "_fake", "_accuracy")
    return ", ".join(f"{name} {value:.4g}" for name, value in values.items() if not name.endswith(others))


def versions() -> dict[str, str]:
    """Return the versions of what decides a run's numbers."""
    packages = ("sd-vae", "torch", "diffusers", "accelerate", "datasets", "lpips", "torchmetrics", "pillow")
    return {"python": platform.python_version()} | {name: version(name) for name in packages}


def model_card(config: TrainConfig, results: Mapping[str, Any], evaluated: Evaluated | None = None) -> str:
    """Return the README.md of a trained VAE: what it is, how to load it, how it was made, its numbers and pictures."""
    start = config.model.pretrained or f"random weights of preset `{config.model.preset}`"
    losses = [config.loss.reconstruction.upper()]
    if config.loss.perceptual.weight:
        losses.append(f"{config.loss.perceptual.weight:g} x {config.loss.perceptual.net}")
    if config.loss.kl.weight:
        losses.append(f"{config.loss.kl.weight:g} x KL ({config.loss.kl.convention})")
    if config.loss.adversarial.weight:
        losses.append(f"{config.loss.adversarial.weight:g} x adversarial ({config.loss.adversarial.loss})")
    if config.loss.tiling.weight:
        losses.append(f"{config.loss.tiling.weight:g} x tiling")
    if config.loss.equivariance.probability:
        losses.append(f"latents turned and scaled in {config.loss.equivariance.probability:.0%} of the steps")
    validation = results.get("validation") or {}
    numbers = "\n".join(f"| {name} | {value:.5g} |" for name, value in validation.items())
    table = f"| validation | value |\n|---|---|\n{numbers}\n" if numbers else "No validation photos were given.\n"
    if evaluated is not None:
        shown = f"\n![photos and their reconstructions]({CARD_PICTURE})\n" if evaluated.picture else ""
        table = evaluated.card + shown
    return f"""---
library_name: diffusers
tags: [vae, stable-diffusion, autoencoder]
---
# KL autoencoder trained with sd-vae

```python
from diffusers import AutoencoderKL

vae = AutoencoderKL.from_pretrained("path/to/this/folder")
```

- Started from: {start}; trained: {_trained(config.model)}
- Data: {", ".join(f"`{source}`" for source in config.data.sources)}, {config.data.size}x{config.data.size} crops
- Loss: {" + ".join(losses)}
- {results["step"]} optimizer steps, {results["samples"]} pictures seen, seed {config.seed}
- Weights: {"exponential moving average, decay " + format(config.ema_decay, "g") if config.ema_decay else "last step"}
- Scaling factor {results["scaling_factor"]:.5g} ({results["scaling_factor_source"]})
- Latents: {described(results.get("latents"))}

{table}
The recipe and the software versions are in the metadata of the safetensors file.
"""


def _trained(model: ModelConfig) -> str:
    """What moved, in words."""
    return {
        "all": "all of it",
        "decoder": "decoder and post_quant_conv",
        "parts": ", ".join(model.parts),
        "lora": f"low-rank additions to the decoder (rank {model.lora_rank}), merged into these weights",
    }[model.trainable]
