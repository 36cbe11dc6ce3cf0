"""A few threads for the compiled kernels, which let go of the interpreter while they run.

As many as PyTorch uses for one operation, the caller among them, so `torch.set_num_threads` and OMP_NUM_THREADS mean
here what they mean there. A forked child starts its own.
"""

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait

import torch

__all__ = ["num_threads", "run_together"]

_helpers: ThreadPoolExecutor | None = None
_num_helpers = 0


def num_threads() -> int:
    """Threads that `run_together` uses."""
    return torch.get_num_threads()


def run_together(work: Callable[[int], None]) -> None:
    """Run work(0), work(1), ... at once, one a thread, and return when all are done; the first error is raised."""
    count = num_threads()
    if count == 1:
        return work(0)
    pending: list[Future[None]] = []
    try:
        pending += [_executor(count - 1).submit(work, index) for index in range(1, count)]
        work(0)
    finally:
        _finish(pending)
    for future in pending:
        future.result()
    return None


def _finish(pending: list[Future[None]]) -> None:
    """Wait for helpers, who write into the caller's memory, whatever comes in between; then raise it."""
    try:
        wait(pending)
    except BaseException:
        _finish(pending)
        raise


def _executor(size: int) -> ThreadPoolExecutor:
    """The helpers, at least `size` of them."""
    global _helpers, _num_helpers
    if _helpers is None or _num_helpers < size:
        _helpers, _num_helpers = ThreadPoolExecutor(size, thread_name_prefix="sd_vae"), size
    return _helpers


def _forget() -> None:
    """In a forked child: the parent's threads are not here."""
    global _helpers
    _helpers = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
