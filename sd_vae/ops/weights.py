"""Winograd's transformed weights, four times the size of the plain ones, kept between inference calls within a budget.

What is kept is found by the weight's address and trusted only if the weight's bytes still have the fingerprint they
had: an optimiser, a fused LoRA or anything else that writes into a weight is seen however it wrote, at a hundredth of
a convolution's cost. Nothing is kept in training mode or while gradients are on. What is kept first stays until its
weight dies: a network runs its layers in a circle, and where they do not all fit, the oldest is the next to be needed.
"""

import threading
import weakref

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sd_vae.ops import kernels
from sd_vae.ops.threads import run_together
from sd_vae.ops.workspace import Workspace

__all__ = ["BUDGET_BYTES", "forget", "held_bytes", "set_budget", "transformed"]

BYTES_PER_WEIGHT = 16  # 36 points for 9 taps
BUDGET_BYTES = 256 * 2**20
"""Kept at most, unless `set_budget` says otherwise."""

Points = npt.NDArray[np.float32]  # (C_out / PANEL, 36, C_in, PANEL)
Key = tuple[int, tuple[int, ...], tuple[int, ...]]

_budget_bytes = BUDGET_BYTES
_kept: dict[Key, tuple[int, Points]] = {}
_owners: dict[Key, weakref.ref[Tensor]] = {}  # a weight that dies takes its entry along
_lock = threading.Lock()


def set_budget(num_bytes: int) -> None:
    """Keep at most this much of transformed weights between calls; 0 keeps nothing."""
    global _budget_bytes
    _budget_bytes = num_bytes
    with _lock:
        while _kept and held_bytes() > _budget_bytes:
            _discard(next(reversed(_kept)))


def held_bytes() -> int:
    """Transformed weights kept now."""
    return sum(points.nbytes for _, points in list(_kept.values()))


def forget(weights: "list[Tensor] | None" = None) -> None:
    """Drop what is kept for these weights, or everything."""
    wanted = None if weights is None else {id(weight) for weight in weights}
    with _lock:
        for key, owner in list(_owners.items()):
            if wanted is None or id(owner()) in wanted:
                _discard(key)


def transformed(weight: Tensor, workspace: Workspace | None, *, keep: bool) -> Points:
    """Return G w G^T of weights (C_out, C_in, 3, 3), fp32, in the kernels' order (C_out/PANEL, 36, C_in, PANEL).

    Args:
        weight: Any strides; the tensor that the module owns, as what is kept goes when it does.
        workspace: Where to put what is not kept, good until the next call; None allocates.
        keep: Whether it may be kept for the next call.
    """
    plain = weight.detach()
    if not keep:
        return _transform(plain, workspace)
    key = _key(weight)
    if key not in _kept and held_bytes() + weight.numel() * BYTES_PER_WEIGHT > _budget_bytes:
        return _transform(plain, workspace)
    mark = _fingerprint(plain)
    with _lock:
        found = _kept.get(key)
        if found is not None and found[0] == mark:
            return found[1]
        _discard(key)
    points = _transform(plain, None)
    with _lock:
        if held_bytes() + points.nbytes <= _budget_bytes:
            _kept[key] = (mark, points)
            _owners[key] = weakref.ref(weight, lambda _: _discard(key))
    return points


def _discard(key: Key) -> None:
    _kept.pop(key, None)
    _owners.pop(key, None)


def _key(weight: Tensor) -> Key:
    return weight.data_ptr(), tuple(weight.shape), tuple(weight.stride())


def _fingerprint(weight: Tensor) -> int:
    flat = weight if weight.is_contiguous() else weight.contiguous()
    return int(kernels.fingerprint(flat.view(-1).view(torch.int32).numpy().view(np.uint32)))


def _transform(weight: Tensor, workspace: Workspace | None) -> Points:
    shape = (weight.shape[0] // kernels.PANEL, 36, weight.shape[1], kernels.PANEL)
    room = torch.empty(shape) if workspace is None else workspace.scratch("weights", shape, torch.float32)
    if room.is_meta:
        return np.empty((0, *shape[1:]), np.float32)
    counter, plain, points = np.zeros(1, np.int64), weight.numpy(), room.numpy()
    run_together(lambda _: kernels.transform_weights(counter.ctypes.data, plain, points))
    return points
