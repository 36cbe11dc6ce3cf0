"""The training loop: a recipe in, a run folder out.

`Trainer` reads top to bottom: build, then fit (step, log, validate, save), then finish. Every picture, crop, flip and
noise is a function of (seed, epoch, sample), so a run is its config plus one number, the samples consumed; that is why
resuming is exact. What one step does to the networks is in `update.py`.

A run folder: `config.yaml` (resolved), `metrics.jsonl`, `samples/`, `checkpoints/`, `vae/` (a diffusers folder, EMA
weights where there are any), `evaluation/`, `report.json`.
"""

import dataclasses
import logging
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from sd_vae.autoencoder import AutoencoderKL
from sd_vae.data import Batch
from sd_vae.errors import UserError
from sd_vae.losses import Objective

from .adversary import smallest_side
from .certificate import LatentSpace
from .checkpoint import Progress, load_checkpoint, newest_checkpoint, save_checkpoint
from .collapse import CollapseMonitor
from .config import TrainConfig, load_recipe, save_recipe
from .data import TrainingData
from .distributed import StopRequest, build_accelerator, processes_of, stop_on_signals, with_perceptual_net
from .ema import EMA
from .lora import save_adapter
from .model import initial_vae, plain_vae, prepare_training_, set_scale_
from .publishing import push, require_login
from .records import MetricsLog, loss_terms, versions
from .rehearsal import memory_errors
from .run_folder import (
    RunLock,
    RunResult,
    is_better,
    make_run_folder,
    require_new_run,
    save_best,
    unfinished,
    with_absolute_paths,
    write_result,
)
from .throughput import Throughput, training_flops
from .update import Update, UpdateResult
from .validation import Evaluate, Evaluated, save_picture, validate

__all__ = ["Trainer", "resume", "train"]

logger = logging.getLogger(__name__)

COLLAPSE_PATIENCE = 100
"""Steps at least before a latent channel that says nothing is a warning."""


def train(config: TrainConfig | str | Path, *, overwrite: bool = False, evaluate: Evaluate | None = None) -> RunResult:
    """Train a VAE and return where it is.

    Args:
        config: The run, or a recipe's path or shipped name.
        overwrite: Replace a run that is in the config's `out`.
        evaluate: Measures validation photos, such as `eval.validation.Validator`; without it only the loss is told.

    Raises:
        UserError: Something about config, data, weights or the folder that the user can mend.
        KeyboardInterrupt: SIGINT or SIGTERM came; a checkpoint has been written.
    """
    config = config if isinstance(config, TrainConfig) else load_recipe(config)
    config.require_complete()
    return Trainer(config, overwrite=overwrite, evaluate=evaluate).fit()


def resume(folder: str | Path, *, evaluate: Evaluate | None = None) -> RunResult:
    """Go on with an interrupted run from its newest checkpoint; nothing but its folder is needed.

    Args:
        folder: The run.
        evaluate: As for `train`.

    Raises:
        UserError: The folder is no run, has no checkpoint, or is finished.
    """
    config = unfinished(Path(folder))
    return Trainer(config, checkpoint=newest_checkpoint(Path(folder) / "checkpoints"), evaluate=evaluate).fit()


