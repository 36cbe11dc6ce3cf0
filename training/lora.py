"""LoRA on the decoder: low-rank additions to its layers, merged into what a run ends with, and kept by themselves.

Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685, by way of the `peft` package.
"""

import copy
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from sd_vae.autoencoder import AutoencoderKL
from sd_vae.files import atomic_folder

from .config import ModelConfig, TrainConfig
from .run_folder import shareable

__all__ = ["add_lora_", "has_lora", "merged", "save_adapter"]

ADAPTER = "default"
"""Name of the additions within the network."""

PEFT_PREFIX = "base_model.model."
"""Stands before the names of a network's own modules in PEFT's files."""


def add_lora_(vae: AutoencoderKL, model: ModelConfig, seed: int) -> None:
    """Add LoRA to every convolution and projection of the decoder; the network computes what it did before.

    Args:
        vae: Model, changed in place.
        model: Rank and scale.
        seed: Of the additions' random half.
    """
    from peft import LoraConfig

    layers = (nn.Conv2d, nn.Linear)
    targets = [f"decoder.{name}" for name, module in vae.decoder.named_modules() if isinstance(module, layers)]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        # peft calls alpha an int, and takes any number.
        alpha: Any = model.lora_alpha
        vae.add_adapter(LoraConfig(r=model.lora_rank, lora_alpha=alpha, target_modules=targets), ADAPTER)


def has_lora(vae: nn.Module) -> bool:
    """Return whether a network has additions."""
    return any(".lora_" in name for name, _ in vae.named_parameters())


def merged(vae: AutoencoderKL) -> AutoencoderKL:
    """Return a copy with the additions merged into its weights, under their plain names."""
    plain = copy.deepcopy(vae)
    plain.fuse_lora()
    plain.unload_lora()
    return plain


def save_adapter(vae: AutoencoderKL, config: TrainConfig) -> None:
    """Write additions alone to the run's `adapter/` in PEFT's format; nothing where there are none.

    `peft.PeftModel.from_pretrained(base_vae, "RUN/adapter")` adds them to the VAE that training started from.

    Args:
        vae: Model.
        config: The run.
    """
    if not has_lora(vae):
        return
    from peft import get_peft_model_state_dict

    additions = get_peft_model_state_dict(vae, adapter_name=ADAPTER)
    settings = copy.deepcopy(vae.peft_config[ADAPTER])
    settings.base_model_name_or_path = shareable(config).model.pretrained
    settings.inference_mode = True
    settings.target_modules = sorted(settings.target_modules)  # a set, whose order is another in every process
    with atomic_folder(Path(config.out) / "adapter", overwrite=True) as folder:
        settings.save_pretrained(str(folder))
        tensors = {f"{PEFT_PREFIX}{name}": tensor.cpu().contiguous() for name, tensor in additions.items()}
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
