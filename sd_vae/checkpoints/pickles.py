"""PyTorch files without running what is in them.

A `.ckpt` is a pickle, and a pickle is a program. `torch.load(weights_only=True)` runs none of it and is tried first.
Old Lightning files fail there because they carry callbacks and configs among the tensors; for them, an unpickler in
which tensors, containers and numbers are real and every other global becomes an inert class of ours. What such a name
stood for is neither imported nor called, whatever the pickle asks for.
"""

from __future__ import annotations

import pickle
import warnings
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from sd_vae.errors import UserError

__all__ = ["Inert", "load_pickle"]

_BUILTINS = (dict, list, set, frozenset, tuple, int, float, bool, complex)
_CONTAINERS = {
    ("collections", "OrderedDict"): OrderedDict,
    # torch writes protocol 2, in which builtins carry their Python 2 name.
    **{(module, kind.__name__): kind for kind in _BUILTINS for module in ("builtins", "__builtin__")},
}


class Inert:
    """Stands for a global that is not loaded: takes every use that a pickle can make of it, and does nothing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Inert:
        """Return an instance whatever the arguments."""
        return object.__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Forget the arguments."""

    def __call__(self, *args: Any, **kwargs: Any) -> Inert:
        """Return itself: a call of what a call has returned."""
        return self

    def _forget(self, *args: Any) -> None:
        """Take part in BUILD, SETITEMS, APPENDS and ADDITEMS."""

    __setstate__ = __setitem__ = append = extend = add = _forget


def load_pickle(path: Path, *, is_zip: bool) -> tuple[Any, tuple[str, ...]]:
    """Return what `torch.save` put into a file, and the names of the globals that were left out of it.

    Args:
        path: File.
        is_zip: In the format of torch 1.6 and later, which is mapped into memory and read where it is touched.

    Raises:
        UserError: The file is damaged, or holds a TorchScript program.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about what stands in the file; what matters of it is said by our errors
            return _load(path, is_zip=is_zip)
    except Exception as error:  # a damaged pickle raises whatever its bytes happen to spell
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UserError(f"{path} is a damaged PyTorch file ({reason[:120]}); download or copy it again.") from error


def _load(path: Path, *, is_zip: bool) -> tuple[Any, tuple[str, ...]]:
    import torch

    mmap = is_zip or None
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap), ()
    except pickle.UnpicklingError:
        module, dropped = _restricted_pickle()
        value = torch.load(path, map_location="cpu", weights_only=False, pickle_module=module, mmap=mmap)
        return value, tuple(sorted(dropped))


def _restricted_pickle() -> tuple[ModuleType, set[str]]:
    """A stand-in for the module `pickle` to hand to torch, and the set of names that it has left out so far."""
    dropped: set[str] = set()
    real = _real_globals()

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            if (module, name) in real:
                return real[module, name]
            dropped.add(f"{module}.{name}")
            return type(name, (Inert,), {"__module__": module})

    def load(file: Any, **settings: Any) -> Any:
        return Unpickler(file, **settings).load()

    module = ModuleType("sd_vae_restricted_pickle")
    vars(module).update(Unpickler=Unpickler, load=load)
    return module, dropped


def _real_globals() -> dict[tuple[str, str], Any]:
    """What a tensor is rebuilt from, and plain containers and numbers."""
    import torch

    rebuilders = ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_parameter")
    dtypes = {name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
    return {
        **_CONTAINERS,
        **{("torch._utils", name): _shield(getattr(torch._utils, name)) for name in rebuilders},
        **{("torch", name): dtype for name, dtype in dtypes.items()},
        ("torch", "Size"): torch.Size,
        ("torch", "device"): torch.device,
    }


def _shield(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` behind a fresh one, because a pickle may set attributes of what it finds."""
    return lambda *args: function(*args)