class Trainer:
    """One run, built but not started.

    Args:
        config: The run.
        checkpoint: Where to go on from; None starts anew.
        overwrite: Replace the run that is in the config's `out`.
        evaluate: As for `train`.
    """

    def __init__(
        self,
        config: TrainConfig,
        *,
        checkpoint: Path | None = None,
        overwrite: bool = False,
        evaluate: Evaluate | None = None,
    ) -> None:
        self.evaluate = evaluate
        self.folder = Path(config.out)
        self.is_new = checkpoint is None
        if self.is_new:
            require_new_run(config, overwrite=overwrite)
        require_login(config.report)
        self.accelerator = build_accelerator(config)
        config = self.config = with_perceptual_net(config, self.accelerator)
        self.data = TrainingData(config, self.accelerator)
        self.photos = self.data.photos
        self.vae = self._build_vae()
        self.objective = self._build_objective()
        self.parameters = prepare_training_(self.vae, config.model, seed=config.seed)
        self.latent_space = self._note_latent_space()
        self.ema = EMA(self.vae, config.ema_decay) if config.ema_decay else None
        self.update = Update(self.accelerator, config, self.vae, self.objective)
        kl = config.loss.kl
        self.monitor = CollapseMonitor(max(COLLAPSE_PATIENCE, kl.warmup_steps, kl.cycle_steps))
        self.skipped_in_a_row = 0
        self.progress = Progress(step=0, samples=0, num_pictures=len(self.data.source))
        if checkpoint is not None:
            self._load(checkpoint)

    def fit(self) -> RunResult:
        """Run to the last step, save the VAE and return where it is."""
        config, accelerator = self.config, self.accelerator
        if config.speed.rehearse and accelerator.device.type != "cpu":  # a CPU's memory ends without an error
            self.update.rehearse()
        lock = self._start()
        try:
            self._run()
            result = self._finish()
        finally:
            lock.release()
        push(config.report, result)
        return result

    def _run(self) -> None:
        """Take all steps."""
        config, accelerator = self.config, self.accelerator
        log = MetricsLog(self.folder, config, step=self.progress.step) if self._is_main else None
        self.throughput = Throughput(
            None if accelerator.device.type == "cpu" else training_flops(self.vae, config.data.size),
            *(accelerator.device, accelerator.num_processes, self.progress.samples),
        )
        bar = tqdm(
            total=config.steps * self._samples_per_step,
            initial=self.progress.samples,
            unit="image",
            disable=not self._is_main,
            smoothing=0.05,
        )
        try:
            with stop_on_signals() as stop_request, bar, memory_errors(config):
                batches = self.data.batches(self.progress.samples)
                while self.progress.step < config.steps:
                    result = self._step(batches)
                    step = self.progress.step
                    bar.update(self._samples_per_step)
                    stopping = self._agree(stop_request)
                    if step % config.log_every == 0 or step == config.steps or stopping:
                        values = self._log(log, result)
                        bar.set_postfix_str(loss_terms(values))
                    validates = step % config.validate_every == 0 or step == config.steps
                    if self.photos is not None and validates and not self.skipped_in_a_row:
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

    # ---- one step

    def _step(self, batches: Iterator[Batch]) -> UpdateResult:
        """Take one optimizer step and advance everything that goes with it."""
        done = self.progress
        result = self.update(list(islice(batches, self.config.gradient_accumulation_steps)), done.step)
        if self.ema is not None:
            self.ema.update_parameters(self.vae)
        self.progress = dataclasses.replace(
            done,
            step=done.step + 1,
            samples=done.samples + self._samples_per_step,
            skipped=done.skipped + (not result.is_taken),
        )
        self._require_finite(result)
        return result

    def _require_finite(self, result: UpdateResult) -> None:
        """End the run after too many updates in a row that were not taken, or when the last one was not.

        Raises:
            UserError: Names the last good checkpoint.
        """
        if result.is_taken:
            self.skipped_in_a_row = 0
            return
        self.skipped_in_a_row += 1
        step = self.progress.step
        logger.warning("step %d is not taken: its loss or gradient is not finite", step)
        # At the scale that half precision tries, an overflow now and then is no sign of anything.
        is_end = step == self.config.steps and self.accelerator.scaler is None
        if is_end or self.skipped_in_a_row == self.config.max_skipped_steps:
            raise self._diverged(f"{self.skipped_in_a_row} updates in a row had a loss or gradient that is not finite")

    # ---- what happens at intervals

    def _log(self, log: MetricsLog | None, result: UpdateResult) -> dict[str, float]:
        """Write a step's terms, means over processes, and return them."""
        means = {name: float(self.accelerator.reduce(value, "mean")) for name, value in result.terms.items()}
        channels = self.monitor.rows(self.accelerator.reduce(result.channels, "mean"), self.progress.step)
        samples = self.progress.samples
        rates = self.throughput.rows(samples)  # after the values above have come from the device
        values = {"samples": samples, **means, "lr": self.update.mover.lr, **rates, **channels}
        if self.progress.skipped:
            values["skipped_steps"] = self.progress.skipped
        if log is not None:
            log.write(self.progress.step, values)
        return means

    def _validate(self, log: MetricsLog | None) -> None:
        """Reconstruct the validation photos with the weights that will be saved, and measure them in all processes."""
        evaluated = self._evaluate(self._best_vae())
        if log is None or self.photos is None:
            return
        values, picture = validate(self._best_vae(), self.objective, self.photos, self.accelerator.device)
        values |= {} if evaluated is None else evaluated.values
        before, metric = self.progress, self.config.report.best_metric
        self.progress = dataclasses.replace(before, validation=values)
        save_picture(picture, self.folder / "samples" / f"step-{before.step:07d}.png")
        log.write(before.step, {f"validation/{name}": value for name, value in values.items()}, picture)
        if metric is not None and is_better(metric, values, before.best):
            save_best(self.folder, plain_vae(self._best_vae()), metric, values, before.step)
            self.progress = dataclasses.replace(self.progress, best=values[metric])

    def _evaluate(self, vae: AutoencoderKL, folder: Path | None = None) -> Evaluated | None:
        """Measure a VAE on the validation photos, in its share of this process; None where nothing is to measure."""
        if self.evaluate is None or self.data.validation is None:
            return None
        return self.evaluate(vae, self.data.validation, processes=processes_of(self.accelerator), folder=folder)

    def _save(self) -> None:
        """Write a checkpoint.

        Raises:
            UserError: Weights are not finite, so that nothing could go on from it.
        """
        if not all(bool(parameter.isfinite().all()) for parameter in self.parameters):
            raise self._diverged("weights are not finite")
        progress = self.data.noted(self.progress)
        if self._is_main:
            models, states = self._state()
            folder = self.folder / "checkpoints"
            save_checkpoint(folder, progress, models, states, keep=self.config.keep_checkpoints)
        self.accelerator.wait_for_everyone()

    def _diverged(self, what: str) -> UserError:
        remedy = "lower optim.lr or use mixed_precision no or bf16"
        if any((self.folder / "checkpoints").glob("step-*")):
            good = newest_checkpoint(self.folder / "checkpoints").name
            remedy += f" in {self.folder / 'config.yaml'}, and go on from the last good checkpoint, {good}: "
            remedy += f"--resume {self.folder}"
        else:
            remedy += ", and start anew with --overwrite"
        return UserError(f"{what} at step {self.progress.step}; {remedy}.")

    def _load(self, path: Path) -> None:
        models, states = self._state()
        self.progress = load_checkpoint(path, models, states)
        self.data.go_on_from(self.progress)
        if self.ema is not None:
            self.ema.n_averaged.fill_(self.progress.step)

    def _state(self) -> tuple[dict[str, torch.nn.Module], dict[str, Any]]:
        """Everything a checkpoint holds: models by file name, the rest by key."""
        models: dict[str, torch.nn.Module] = {"model": self.vae}
        if self.ema is not None:
            models["ema"] = self.ema.module
        others, states = self.update.state()
        if self.accelerator.scaler is not None:
            states["scaler"] = self.accelerator.scaler
        return models | others, states

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
        memory_format = torch.channels_last if self.config.model.channels_last else torch.contiguous_format
        return vae.to(self.accelerator.device, memory_format=memory_format).train()

    def _build_objective(self) -> Objective:
        """The loss; crops too small for its perceptual term are refused before anything is written."""
        objective = Objective(self.config.loss)
        if objective.perceptual is not None:
            side = smallest_side(self.config)
            objective.perceptual.require_size(side, side)
        return objective.to(self.accelerator.device)

    def _note_latent_space(self) -> LatentSpace | None:
        """The latent space of other weights before they train, on the process that writes the report."""
        if not self._is_main or self.config.model.pretrained is None:
            return None
        photos = self.data.first_photos(self.config.num_validation_images) if self.photos is None else self.photos
        is_asked = self.config.loss.equivariance.probability > 0
        return LatentSpace(self.vae, photos, self.accelerator.device, equivariance=is_asked)

    def _start(self) -> RunLock:
        """Make the run folder, keep others out of it and say what will run."""
        config = self.config
        self.accelerator.wait_for_everyone()  # until every process has looked at what is there
        lock = RunLock(self.folder)
        if not self._is_main:
            return lock
        make_run_folder(self.folder, lock, is_new=self.is_new)
        save_recipe(with_absolute_paths(config), self.folder / "config.yaml")
        processes = self.accelerator.num_processes
        num_trained = sum(parameter.numel() for parameter in self.parameters)
        logger.info(
            f"{processes} process{'es' if processes > 1 else ''} on {self.accelerator.device}, precision "
            f"{config.mixed_precision}; {num_trained:,} of {self.vae.num_parameters():,} parameters train on "
            f"{self.data.described}; steps {self.progress.step} to {config.steps}, "
            f"{self._samples_per_step} pictures each"
        )
        if self.photos is None:
            logger.info("no validation photos: set data.validation to see and measure reconstructions on the way")
        return lock

    def _finish(self) -> RunResult:
        """Save the VAE with its scale, its provenance, the model card and the report."""
        progress = self.data.noted(self.progress)
        vae = plain_vae(self._best_vae())
        evaluated = self._evaluate(vae, self.folder / "evaluation")
        if not self._is_main:
            return RunResult(folder=self.folder, report={})
        source = set_scale_(vae, self.config.model, self.data.first_photos, self.accelerator.device)
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
            "skipped_steps": progress.skipped,
            "latents": None if self.latent_space is None else self.latent_space.compare(vae),
            "unreadable": list(progress.unreadable),
            "rejects": progress.rejects,
            "retries": progress.retries,
            "best": progress.best,
            "versions": versions(),
        }
        save_adapter(self._best_vae(), self.config)
        return write_result(self.config, vae, report, evaluated)

    # ---- small facts

    @property
    def _is_main(self) -> bool:
        return bool(self.accelerator.is_main_process)

    @property
    def _samples_per_step(self) -> int:
        config = self.config
        return config.batch_size * config.gradient_accumulation_steps * int(self.accelerator.num_processes)

    def _best_vae(self) -> AutoencoderKL:
        """The weights that are validated and saved: averaged where there is an average."""
        return self.vae if self.ema is None else self.ema.module
