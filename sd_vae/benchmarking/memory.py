"""Peak memory of one encode or decode above the loaded weights, each measured where nothing else has run.

On the CPU a process of its own loads the model, notes what it holds, runs once and asks the system for the most it
held; libraries and kernels that the first run brings in count. On a GPU PyTorch's allocator keeps the record.
"""

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch

from sd_vae.autoencoder import AutoencoderKL
from sd_vae.benchmarking.inputs import caller, random_input
from sd_vae.config import VAEConfig
from sd_vae.errors import UserError

__all__ = ["Way", "in_fresh_process", "peak_memory"]

T = TypeVar("T")
Way = Literal["ours", "diffusers"]
GIB = 2**30


def peak_memory(
    vae: AutoencoderKL, way: Way, action: Literal["encode", "decode"], height: int, width: int
) -> float | None:
    """Return the peak above the loaded weights in GiB, input and result included; None where the system does not tell.

    Args:
        vae: Says which architecture, dtype and device; on the CPU the weights are others, at random, which changes no
            size.
        way: Our model, or diffusers' of the same config.
        action: Which half.
        height: Pixels.
        width: Pixels.

    Raises:
        UserError: The system ended the process, as it does when memory runs out.
    """
    if vae.device.type == "cuda":
        return _peak_on_gpu(vae, way, action, height, width)
    config = VAEConfig.from_dict(dict(vae.config), source="the model")
    try:
        return in_fresh_process(
            _peak_of_process, config.to_dict(), vae.dtype, way, action, height, width, torch.get_num_threads()
        )
    except BrokenProcessPool:
        raise UserError(
            f"the system ended the process that measured the memory of {action} at {height}x{width} in {way}, most "
            "likely because memory ran out; leave that size out, or close other programs."
        ) from None


def in_fresh_process(function: Callable[..., T], *arguments: Any) -> T:
    """Return function(*arguments), computed in a process that has run nothing else; what it raises is raised here.

    Raises:
        BrokenProcessPool: The process was ended from outside.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def _peak_of_process(
    config: dict[str, Any],
    dtype: torch.dtype,
    way: Way,
    action: Literal["encode", "decode"],
    height: int,
    width: int,
    num_threads: int,
) -> float | None:
    """`peak_memory` of a process that has run nothing else."""
    torch.set_num_threads(num_threads)
    vae = AutoencoderKL(**config).eval().type(dtype)
    call = caller(vae if way == "ours" else vae.to_diffusers(), action)
    before = _restart_high_water()
    if before is None:
        return None
    with torch.no_grad():
        call(random_input(vae, action, height, width))
    return (_status_bytes("VmHWM") - before) / GIB


def _peak_on_gpu(vae: AutoencoderKL, way: Way, action: Literal["encode", "decode"], height: int, width: int) -> float:
    call = caller(vae if way == "ours" else vae.to_diffusers(), action)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(vae.device)
    before = torch.cuda.memory_allocated(vae.device)
    with torch.no_grad():
        call(random_input(vae, action, height, width))
    return (torch.cuda.max_memory_allocated(vae.device) - before) / GIB


def _restart_high_water() -> int | None:
    """Bytes that this process holds, from which its high-water mark starts over; None where only Linux could tell."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    return _status_bytes("VmRSS")


def _status_bytes(field: str) -> int:
    """A figure of /proc/self/status, which counts in KiB."""
    lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":")) * 1024
