"""What stands between a module and its weights: hooks that must run, weights that are somewhere else.

An operation that reads `module.weight` instead of calling the module skips whatever others have hung on the call:
forward hooks, accelerate's and diffusers' offloading, an adapter that took the module's place.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

__all__ = ["hooked", "is_plain", "onloaded", "pads_zeros", "watched"]


def is_plain(module: Any, kind: type[nn.Module]) -> bool:
    """Whether a module is exactly of this kind and calling it would do nothing else."""
    return type(module) is kind and not hooked(module)


def hooked(module: nn.Module) -> bool:
    """Whether something is hung on the module's call: hooks, an offloader, a compiled or replaced forward."""
    attributes = module.__dict__
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in attributes
        or "_conv_forward" in attributes
        or "_hf_hook" in attributes
        or "_diffusers_hook" in attributes
        or module._compiled_call_impl is not None
        or nn.modules.module._global_forward_hooks
        or nn.modules.module._global_forward_pre_hooks
        or nn.modules.module._global_backward_hooks
        or nn.modules.module._global_backward_pre_hooks
    )


def watched(module: nn.Module) -> bool:
    """Whether a forward hook or another forward waits for the module's call, the offloader of `onloaded` left out."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or ("forward" in module.__dict__ and not hasattr(module, "_hf_hook"))
        or nn.modules.module._global_forward_hooks
        or nn.modules.module._global_forward_pre_hooks
    )


def pads_zeros(conv: nn.Conv2d) -> bool:
    """Whether zeros surround what a convolution sees; seamless textures are made by padding in a circle."""
    return conv.padding_mode == "zeros" and "_conv_forward" not in conv.__dict__


@contextmanager
def onloaded(module: nn.Module) -> Iterator[None]:
    """The module's weights where its offloading hook would bring them for a call."""
    if not hasattr(module, "_hf_hook"):
        yield
        return
    from accelerate.utils import align_module_device

    with align_module_device(module):
        yield
