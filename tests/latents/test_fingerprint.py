"""What the fingerprint of an encoder depends on, and what a machine says of itself."""

import re
from collections.abc import Callable

import pytest
import torch
from torch import nn

from sd_vae.autoencoder import AutoencoderKL
from sd_vae.errors import UserError
from sd_vae.latents import encoder_fingerprint, numerics_of


@torch.no_grad()
def _nudge(weight: torch.Tensor) -> None:
    weight.view(-1)[-1] += 1e-3


def test_fingerprint_is_a_sha256(tiny_vae: AutoencoderKL) -> None:
    assert re.fullmatch("[0-9a-f]{64}", encoder_fingerprint(tiny_vae))


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda vae: _nudge(vae.decoder.conv_out.weight), id="decoder"),
        pytest.param(lambda vae: _nudge(vae.post_quant_conv.weight), id="post_quant_conv"),
        pytest.param(lambda vae: vae.to(memory_format=torch.channels_last), id="memory format"),
        pytest.param(lambda vae: vae.fuse_qkv_projections(), id="fused projections"),
        pytest.param(lambda vae: vae.train(), id="training mode"),
    ],
)
def test_fingerprint_keeps(change: Callable[[AutoencoderKL], object], tiny_vae: AutoencoderKL) -> None:
    before = encoder_fingerprint(tiny_vae)

    change(tiny_vae)

    assert encoder_fingerprint(tiny_vae) == before


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda vae: _nudge(vae.encoder.conv_in.weight), id="encoder"),
        pytest.param(lambda vae: _nudge(vae.quant_conv.bias), id="quant_conv"),
        pytest.param(lambda vae: vae.to(torch.bfloat16), id="dtype"),
    ],
)
def test_fingerprint_changes(change: Callable[[AutoencoderKL], object], tiny_vae: AutoencoderKL) -> None:
    before = encoder_fingerprint(tiny_vae)

    change(tiny_vae)

    assert encoder_fingerprint(tiny_vae) != before


def test_fingerprint_tells_swapped_tensors_apart(tiny_vae: AutoencoderKL) -> None:
    before = encoder_fingerprint(tiny_vae)
    block = tiny_vae.encoder.mid_block.resnets[0]
    _nudge(block.conv1.weight)
    one = encoder_fingerprint(tiny_vae)

    block.conv1.weight, block.conv2.weight = block.conv2.weight, block.conv1.weight

    assert len({before, one, encoder_fingerprint(tiny_vae)}) == 3


def test_fingerprint_refuses_a_model_without_encoder() -> None:
    with pytest.raises(UserError, match=r"a Linear has no tensors named encoder\.\*; pass an AutoencoderKL"):
        encoder_fingerprint(nn.Linear(2, 2))


def test_fingerprint_refuses_weights_without_values(tiny_vae: AutoencoderKL) -> None:
    with pytest.raises(UserError, match=r"encoder\.conv_in\.bias is on the meta device"):
        encoder_fingerprint(tiny_vae.to("meta"))


def test_numerics_of_names_machine_and_libraries() -> None:
    numerics = numerics_of("cpu", 3, versions={"libjpeg": "9"})

    assert numerics.device == "cpu"
    assert torch.backends.cpu.get_cpu_capability() in numerics.cpu
    assert numerics.threads_per_picture == 3
    assert numerics.versions["torch"] == torch.__version__
    assert numerics.versions["libjpeg"] == "9"
    assert {"pillow", "pyarrow", "safetensors", "numpy", "sd-vae"} <= numerics.versions.keys()
