"""1x1 and strided convolutions by the direct kernel, against fp64."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ops_cases import conv, draw, error, needs_compiled, wide
from torch import Tensor

from sd_vae import ops
from sd_vae.banded.bands import Bands
from sd_vae.banded.engines import CompiledEngine
from sd_vae.ops.workspace import Workspace

pytestmark = needs_compiled

BOUND = 2e-6  # worst seen 4.2e-7 over these cases and 100 random ones


def exact(x: Tensor, module: Any) -> Tensor:
    return wide(module)(F.pad(x.double(), (0, 1, 0, 1)))


@torch.no_grad()
@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize(("height", "width"), [(2, 2), (2, 30), (30, 2), (6, 10), (18, 98), (4, 200)])
def test_halving_equals_fp64(height: int, width: int, batch_size: int) -> None:
    module, x = conv(32, 64, stride=2), draw(batch_size, 32, height, width)

    ours = ops.downsample_conv(x, module)

    assert error(ours, exact(x, module)) < BOUND


@torch.no_grad()
@pytest.mark.parametrize(("num_in", "num_out"), [(16, 32), (48, 96), (256, 32)])
def test_halving_equals_fp64_at_any_width_of_the_domain(num_in: int, num_out: int) -> None:
    module, x = conv(num_in, num_out, stride=2), draw(1, num_in, 10, 12)

    ours = ops.downsample_conv(x, module)

    assert error(ours, exact(x, module)) < BOUND


@torch.no_grad()
def test_halving_takes_weights_in_channels_last() -> None:
    module, x = conv(32, 64, stride=2), draw(1, 32, 8, 8)
    module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    ours = ops.downsample_conv(x, module)

    assert error(ours, exact(x, module)) < BOUND


@torch.no_grad()
@pytest.mark.parametrize("width", [1, 5, 48, 49, 200])
@pytest.mark.parametrize("height", [1, 3, 8])
def test_pointwise_of_bands_equals_fp64(height: int, width: int) -> None:
    module, x = conv(48, 32, size=1), draw(height, width, 48)
    source, out = Bands(height, width, 48, give=lambda _: None), torch.empty(height, width, 32)
    for band in x.split(2):
        source.append(band.clone())
    with Workspace(0) as workspace:
        engine = CompiledEngine(
            workspace, device=torch.device("cpu"), band_bytes=4096, num_groups=4, keep_weights=False
        )

        engine.pointwise(source, 0, height, engine.prepare(module), out)

    assert error(out, wide(module)(x.double().permute(2, 0, 1)[None])[0].permute(1, 2, 0)) < BOUND
