"""What a latent depends on besides its picture: the encoder's weights, and the machine that ran them."""

from __future__ import annotations

import hashlib
import platform
import re
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from sd_vae.errors import UserError
from sd_vae.latents.format import Numerics

if TYPE_CHECKING:
    import torch

__all__ = ["decoder_fingerprint", "encoder_fingerprint", "numerics_of", "tensors_fingerprint"]

_LIBRARIES = ("sd-vae", "torch", "numpy", "pillow", "pyarrow", "safetensors")
"""Libraries whose version may change a byte of a store: they decode, compute or write."""


def encoder_fingerprint(vae: torch.nn.Module) -> str:
    """Return the sha256 of the weights that encoding reads, in hexadecimal.

    Over the tensors of `encoder` and `quant_conv` in the order of their names: name, dtype, shape and the numbers in
    row-major order, little-endian. The decoder, the device and the memory layout leave it as it is; another dtype does
    not, because it encodes to other numbers.

    Raises:
        UserError: The VAE has no encoder, or its weights are not loaded.
    """
    return _digest(vae, ("encoder.", "quant_conv."))


def decoder_fingerprint(vae: torch.nn.Module) -> str:
    """Return the sha256 of the weights that decoding reads, in hexadecimal.

    As `encoder_fingerprint`, over `decoder` and `post_quant_conv`, but of the numbers as float32: weights in half
    precision and the same numbers in full precision are one decoder.

    Raises:
        UserError: The VAE has no decoder, or its weights are not loaded.
    """
    return _digest(vae, ("decoder.", "post_quant_conv."), as_float32=True)


def _digest(vae: torch.nn.Module, prefixes: tuple[str, ...], *, as_float32: bool = False) -> str:
    """The sha256 over the tensors whose names begin so."""
    tensors = {
        name: tensor
        for name, tensor in vae.state_dict().items()
        # Fused projections repeat q, k and v.
        if name.startswith(prefixes) and ".to_qkv." not in name
    }
    if not tensors:
        raise UserError(f"a {type(vae).__name__} has no tensors named {prefixes[0]}*; pass an AutoencoderKL.")
    return tensors_fingerprint({name: tensor.float() if as_float32 else tensor for name, tensor in tensors.items()})


def tensors_fingerprint(tensors: Mapping[str, torch.Tensor]) -> str:
    """Return the sha256 of named tensors, in hexadecimal.

    In the order of their names: name, dtype, shape and the numbers in row-major order, little-endian. Neither the
    device nor the memory layout counts.

    Raises:
        UserError: A tensor has no values.
    """
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        if tensor.is_meta:
            raise UserError(f"{name} is on the meta device and has no values; load the weights first.")
        dtype = str(tensor.dtype).removeprefix("torch.")
        digest.update(f"{name} {dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def numerics_of(
    device: torch.device | str, threads_per_picture: int = 1, versions: Mapping[str, str] | None = None
) -> Numerics:
    """Return what this machine adds to the last bits of a latent.

    Args:
        device: Where the encoder runs.
        threads_per_picture: Threads that encode one picture.
        versions: Versions that count beside those of the libraries, such as the picture decoders'.
    """
    import torch

    device = torch.device(device)
    is_cuda = device.type == "cuda"
    return Numerics(
        device=torch.cuda.get_device_name(device) if is_cuda else device.type,
        cpu=f"{_cpu_model()}, {torch.backends.cpu.get_cpu_capability()}",
        threads_per_picture=threads_per_picture,
        # torch says of itself which build it is.
        versions={name: version(name) for name in _LIBRARIES}
        | {"torch": str(torch.__version__)}
        | dict(versions or {}),
    )


def _cpu_model() -> str:
    """The CPU's name as its maker gives it, where the system tells."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    names = re.findall(r"^model name\s*:\s*(.+)$", text, flags=re.MULTILINE)
    return names[0].strip() if names else platform.processor() or platform.machine()
