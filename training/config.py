"""What a training run is, as data: frozen dataclasses, a YAML recipe that fills them, and the recipes that ship.

Nothing here imports torch, so `sd-vae train --help` is quick. A recipe is a YAML file with the fields below; unknown
keys and wrong types are reported together, with the nearest known key.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from sd_vae.config import PRESETS
from sd_vae.data.config import DataConfig
from sd_vae.errors import UserError
from sd_vae.files import read_text, write_text
from sd_vae.losses.config import LossConfig
from sd_vae.validation import STRICT, from_plain

from .config_extras import ReportConfig, SpeedConfig

__all__ = ["REQUIRED", "ModelConfig", "OptimConfig", "TrainConfig", "load_recipe", "save_recipe"]

RECIPES = Path(__file__).parent / "recipes"

REQUIRED = "(required)"
"""Stands in a recipe for what only the user knows; a run refuses to start with it."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The network that is trained and which parts of it move."""

    __pydantic_config__ = STRICT

    preset: str = "sd1"
    """Architecture with random weights: sd1, sdxl, sd3, flux or mini. Not used with `pretrained`."""
    init: Literal["default", "near_identity"] = "default"
    """Random weights to start from: PyTorch's, or `near_identity`, which learns faster at the beginning."""
    pretrained: str | None = None
    """Weights to start from: folder, file or hub id, in any layout that `sd_vae.load_vae` reads."""
    trainable: Literal["all", "decoder", "parts", "lora"] = "all"
    """`decoder` freezes encoder and quant_conv, so that latents stay those of the weights it started from; `parts`
    trains what `parts` names; `lora` trains low-rank additions to the decoder, which are merged into the result."""
    parts: tuple[str, ...] = ()
    """With `trainable: parts`: beginnings of parameter names, such as decoder.up_blocks.3 or decoder.conv_out."""
    lora_rank: int = 16
    """Rank of LoRA's additions to every convolution and projection of the decoder."""
    lora_alpha: float = 16.0
    """LoRA's additions are scaled by lora_alpha / lora_rank."""
    scaling_factor: Literal["auto", "measure", "keep"] = "auto"
    """`measure` takes it from the latents of training photos after training, `keep` keeps it; `auto` measures it where
    the run started from random weights, and else keeps it."""
    gradient_checkpointing: bool = False
    """Recompute blocks in the backward pass: less memory, more time."""
    channels_last: bool = True
    """Store feature maps as (B, H, W, C) in memory, which oneDNN and cuDNN prefer; same numbers up to rounding."""

    def __post_init__(self) -> None:
        """Check the rules.

        Raises:
            UserError: Lists every rule that is broken, with its values.
        """
        problems = []
        if self.preset not in PRESETS:
            problems.append(f"model.preset is {self.preset!r}, choose one of: {', '.join(PRESETS)}")
        if (self.trainable == "parts") != bool(self.parts):
            problems.append(
                f"model.trainable is {self.trainable} and model.parts {list(self.parts)}; name parts with "
                "model.trainable parts and with no other"
            )
        if self.lora_rank < 1:
            problems.append(f"model.lora_rank is {self.lora_rank}, it must be at least 1")
        if not 0 < self.lora_alpha < math.inf:
            problems.append(f"model.lora_alpha is {self.lora_alpha}, it must be a finite number above 0")
        if problems:
            raise UserError("; ".join(problems) + ".")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The optimizer, its learning rate over the steps, and clipping; of the autoencoder and of its discriminator."""

    __pydantic_config__ = STRICT

    name: Literal["adamw", "muon"] = "adamw"
    """AdamW, or Muon: the weights of convolutions and of linear layers move by orthogonalised momentum, all else by
    AdamW. From random weights Muon takes fewer steps, each of which costs more where batches are small."""
    lr: float = 1e-4
    """Learning rate after warm-up."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of Adam's two moments."""
    eps: float = 1e-8
    """Added to Adam's denominator."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    schedule: Literal["constant", "cosine"] = "constant"
    """Learning rate after warm-up: constant, or down to 0 along a half cosine at the last step."""
    warmup_steps: int = 0
    """Optimizer steps over which the learning rate rises from 0."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm, those of each network by themselves; 0 leaves them alone."""
    fused: bool = False
    """Update all weights in one kernel, which is faster on a GPU."""
    discriminator_lr: float | None = None
    """Learning rate of the discriminator after warm-up; the same as `lr` where it is not given. All else is shared."""

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            UserError: Lists every value out of range.
        """
        problems = []
        for name in ("lr", "eps", "discriminator_lr"):
            if getattr(self, name) is not None and not 0 < getattr(self, name) < math.inf:
                problems.append(f"optim.{name} is {getattr(self, name)}, it must be a finite number above 0")
        if not all(0 <= beta < 1 for beta in self.betas):
            problems.append(f"optim.betas is {list(self.betas)}, both must be in [0, 1)")
        for name in ("weight_decay", "warmup_steps", "max_grad_norm"):
            if not 0 <= getattr(self, name) < math.inf:
                problems.append(f"optim.{name} is {getattr(self, name)}, it must be a finite number >= 0")
        if problems:
            raise UserError("; ".join(problems) + ".")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything that decides a run's result, and nothing else."""

    __pydantic_config__ = STRICT

    out: str
    """Run folder; must not exist yet."""
    steps: int
    """Optimizer steps."""
    batch_size: int
    """Pictures a step and device, before accumulation."""
    seed: int = 0
    """Initial weights, data order, crops, flips and posterior noise are functions of it."""
    gradient_accumulation_steps: int = 1
    """Batches whose gradients are averaged into one optimizer step."""
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    """Autocast for the forward pass; weights, optimizer and losses stay in fp32."""
    ema_decay: float = 0.0
    """Decay of the averaged weights that are validated and saved; 0 keeps none. Early steps average over fewer."""
    max_skipped_steps: int = 20
    """Updates in a row that may be skipped because loss or gradient is not finite; then the run ends."""
    log_every: int = 10
    """Optimizer steps between rows of metrics.jsonl."""
    validate_every: int = 1000
    """Optimizer steps between validations; the last step always validates. Needs data.validation."""
    checkpoint_every: int = 1000
    """Optimizer steps between checkpoints; the last step always writes one."""
    keep_checkpoints: int = 2
    """Newest checkpoints that are kept."""
    num_validation_images: int = 8
    """Validation photos, the first by name, used every time."""
    tensorboard: bool = True
    """Also write TensorBoard events into the run folder."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    report: ReportConfig = field(default_factory=ReportConfig)
    speed: SpeedConfig = field(default_factory=SpeedConfig)

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            UserError: Lists every value out of range.
        """
        problems = []
        counts = ("steps", "batch_size", "gradient_accumulation_steps", "log_every", "validate_every")
        for name in (*counts, "checkpoint_every", "keep_checkpoints", "num_validation_images", "max_skipped_steps"):
            if getattr(self, name) < 1:
                problems.append(f"{name} is {getattr(self, name)}, it must be at least 1")
        if not 0 <= self.ema_decay < 1:
            problems.append(f"ema_decay is {self.ema_decay}, it must be in [0, 1)")
        if not 0 <= self.seed < 2**63:
            problems.append(f"seed is {self.seed}, it must be in [0, 2^63)")
        if problems:
            raise UserError("; ".join(problems) + ".")

    def require_complete(self) -> None:
        """Check that nothing is left to fill in.

        Raises:
            UserError: A required field still has its placeholder.
        """
        fields = {"out": (self.out,), "data.train": self.data.sources, "model.pretrained": (self.model.pretrained,)}
        missing = [name for name, values in fields.items() if REQUIRED in values]
        if missing:
            options = " and ".join(f"--{name} VALUE" for name in missing)
            raise UserError(f"{' and '.join(missing)} must be given; set it in the recipe or add {options}.")


