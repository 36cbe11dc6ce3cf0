"""The training loop: a recipe in, a run folder out.

`Trainer` reads top to bottom: build, then fit (step, log, validate, save), then finish. Every picture, crop, flip and
noise is a function of (seed, epoch, sample), so a run is its config plus one number, the samples consumed; that is why
resuming is exact.

A run folder: `config.yaml` (resolved), `metrics.jsonl`, `samples/`, `checkpoints/`, `vae/` (a diffusers folder, EMA
weights where there are any), `report.json`.
"""

import dataclasses
import logging
import math
import time
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from tqdm import tqdm

from sd_vae.autoencoder import AutoencoderKL
from sd_vae.data import Batch, open_source, posterior_noise, training_loader
from sd_vae.errors import UserError
from sd_vae.losses import Objective

from .checkpoint import Progress, load_checkpoint, newest_checkpoint, save_checkpoint
from .config import TrainConfig, load_recipe, save_recipe
from .distributed import StopRequest, build_accelerator, stop_on_signals
from .ema import EMA
from .model import freeze, initial_vae
from .optim import build_optimizer, build_schedule
from .records import MetricsLog, versions
from .run_folder import RunResult, make_run_folder, require_new_run, with_absolute_paths, write_result
from .step import TrainingForward
from .validation import latent_moments, load_photos, require_readable, save_picture, validate

__all__ = ["Trainer", "resume", "train"]

logger = logging.getLogger(__name__)

NUM_SCALING_PHOTOS = 64
"""Training photos whose latents set the scaling factor of a VAE trained from random weights."""


def train(config: TrainConfig | str | Path, *, overwrite: bool = False) -> RunResult:
    """Train a VAE and return where it is.

    Args:
        config: The run, or a recipe's path or shipped name.
        overwrite: Replace a run that is in the config's `out`.

    Raises:
        UserError: Something about config, data, weights or the folder that the user can mend.
        KeyboardInterrupt: SIGINT or SIGTERM came; a checkpoint has been written.
    """
    config = config if isinstance(config, TrainConfig) else load_recipe(config)
    config.require_complete()
    return Trainer(config, overwrite=overwrite).fit()


def resume(folder: str | Path) -> RunResult:
    """Go on with an interrupted run from its newest checkpoint; nothing but its folder is needed.

    Raises:
        UserError: The folder is no run, has no checkpoint, or is finished.
    """
    folder = Path(folder)
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{folder} is not a run folder (no config.yaml in it); give the --out of a training.")
    if (folder / "report.json").is_file():
        raise UserError(f"{folder} is finished (it has a report.json); its VAE is {folder / 'vae'}.")
    config = dataclasses.replace(load_recipe(folder / "config.yaml"), out=str(folder))
    return Trainer(config, checkpoint=newest_checkpoint(folder / "checkpoints")).fit()


