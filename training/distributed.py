"""The only place that configures Accelerate, and the signals that end a run politely."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import FrameType

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import GradientAccumulationPlugin, broadcast_object_list

from sd_vae.errors import UserError
from sd_vae.latents.processes import Processes
from sd_vae.losses import choose_net

from .config import TrainConfig

__all__ = ["StopRequest", "build_accelerator", "processes_of", "stop_on_signals", "with_perceptual_net"]


def build_accelerator(config: TrainConfig) -> Accelerator:
    """Return the process's Accelerator: devices and processes as the launcher says, precision as the config says.

    Raises:
        UserError: fp16 without a GPU, whose gradients it could not scale; or a launcher that splits the weights.
    """
    for variable in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_MEGATRON_LM"):
        if os.environ.get(variable, "false").lower() in ("1", "true", "yes"):
            raise UserError(
                f"{variable} is set, and weights that are split over devices are not offered: a VAE fits on one. "
                "Choose plain multi-GPU in `accelerate config`; for memory, set model.gradient_checkpointing true."
            )
    if config.mixed_precision == "fp16" and not torch.cuda.is_available():
        raise UserError("mixed_precision is fp16, which needs a GPU; choose bf16 or no.")
    AcceleratorState._reset_state()  # a second run in one process may choose another precision
    return Accelerator(
        # Without this, processes that torchrun starts on CPUs would each train alone.
        cpu=not torch.accelerator.is_available(),
        mixed_precision=config.mixed_precision,
        # A plugin, because the plain argument gives way to an environment variable.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=config.gradient_accumulation_steps),
    )


def with_perceptual_net(config: TrainConfig, accelerator: Accelerator) -> TrainConfig:
    """Return the config with the network of its perceptual term named; the main process chooses, so that all agree."""
    chosen = [config.loss.perceptual]
    if accelerator.is_main_process:
        chosen = [choose_net(config.loss.perceptual)]
    broadcast_object_list(chosen)
    return replace(config, loss=replace(config.loss, perceptual=chosen[0]))


def processes_of(accelerator: Accelerator) -> Processes:
    """Return the processes that train together, for work that they share."""
    return Processes(
        rank=accelerator.process_index,
        count=accelerator.num_processes,
        local_rank=accelerator.local_process_index,
    )


class StopRequest:
    """Whether a signal has asked the run to save and stop."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    def __bool__(self) -> bool:
        return self.signal is not None


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Yield a flag that the first SIGINT or SIGTERM sets; a second SIGINT interrupts at once.

    The handlers that were there come back at the end. Off the main thread, where Python allows none, nothing is set.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def ask(number: int, frame: FrameType | None) -> None:
        if request and number == signal.SIGINT:
            raise KeyboardInterrupt
        request.signal = signal.Signals(number)

    previous = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