def load_recipe(recipe: str | Path) -> TrainConfig:
    """Return the config of a recipe: a YAML file, or the name of one that ships (`demo`, `from_scratch`, ...).

    Raises:
        UserError: No such recipe, not YAML, unknown keys, wrong types or values out of range, all in one line.
    """
    path = Path(recipe)
    shipped = {entry.stem: entry for entry in sorted(RECIPES.glob("*.yaml"))}
    if not path.is_file() and str(recipe) in shipped:  # a folder may bear the name of a recipe
        path = shipped[str(recipe)]
    if not path.exists():
        raise UserError(f"there is no recipe {recipe}; give a YAML file or one of: {', '.join(shipped)}.")
    try:
        values = yaml.load(read_text(path), Loader=_Loader)
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}.") from None
    if not isinstance(values, Mapping):
        raise UserError(f"{path} holds {type(values).__name__}, a recipe is a mapping of fields; see training/recipes.")
    values = {"out": REQUIRED} | dict(values)
    if isinstance(values.get("data", {}), Mapping):
        values["data"] = {"train": REQUIRED} | dict(values.get("data", {}))
    return from_plain(TrainConfig, values, source=str(path))


def save_recipe(config: TrainConfig, path: Path) -> None:
    """Write a config as a YAML recipe that `load_recipe` reads back equal."""
    write_text(path, yaml.safe_dump(_plain(dataclasses.asdict(config)), sort_keys=False))


def _plain(value: Any) -> Any:
    """Tuples as lists, since YAML has no tuples."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


class _Loader(yaml.SafeLoader):
    """YAML's safe loader that reads 1e-6 as a number, as YAML 1.2 does; PyYAML alone makes it a string."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)
