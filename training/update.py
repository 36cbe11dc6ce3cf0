"""One update of a run: the autoencoder's half step, then the discriminator's on the same pictures.

Both networks see every batch. A half step drops its gradients before the other begins, and reaches no parameter of the
other: the reconstruction is detached for the discriminator, the discriminator frozen while it judges. Accumulated
batches give what one batch of them all gives, the adaptive weight included. An update whose loss or gradient is not
finite is not taken.

Shapes: B batch, C latent channels, H W pixels, h w latent cells.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from sd_vae.autoencoder import AutoencoderKL
from sd_vae.data import Batch, posterior_noise
from sd_vae.errors import UserError
from sd_vae.losses import Objective, Window, require_cells, tile_loss
from sd_vae.losses.equivariance import IDENTITY

from .adversary import Adversary, smallest_side
from .collapse import channel_moments
from .config import TrainConfig
from .optim import Mover
from .rehearsal import memory_errors
from .step import Geometry, Means, TrainingForward, draw_geometry, synchronised

__all__ = ["Update", "UpdateResult"]


class UpdateResult(NamedTuple):
    """What an update did, on this process."""

    is_taken: bool
    """Whether the autoencoder moved."""
    terms: dict[str, Tensor]
    """Means over the update's batches: the loss, its terms, gradient norms."""
    channels: Tensor
    """`channel_moments` of the posteriors, (3, C)."""