class Trainer:
    """One run, built but not started.

    Args:
        config: The run.
        checkpoint: Where to go on from; None starts anew.
        overwrite: Replace the run that is in the config's `out`.
    """

    def __init__(self, config: TrainConfig, *, checkpoint: Path | None = None, overwrite: bool = False) -> None:
        self.config = config
        self.folder = Path(config.out)
        self.is_new = checkpoint is None
        if self.is_new:
            require_new_run(config, overwrite=overwrite)
        self.accelerator = build_accelerator(config)
        self.source = open_source(config.data.train, image_column=config.data.image_column)
        require_readable(self.source)
        self.photos = self._load_validation_photos()
        self.vae = self._build_vae()
        self.objective = self._build_objective()
        parameters = freeze(self.vae, config.model.trainable)
        optimizer = build_optimizer(parameters, config.optim)
        self.schedule = build_schedule(optimizer, config.optim, config.steps)
        self.ema = EMA(self.vae, config.ema_decay) if config.ema_decay else None
        self.forward, self.optimizer = self.accelerator.prepare(TrainingForward(self.vae), optimizer)
        self.parameters = parameters
        self.progress = Progress(step=0, samples=0, num_pictures=len(self.source))
        self.unreadable: dict[str, None] = {}  # names, each once, in the order they were met
        if checkpoint is not None:
            self._load(checkpoint)

    def fit(self) -> RunResult:
        """Run to the last step, save the VAE and return where it is."""
        config, accelerator = self.config, self.accelerator
        self._start()
        log = (
            MetricsLog(self.folder, step=self.progress.step, tensorboard=config.tensorboard) if self._is_main else None
        )
        bar = tqdm(
            total=config.steps * self._samples_per_step,
            initial=self.progress.samples,
            unit="image",
            disable=not self._is_main,
            smoothing=0.05,
        )
        try:
            with stop_on_signals() as stop_request, bar:
                batches = iter(self._loader())
                self.last_log = time.perf_counter(), self.progress.samples
                while self.progress.step < config.steps:
                    terms = self._step(batches)
                    step = self.progress.step
                    bar.update(self._samples_per_step)
                    stopping = self._agree(stop_request)
                    if step % config.log_every == 0 or step == config.steps or stopping:
                        values = self._log(log, terms)
                        bar.set_postfix_str(f"loss {values['loss']:.4f}")
                    if self.photos is not None and (step % config.validate_every == 0 or step == config.steps):
                        self._validate(log)
                    if step % config.checkpoint_every == 0 or step == config.steps or stopping:
                        self._save()
                    if stopping:
                        raise KeyboardInterrupt(
                            f"stopped after step {step}, which is saved; go on: sd-vae train --resume {self.folder}"
                        )
        finally:
            if log is not None:
                log.close()
        accelerator.wait_for_everyone()
        return self._finish()

    # ---- one step

    def _step(self, batches: Any) -> dict[str, torch.Tensor]:
        """Take one optimizer step and return its loss terms, means over its pictures on this process."""
        sums: dict[str, torch.Tensor] = {}
        for _ in range(self.config.gradient_accumulation_steps):
            batch: Batch = next(batches)
            self._note_unreadable(batch.unreadable)
            with self.accelerator.accumulate(self.forward):
                x = batch.x.to(self.accelerator.device, non_blocking=True, memory_format=self._memory_format)
                recon, posterior = self.forward(x, self._noise(batch).to(x.device, non_blocking=True))
                loss, terms = self.objective(x, recon, posterior)
                self.accelerator.backward(loss)
                if self.accelerator.sync_gradients:
                    grad_norm = self._clip()
                self.optimizer.step()
                self.optimizer.zero_grad(set_to_none=True)
            for name, value in {"loss": loss.detach(), **terms}.items():
                sums[name] = sums.get(name, 0.0) + value / self.config.gradient_accumulation_steps
        self.lr = float(self.schedule.get_last_lr()[0])
        if not self.optimizer.step_was_skipped:
            self.schedule.step()
        if self.ema is not None:
            self.ema.update_parameters(self.vae)
        done = self.progress
        self.progress = dataclasses.replace(done, step=done.step + 1, samples=done.samples + self._samples_per_step)
        return {**sums, "grad_norm": grad_norm}

    def _noise(self, batch: Batch) -> torch.Tensor:
        """Noise for the posterior samples of a batch, (B, C, h, w)."""
        cells = self.config.data.size // self.vae.factor
        shape = (self.vae.config.latent_channels, cells, cells)
        return posterior_noise(self.config.seed, batch.epochs, batch.indices, shape)

    def _clip(self) -> torch.Tensor:
        """Scale gradients down to the largest allowed norm and return the norm that they had."""
        limit = self.config.optim.max_grad_norm or math.inf
        return self.accelerator.clip_grad_norm_(self.parameters, limit)

    # ---- what happens at intervals

    def _log(self, log: MetricsLog | None, terms: dict[str, torch.Tensor]) -> dict[str, float]:
        """Write a step's terms, means over processes, and return them.

        Raises:
            UserError: The loss is not finite.
        """
        means = {name: float(self.accelerator.reduce(value, "mean")) for name, value in terms.items()}
        if not math.isfinite(means["loss"]):
            raise self._diverged(f"the loss is {means['loss']}")
        now, samples = time.perf_counter(), self.progress.samples  # after the values above have come from the device
        images_per_s = (samples - self.last_log[1]) / (now - self.last_log[0])
        self.last_log = now, samples
        values = {"samples": samples, **means, "lr": self.lr, "images_per_s": images_per_s}
        if log is not None:
            log.write(self.progress.step, values)
        return means

    def _validate(self, log: MetricsLog | None) -> None:
        """Reconstruct the validation photos with the weights that will be saved."""
        if log is None or self.photos is None:
            return
        values, picture = validate(self._best_vae(), self.objective, self.photos, self.accelerator.device)
        self.progress = dataclasses.replace(self.progress, validation=values)
        save_picture(picture, self.folder / "samples" / f"step-{self.progress.step:07d}.png")
        log.write(self.progress.step, {f"validation/{name}": value for name, value in values.items()})

    def _save(self) -> None:
        """Write a checkpoint.

        Raises:
            UserError: Weights are not finite, so that nothing could go on from it.
        """
        if not all(bool(parameter.isfinite().all()) for parameter in self.parameters):
            raise self._diverged("weights are not finite")
        progress = self._noted()
        if self._is_main:
            models, states = self._state()
            folder = self.folder / "checkpoints"
            save_checkpoint(folder, progress, models, states, keep=self.config.keep_checkpoints)
        self.accelerator.wait_for_everyone()

    def _diverged(self, what: str) -> UserError:
        remedy = "lower optim.lr or use mixed_precision no or bf16"
        if any((self.folder / "checkpoints").glob("step-*")):
            remedy += (
                f" in {self.folder / 'config.yaml'}, and go on from the last good checkpoint: --resume {self.folder}"
            )
        else:
            remedy += ", and start anew with --overwrite"
        return UserError(f"{what} at step {self.progress.step}; {remedy}.")

    def _load(self, path: Path) -> None:
        models, states = self._state()
        self.progress = load_checkpoint(path, models, states)
        if self.progress.num_pictures != len(self.source):
            raise UserError(
                f"{self.config.data.train} holds {len(self.source)} pictures, {path} was trained on "
                f"{self.progress.num_pictures}, so the order would differ; restore them, or start anew."
            )
        if self.ema is not None:
            self.ema.n_averaged.fill_(self.progress.step)
        self.unreadable = dict.fromkeys(self.progress.unreadable)

    def _state(self) -> tuple[dict[str, torch.nn.Module], dict[str, Any]]:
        """Everything a checkpoint holds: models by file name, the rest by key."""
        models: dict[str, torch.nn.Module] = {"model": self.vae}
        if self.ema is not None:
            models["ema"] = self.ema.module
        states = {"optimizer": self.optimizer, "schedule": self.schedule}
        if self.accelerator.scaler is not None:
            states["scaler"] = self.accelerator.scaler
        return models, states

    def _agree(self, request: StopRequest) -> bool:
        """Whether any process was asked to stop, so that all stop after the same step."""
        if self.accelerator.num_processes == 1:
            return bool(request)
        asked = torch.tensor(float(bool(request)), device=self.accelerator.device)
        return bool(self.accelerator.reduce(asked, "sum") > 0)

    # ---- beginning and end

    def _build_vae(self) -> AutoencoderKL:
        """The network to train, in fp32 on the device."""
        vae = initial_vae(self.config)
        if self.config.data.size % vae.factor:
            raise UserError(f"data.size is {self.config.data.size}, it must be a multiple of the factor {vae.factor}.")
        if self.config.model.gradient_checkpointing:
            vae.enable_gradient_checkpointing()
        return vae.to(self.accelerator.device, memory_format=self._memory_format).train()

    def _build_objective(self) -> Objective:
        """The loss; crops too small for its perceptual term are refused before anything is written."""
        objective = Objective(self.config.loss)
        if objective.perceptual is not None:
            side = self.config.data.size
            objective.perceptual.require_size(side, side)
        return objective.to(self.accelerator.device)

    def _load_validation_photos(self) -> torch.Tensor | None:
        data = self.config.data
        if data.validation is None:
            return None
        source = open_source(data.validation, image_column=data.image_column)
        return load_photos(source, self.config.num_validation_images, data.size)

    def _loader(self) -> Any:
        return training_loader(
            self.source,
            self.config.data,
            batch_size=self.config.batch_size,
            seed=self.config.seed,
            start=self.progress.samples,
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
            pin_memory=self.accelerator.device.type == "cuda",
        )

    def _start(self) -> None:
        """Make the run folder and say what will run."""
        config = self.config
        self.accelerator.wait_for_everyone()  # until every process has looked at what is there
        if not self._is_main:
            return
        make_run_folder(self.folder, is_new=self.is_new)
        save_recipe(with_absolute_paths(config), self.folder / "config.yaml")
        processes = self.accelerator.num_processes
        num_trained = sum(parameter.numel() for parameter in self.parameters)
        logger.info(
            f"{processes} process{'es' if processes > 1 else ''} on {self.accelerator.device}, precision "
            f"{config.mixed_precision}; {num_trained:,} of {self.vae.num_parameters():,} parameters train on "
            f"{len(self.source):,} pictures; steps {self.progress.step} to {config.steps}, "
            f"{self._samples_per_step} pictures each"
        )
        if self.photos is None:
            logger.info("no validation photos: set data.validation to see reconstructions and PSNR on the way")

    def _finish(self) -> RunResult:
        """Save the VAE with its scale, its provenance, the model card and the report."""
        progress = self._noted()
        if not self._is_main:
            return RunResult(folder=self.folder, report={})
        vae = AutoencoderKL.from_diffusers(self._best_vae())  # the same weights, a config of its own
        source = self._set_scale(vae)
        if progress.unreadable:
            num_unreadable = len(progress.unreadable)
            logger.warning("%d pictures could not be read and were left out, listed in report.json", num_unreadable)
        report = {
            "step": progress.step,
            "samples": progress.samples,
            "scaling_factor": float(vae.config.scaling_factor),
            "shift_factor": vae.config.shift_factor,
            "scaling_factor_source": source,
            "validation": progress.validation,
            "unreadable": list(progress.unreadable),
            "versions": versions(),
        }
        return write_result(self.config, vae, report)

    def _set_scale(self, vae: AutoencoderKL) -> str:
        """Give a VAE that began with random weights the scale and shift of its own latents; say where they are from."""
        if self.config.model.scaling_factor == "keep" or self.config.model.pretrained:
            return "kept"
        photos = load_photos(self.source, NUM_SCALING_PHOTOS, self.config.data.size)
        mean, std = latent_moments(vae, photos, self.accelerator.device)
        shift = None if vae.config.shift_factor is None else mean
        vae.register_to_config(scaling_factor=1.0 / std, shift_factor=shift)
        return f"1 / standard deviation of the latents of {len(photos)} training photos"

    def _noted(self) -> Progress:
        """The progress with the unreadable pictures that any process has met."""
        names = gather_object(list(self.unreadable)) if self.accelerator.num_processes > 1 else self.unreadable
        return dataclasses.replace(self.progress, unreadable=tuple(dict.fromkeys(names)))

    # ---- small facts

    @property
    def _is_main(self) -> bool:
        return bool(self.accelerator.is_main_process)

    @property
    def _samples_per_step(self) -> int:
        config = self.config
        return config.batch_size * config.gradient_accumulation_steps * int(self.accelerator.num_processes)

    @property
    def _memory_format(self) -> torch.memory_format:
        return torch.channels_last if self.config.model.channels_last else torch.contiguous_format

    def _best_vae(self) -> AutoencoderKL:
        """The weights that are validated and saved: averaged where there is an average."""
        return self.vae if self.ema is None else self.ema.module

    def _note_unreadable(self, names: list[str]) -> None:
        for name in names:
            if name not in self.unreadable:
                logger.warning("left out: %s", name)
                self.unreadable[name] = None
