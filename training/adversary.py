"""The discriminator's side of a run: its network, when it plays, what it tells the autoencoder, and its own step."""

from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from sd_vae.losses import (
    LeCam,
    adaptive_weight,
    adversarial_weight_at,
    build_discriminator,
    discriminator_loss,
    generator_loss,
)

from .config import TrainConfig
from .optim import Mover, discriminator_config
from .step import Means, synchronised

__all__ = ["Adversary", "smallest_side"]


class Adversary:
    """A discriminator in training.

    Args:
        accelerator: The process's Accelerator.
        config: The run; its adversarial weight is not 0.

    Raises:
        UserError: Crops are too small for it, or its weights cannot be loaded.
    """

    def __init__(self, accelerator: Accelerator, config: TrainConfig) -> None:
        self.accelerator = accelerator
        self.config = config.loss.adversarial
        with torch.random.fork_rng():
            torch.manual_seed(config.seed)
            self.network = build_discriminator(self.config)
        self.network.to(accelerator.device)
        smallest = smallest_side(config)
        self.network.require_size(smallest, smallest)
        self.lecam = LeCam(self.config.lecam_decay).to(accelerator.device)
        parameters = list(self.network.parameters())
        num_steps = max(1, config.steps - self.config.start_step)
        self.forward = accelerator.prepare_model(self.network)
        self.mover = Mover(accelerator, parameters, discriminator_config(config.optim), num_steps)

    def weight_at(self, step: int) -> float:
        """Return the weight of the autoencoder's term before the adaptive factor; 0 where the game has not begun."""
        return adversarial_weight_at(self.config, step)

    def judge(self, recon: Tensor) -> Tensor:
        """Return the autoencoder's term, a scalar whose gradient reaches `recon` and leaves the discriminator alone."""
        # Past the wrapper, whose parameters would expect a gradient; frozen, so that there is none.
        self.network.requires_grad_(False)
        try:
            with self.accelerator.autocast():
                return generator_loss(_wide(self.network(recon)))
        finally:
            self.network.requires_grad_(True)

    def pull(self, fidelity: Tensor, term: Tensor, last_layer: Tensor) -> Tensor:
        """Return the gradients of both terms with respect to the decoder's last layer, (2, ...), and keep the graph."""
        # Scaled, because in half precision they would vanish on their way.
        scale = 1.0 if self.accelerator.scaler is None else self.accelerator.scaler.get_scale()
        gradients = [
            torch.autograd.grad(scale * loss, last_layer, retain_graph=True)[0] / scale for loss in (fidelity, term)
        ]
        return torch.stack(gradients)

    def factor(self, pulls: Tensor, num_image_elements: int) -> Tensor:
        """Return the adaptive factor of a step, from the mean of its `pull` over batches and, here, processes."""
        fidelity, term = self.accelerator.reduce(pulls, "mean")
        return adaptive_weight(fidelity, term, num_image_elements, self.config.max_adaptive)

    def half_step(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> tuple[bool, dict[str, Tensor]]:
        """Train the discriminator on a step's pictures and their reconstructions, which carry no gradient.

        Args:
            pairs: For each batch of the step, x and recon, both (B, 3, H, W).

        Returns:
            Whether its step was taken, and terms: its loss, the mean logits of both sides, the share it tells apart.
        """
        means = Means(len(pairs))
        for index, (x, recon) in enumerate(pairs):
            with synchronised(self.accelerator, self.forward, index == len(pairs) - 1):
                real, fake = _wide(self.forward(torch.cat([x, recon.to(x.dtype)]))).chunk(2)
                loss = discriminator_loss(real, fake, self.config.loss)
                if self.config.lecam_weight:
                    loss = loss + self.config.lecam_weight * self.lecam(real, fake)
                self.accelerator.backward(loss)
            is_right = torch.cat([real > 0, fake < 0]).float().mean()
            logits = {"disc_real": real.mean(), "disc_fake": fake.mean()}
            means.add({"disc_loss": loss, **logits, "disc_accuracy": is_right})
        is_taken, grad_norm = self.mover.move(means.values["disc_loss"])
        if is_taken:
            self.network.advance_()
            if self.config.lecam_weight:
                both = torch.stack([means.values["disc_real"], means.values["disc_fake"]])
                self.lecam.advance_(*self.accelerator.reduce(both, "mean"))
        return is_taken, {**means.values, "disc_grad_norm": grad_norm}

    def state(self) -> tuple[dict[str, nn.Module], dict[str, Any]]:
        """Return what a checkpoint holds of it: modules by file name, the rest by key."""
        return {"discriminator": self.network, "lecam": self.lecam}, self.mover.state("discriminator_")


def smallest_side(config: TrainConfig) -> int:
    """Return the side in pixels of the smallest pictures that a run compares."""
    side = config.data.size if config.data.min_size is None else config.data.min_size
    equivariance = config.loss.equivariance
    return round(side * (equivariance.min_scale if equivariance.probability else 1.0))


def _wide(values: Tensor) -> Tensor:
    """`values` in fp32, or in fp64 where they are."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
