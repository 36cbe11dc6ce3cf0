"""What `AutoencoderKL.compile` does: encode and decode both run compiled, and what they return stays the caller's.

`torch.compile(vae)` and `nn.Module.compile` compile `forward`, which pipelines never call. Here the encoder and the
decoder are compiled instead, in place: modules, parameters, state_dict keys and config are untouched, and copies and
pickles are of the plain model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sd_vae.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from sd_vae.autoencoder import AutoencoderKL

__all__ = ["compile_halves"]


def compile_halves(vae: AutoencoderKL, **options: Any) -> None:
    """Compile `vae.encoder` and `vae.decoder` in place; the next call of each does the work, minutes on a GPU.

    On a CUDA device the weights are put into channels_last and the mode is "reduce-overhead" unless `options` choose
    otherwise: a decode launches some hundred kernels, and CUDA graphs launch them at once. Graphs keep their feature
    maps between calls and are recorded again for each new size; with many sizes, or little memory, pass
    mode="default". Once a second height and a second width have been seen they are symbolic, and further sizes compile
    nothing; a batch of one is compiled apart from larger ones. Hooks that are registered before the first call run;
    torch.compile may pass over ones that come later.

    Args:
        vae: The model.
        options: Those of `torch.compile`.

    Raises:
        UserError: Options that `torch.compile` does not take; nothing is compiled then.
    """
    import torch

    if vae.device.type == "cuda":
        vae.to(memory_format=torch.channels_last)
        if not options.keys() & {"mode", "options", "backend"}:
            options["mode"] = "reduce-overhead"
    halves = (vae.encoder, vae.decoder)
    try:
        calls = [torch.compile(half._call_impl, **options) for half in halves]
    except (RuntimeError, TypeError) as error:
        raise UserError(f"torch.compile does not take {options}: {str(error).splitlines()[0]}") from error
    for half, call in zip(halves, calls, strict=True):
        # What `half.compile` sets, with its result copied; pickling and copying leave this attribute out.
        half._compiled_call_impl = _own_result(call)


def _own_result(call: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`call` with its result copied: a CUDA graph writes into the same memory at every replay."""

    def run(*args: Any, **kwargs: Any) -> Tensor:
        return call(*args, **kwargs).clone()

    return run
