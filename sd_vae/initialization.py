"""Starting weights from which an autoencoder learns in hundreds of steps what PyTorch's defaults take thousands for.

Sources: residual branches that begin at zero, Goyal et al., arXiv 1706.02677, section 5.1, and Zhang et al., "Fixup",
arXiv 1901.09321; the resampling layers that begin as averages are ours.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sd_vae.autoencoder import Attention, AutoencoderKL, Downsample2D, ResnetBlock2D, Upsample2D

__all__ = ["INITIAL_LOGVAR", "start_near_identity_"]

INITIAL_LOGVAR = -6.0
"""Posterior log-variance at the start: a standard deviation of 0.05 lets the first latents through."""


@torch.no_grad()
def start_near_identity_(vae: AutoencoderKL) -> None:
    """Change a model with fresh weights so that the picture passes through it from the first step.

    Every residual and attention branch begins at zero, changes of width at an orthogonal map, downsampling at 2x2
    averages, upsampling at repetition, and quant_conv and post_quant_conv at the identity with a small posterior
    variance. What is left is nearly linear: averages of random features of the picture and a readout to train.

    Args:
        vae: Model, changed in place; the layers not named above keep their weights.
    """
    for module in vae.modules():
        match module:
            case ResnetBlock2D():
                _fill_(module.conv2, nn.init.zeros_)
                if module.conv_shortcut is not None:
                    _fill_(module.conv_shortcut, nn.init.orthogonal_)
            case Attention():
                _fill_(module.to_out[0], nn.init.zeros_)
            case Downsample2D():
                _fill_(module.conv, nn.init.zeros_)
                channels = range(module.conv.out_channels)
                module.conv.weight[channels, channels, :2, :2] = 0.25
            case Upsample2D():
                _fill_(module.conv, nn.init.dirac_)
    if vae.quant_conv is not None:
        _fill_(vae.quant_conv, nn.init.dirac_)
    if vae.post_quant_conv is not None:
        _fill_(vae.post_quant_conv, nn.init.dirac_)
    moments: Any = vae.encoder.conv_out if vae.quant_conv is None else vae.quant_conv
    logvar_rows = slice(vae.config.latent_channels, None)
    moments.weight[logvar_rows] = 0.0
    moments.bias[logvar_rows] = INITIAL_LOGVAR


def _fill_(layer: Any, fill: Callable[[Tensor], Any]) -> None:
    """Give a layer new weights and no bias."""
    fill(layer.weight)
    nn.init.zeros_(layer.bias)
