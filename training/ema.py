"""Averaged weights: an exponential moving average over optimizer steps that warms up from the first step.

Source: Polyak and Juditsky, 1992; the warm-up min(decay, (1 + n) / (10 + n)) is that of TensorFlow's
ExponentialMovingAverage, which latent diffusion took over.
"""

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from sd_vae.autoencoder import AutoencoderKL

__all__ = ["EMA"]

Tensors = tuple[Tensor, ...] | list[Tensor]


class EMA(AveragedModel):
    """A copy of a VAE whose weights trail the trained ones; `ema.module` is that VAE.

    Args:
        vae: Model to average, left alone.
        decay: Weight of the past in [0, 1), reached after warm-up.
    """

    module: AutoencoderKL

    def __init__(self, vae: AutoencoderKL, decay: float) -> None:
        def average(averaged: Tensors, current: Tensors, num_averaged: Tensor | int) -> None:
            count = int(num_averaged)
            torch._foreach_lerp_(averaged, current, 1.0 - min(decay, (1 + count) / (10 + count)))

        super().__init__(vae, multi_avg_fn=average)
        self.module.requires_grad_(False).eval()