class Update:
    """Takes updates of an autoencoder and, where the loss has one, of its discriminator.

    Args:
        accelerator: The process's Accelerator.
        config: The run.
        vae: Model, on the device, its frozen parameters frozen.
        objective: Loss without the adversarial term, on the device.

    Raises:
        UserError: The adaptive weight needs a last layer that does not train, or crops are too small for tiles.
    """

    def __init__(self, accelerator: Accelerator, config: TrainConfig, vae: AutoencoderKL, objective: Objective) -> None:
        self.accelerator = accelerator
        self.config = config
        self.vae = vae
        self.objective = objective
        forward = TrainingForward(vae, objective.output)
        if config.speed.compile:
            forward.compile()
        self.forward = accelerator.prepare_model(forward)
        trained = [parameter for parameter in vae.parameters() if parameter.requires_grad]
        undecayed = [] if objective.output is None else list(objective.output.parameters())
        self.mover = Mover(accelerator, trained, config.optim, config.steps, undecayed=undecayed)
        self.adversary = Adversary(accelerator, config) if config.loss.adversarial.weight else None
        if self.adversary is not None and config.loss.adversarial.adaptive:
            _require_trained(self._last_layer)
        if config.loss.tiling.weight:
            require_cells(config.loss.tiling, smallest_side(config) // vae.factor)

    def __call__(self, batches: Sequence[Batch], step: int) -> UpdateResult:
        """Update the networks.

        Args:
            batches: The update's batches on this process.
            step: Optimizer steps taken before.
        """
        geometry = draw_geometry(self.config, step, self.vae.factor)
        result, pairs = self._half_step(batches, step, geometry)
        if result.is_taken and self.adversary is not None and self.adversary.weight_at(step):
            _, terms = self.adversary.half_step(pairs)
            result.terms.update(terms)
        return result

    def rehearse(self) -> None:
        """Go through all of an update that takes memory, optimizer states included, and leave no trace.

        Raises:
            ShortageError: It does not fit; names the settings to change.
        """
        size, none = self.config.data.size, torch.zeros(self.config.batch_size, dtype=torch.int64)
        with memory_errors(self.config):
            self._rehearse(Batch(torch.zeros(self.config.batch_size, 3, size, size), none, none, []))

    def state(self) -> tuple[dict[str, nn.Module], dict[str, Any]]:
        """Return what a checkpoint holds of it, besides the autoencoder: modules by file name, the rest by key."""
        models, states = ({}, {}) if self.adversary is None else self.adversary.state()
        if self.objective.output is not None:
            models["output"] = self.objective.output
        return models, states | self.mover.state()

    def _rehearse(self, batch: Batch) -> None:
        spare = [torch.empty_like(parameter) for parameter in self.mover.parameters for _ in range(2)]
        networks = [self.mover] if self.adversary is None else [self.mover, self.adversary.mover]
        num_cells, has_tile = batch.x.shape[-1] // self.vae.factor, self.config.loss.tiling.weight > 0
        largest = Geometry(tile=Window(top=0, left=0, side=num_cells - 1) if has_tile else None)
        with self.accelerator.no_sync(self.forward):
            x, recon, posterior, tile = self._reconstruct(batch, largest)
            loss = self.objective(x, recon, posterior, 0).total
            if tile is not None:
                loss = loss + self._tile_loss(tile, recon, largest)
            if self.adversary is not None:
                loss = loss + self.adversary.judge(recon)
            self.accelerator.backward(loss)
        if self.adversary is not None:
            with self.accelerator.no_sync(self.adversary.forward):
                self.accelerator.backward(self.adversary.forward(torch.cat([x, recon.detach().to(x.dtype)])).sum())
        for mover in networks:
            mover.optimizer.zero_grad(set_to_none=True)
        del spare

    def _half_step(
        self, batches: Sequence[Batch], step: int, geometry: Geometry
    ) -> tuple[UpdateResult, list[tuple[Tensor, Tensor]]]:
        """Move the autoencoder; also return the pictures and reconstructions for the discriminator."""
        means, pairs = Means(len(batches)), []
        weight = 0.0 if self.adversary is None else self.adversary.weight_at(step)
        factor = self._factor_over(batches, step, geometry) if weight and len(batches) > 1 else None
        for index, batch in enumerate(batches):
            with synchronised(self.accelerator, self.forward, index == len(batches) - 1):
                x, recon, posterior, tile = self._reconstruct(batch, geometry)
                loss, terms, fidelity = self.objective(x, recon, posterior, step)
                if tile is not None:
                    terms["tiling"] = self._tile_loss(tile, recon, geometry)
                    loss = loss + self.config.loss.tiling.weight * terms["tiling"]
                if self.adversary is not None and weight:
                    term = self.adversary.judge(recon)
                    if factor is None:
                        factor = self._factor(self._pull(fidelity, term), x)
                    loss = loss + weight * factor * term
                    terms |= {"adversarial": term, "adversarial_weight": weight * factor}
                    pairs.append((x, recon.detach()))
                self.accelerator.backward(loss)
            means.add({"loss": loss, **terms, "channels": channel_moments(posterior)})
        is_taken, grad_norm = self.mover.move(means.values["loss"])
        channels = means.values.pop("channels")
        return UpdateResult(is_taken, {**means.values, "grad_norm": grad_norm}, channels), pairs

    def _reconstruct(self, batch: Batch, geometry: Geometry) -> tuple[Tensor, Tensor, Any, Tensor | None]:
        """What a batch is compared with, its reconstruction, the posterior, and the decoded tile where there is one."""
        x = batch.x.to(self.accelerator.device, non_blocking=True)
        factor = self.vae.factor
        crop, similarity, tile = geometry
        if crop is not None:
            x = crop(x, factor)
        if not similarity.of_latent:
            x, similarity = similarity(x, factor), IDENTITY
        x = x.contiguous(memory_format=self._memory_format)
        shape = (self.vae.config.latent_channels, x.shape[2] // factor, x.shape[3] // factor)
        noise = posterior_noise(self.config.seed, batch.epochs, batch.indices, shape)
        recon, posterior, *tiles = self.forward(x, noise.to(x.device, non_blocking=True), similarity, tile)
        return similarity(x, factor), recon, posterior, tiles[0] if tiles else None

    def _tile_loss(self, tile: Tensor, recon: Tensor, geometry: Geometry) -> Tensor:
        """How far a decoded tile is from the whole."""
        assert geometry.tile is not None, "only a step with a tile decodes one"
        margin = self.config.loss.tiling.margin
        return tile_loss(tile, recon, geometry.tile, factor=self.vae.factor, margin=margin)

    # ---- the adaptive weight

    def _factor_over(self, batches: Sequence[Batch], step: int, geometry: Geometry) -> Tensor:
        """The factor of an accumulated update, which all its batches share; costs a forward pass more for each."""
        pulls, whole = [], geometry._replace(tile=None)
        for batch in batches:
            with self.accelerator.no_sync(self.forward):
                x, recon, posterior, _ = self._reconstruct(batch, whole)
                fidelity = self.objective(x, recon, posterior, step).fidelity
                pulls.append(self._pull(fidelity, self._adversary.judge(recon)))
        return self._factor(torch.stack(pulls).mean(dim=0), x)

    def _pull(self, fidelity: Tensor, term: Tensor) -> Tensor:
        """Gradients of both terms at the last layer, (2, ...); of nothing where the weight is fixed."""
        if not self.config.loss.adversarial.adaptive:
            return torch.zeros(2, device=fidelity.device)
        return self._adversary.pull(fidelity, term, self._last_layer)

    def _factor(self, pulls: Tensor, x: Tensor) -> Tensor:
        """The adaptive factor; 1 where the weight is fixed."""
        if not self.config.loss.adversarial.adaptive:
            return torch.ones((), device=x.device)
        return self._adversary.factor(pulls, x[0].numel())

    @property
    def _adversary(self) -> Adversary:
        assert self.adversary is not None, "only asked for where the loss has a discriminator"
        return self.adversary

    @property
    def _last_layer(self) -> Tensor:
        """The weight that the adaptive factor is measured at."""
        return self.vae.decoder.conv_out.weight

    @property
    def _memory_format(self) -> torch.memory_format:
        return torch.channels_last if self.config.model.channels_last else torch.contiguous_format


def _require_trained(last_layer: Tensor) -> None:
    if not last_layer.requires_grad:
        raise UserError(
            "loss.adversarial.adaptive is measured at decoder.conv_out, which does not train here; "
            "train it too, or set loss.adversarial.adaptive to false."
        )
