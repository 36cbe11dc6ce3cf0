"""Posterior collapse: latent channels that say nothing of the picture, seen while there is time to mend it.

Shapes: B batch, C latent channels, h w latent cells.

Source: Burda, Grosse and Salakhutdinov, "Importance Weighted Autoencoders", arXiv 1509.00519, 5.2 (active units).
"""

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from sd_vae.posterior import DiagonalGaussian

__all__ = ["ACTIVE_VARIANCE", "CollapseMonitor", "channel_moments"]

logger = logging.getLogger(__name__)

ACTIVE_VARIANCE = 0.01
"""A channel is active where the variance of its posterior means over pictures and cells is above this."""

DEAD_NATS = 0.01
"""A channel is dead where its KL is below this, a latent element."""


@torch.no_grad()
def channel_moments(posterior: DiagonalGaussian) -> Tensor:
    """Return KL, posterior mean and its square, each a mean over B, h, w: (3, C).

    Their means over batches and processes are those of all pictures together.
    """
    mean = posterior.mean
    return torch.stack([part.mean(dim=(0, 2, 3)) for part in (posterior.kl_map(), mean, mean.square())])


class CollapseMonitor:
    """Turns channel moments into what is logged, and warns once of each channel that is dead.

    Args:
        patience: Steps before it warns: random encoders have not begun to use their latent.
    """

    def __init__(self, patience: int) -> None:
        self.patience = patience
        self.known: set[int] = set()

    def rows(self, moments: Tensor, step: int) -> dict[str, float]:
        """Return `kl_channel/i` in nats a latent element, `active_units` and `dead_channels`; warn of new dead ones.

        Args:
            moments: `channel_moments` over all processes, (3, C).
            step: Optimizer steps taken.
        """
        kl, mean, square = moments.double().cpu()
        dead = [channel for channel, nats in enumerate(kl.tolist()) if nats < DEAD_NATS]
        if step >= self.patience and not self.known.issuperset(dead):
            self.known.update(dead)
            logger.warning(_advice(dead, len(kl), step))
        return {
            **{f"kl_channel/{channel}": nats for channel, nats in enumerate(kl.tolist())},
            "active_units": float((square - mean.square() > ACTIVE_VARIANCE).sum()),
            "dead_channels": float(len(dead)),
        }


def _advice(dead: Sequence[int], num_channels: int, step: int) -> str:
    """One line: what is dead, and what helps."""
    which = "all" if len(dead) == num_channels else ", ".join(map(str, dead))
    return (
        f"posterior collapse: latent channels {which} of {num_channels} say nothing of the picture at step {step} "
        f"(KL below {DEAD_NATS} nats an element); lower loss.kl.weight, raise it slowly with loss.kl.warmup_steps, or "
        "leave each channel some KL for nothing with loss.kl.free_bits"
    )
