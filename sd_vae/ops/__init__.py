"""The model's heavy steps: a plain reference and fast versions of each, chosen in `sd_vae.ops.dispatch`."""

import sys

from torch import nn

from sd_vae.ops.dispatch import reference
from sd_vae.ops.operations import attention, conv1x1, conv3x3, downsample_conv, group_norm_silu, lay_out, upsample_conv

__all__ = [
    "attention",
    "conv1x1",
    "conv3x3",
    "downsample_conv",
    "forget_weights",
    "group_norm_silu",
    "lay_out",
    "reference",
]
__all__ += ["upsample_conv"]


def forget_weights(module: nn.Module) -> None:
    """Drop what the compiled kernels keep of a module's weights; nothing where they have not run."""
    if "sd_vae.ops.weights" in sys.modules:
        sys.modules["sd_vae.ops.weights"].forget(list(module.parameters()))
