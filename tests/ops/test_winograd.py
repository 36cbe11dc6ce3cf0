"""3x3 convolutions by Winograd, with and without doubling, residual, norm and bands, against fp64."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from ops_cases import conv, draw, error, needs_compiled, wide
from torch import Tensor

from sd_vae import ops
from sd_vae.banded.bands import Bands
from sd_vae.banded.engines import CompiledEngine
from sd_vae.ops import dispatch
from sd_vae.ops.workspace import Workspace

pytestmark = [needs_compiled, pytest.mark.usefixtures("any_size")]

# Rows and columns that 4x4 tiles cover, that they do not, single ones, and more tiles across than a block has.
SIZES = [(1, 1), (1, 9), (9, 1), (2, 3), (3, 2), (4, 4), (5, 8), (7, 13), (16, 16), (18, 31), (3, 200), (40, 43)]
BOUND = 2e-5  # worst seen 2.6e-6 over these cases and 300 random ones; the reference in fp32: 6e-7


def apply(x: Tensor, module: Any, residual: Tensor | None = None, *, double: bool = False) -> Tensor:
    choice = dispatch.choose_upsample(x, module) if double else dispatch.choose_conv3x3(x, module, residual)
    assert choice.version == "compiled", choice.why
    return ops.upsample_conv(x, module) if double else ops.conv3x3(x, module, residual)


def exact(x: Tensor, module: Any, residual: Tensor | None = None, *, double: bool = False) -> Tensor:
    x = x.double()
    x = F.interpolate(x, scale_factor=2.0, mode="nearest") if double else x
    h = wide(module)(x)
    return h if residual is None else h + residual.double()


@torch.no_grad()
@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_convolution_equals_fp64(height: int, width: int, batch_size: int) -> None:
    module = conv(32, 64, seed=height)
    x = draw(batch_size, 32, height, width)

    ours = apply(x, module)

    assert error(ours, exact(x, module)) < BOUND


@torch.no_grad()
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_doubling_convolution_equals_fp64(height: int, width: int) -> None:
    module = conv(32, 32, seed=width)
    x = draw(2, 32, height, width)

    ours = apply(x, module, double=True)

    assert error(ours, exact(x, module, double=True)) < BOUND


@torch.no_grad()
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_residual_is_added_inside_the_borders(height: int, width: int) -> None:
    module = conv(16, 32)
    x, residual = draw(2, 16, height, width), draw(2, 32, height, width, seed=1)
    before = residual.clone()

    ours = apply(x, module, residual)

    assert error(ours, exact(x, module, residual)) < BOUND
    assert torch.equal(residual, before)


@torch.no_grad()
@pytest.mark.parametrize(("num_in", "num_out"), [(16, 32), (48, 96), (64, 32), (112, 160), (512, 32)])
def test_convolution_equals_fp64_at_any_width_of_the_domain(num_in: int, num_out: int) -> None:
    module = conv(num_in, num_out)
    x = draw(1, num_in, 9, 14)

    ours = apply(x, module)

    assert error(ours, exact(x, module)) < BOUND


@torch.no_grad()
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced", "expanded"])
def test_convolution_takes_any_layout(layout: str) -> None:
    module = conv(32, 32)
    x = {
        "contiguous": lambda: draw(2, 32, 9, 10),
        "channels_last": lambda: draw(2, 32, 9, 10).contiguous(memory_format=torch.channels_last),
        "sliced": lambda: draw(2, 64, 18, 21)[:, ::2, ::2, 1::2],
        "expanded": lambda: draw(1, 32, 1, 10).expand(2, -1, 9, -1),
    }[layout]()

    ours = apply(x, module)

    assert error(ours, exact(x, module)) < BOUND


@torch.no_grad()
def test_convolution_takes_weights_in_channels_last() -> None:
    module = conv(32, 64)
    x = draw(1, 32, 17, 18)
    plain = apply(x, module)

    module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    assert torch.equal(apply(x, module), plain)


@torch.no_grad()
@pytest.mark.parametrize("seed", range(10))
def test_convolution_equals_fp64_on_random_shapes(seed: int) -> None:
    rng = np.random.default_rng(seed)
    batch_size, height, width = int(rng.integers(1, 4)), int(rng.integers(1, 30)), int(rng.integers(1, 60))
    num_in, num_out, double = int(rng.integers(1, 5)) * 16, int(rng.integers(1, 4)) * 32, bool(rng.integers(2))
    module, x = conv(num_in, num_out, seed=seed), draw(batch_size, num_in, height, width, seed=seed) * 50 + 20
    residual = None if double or rng.integers(2) else draw(batch_size, num_out, height, width)

    ours = apply(x, module, residual, double=double)

    assert error(ours, exact(x, module, residual, double=double)) < BOUND


@torch.no_grad()
@pytest.mark.parametrize("step", ["convolve", "add", "double"])
@pytest.mark.parametrize("band_rows", [1, 3, 4, 8, 20])
def test_convolution_of_bands_is_the_whole_maps(band_rows: int, step: str) -> None:
    module, x, norm = conv(32, 32), draw(20, 11, 32), (draw(32, seed=1), draw(32, seed=2))
    scale = 2 if step == "double" else 1
    source = Bands(20, 11, 32, give=lambda _: None)
    for band in x.split(band_rows):
        source.append(band.clone())
    out = draw(20 * scale, 11 * scale, 32, seed=3)
    seen = x if step == "double" else F.silu(x.double() * norm[0] + norm[1])
    wanted = exact(seen.permute(2, 0, 1)[None], module, double=step == "double")[0].permute(1, 2, 0)
    wanted = wanted + out if step == "add" else wanted
    with Workspace(0) as workspace:
        engine = CompiledEngine(
            workspace, device=torch.device("cpu"), band_bytes=4096, num_groups=4, keep_weights=False
        )
        prepared = engine.prepare(module)
        for start in range(0, 20 * scale, 8):
            stop = min(start + 8, 20 * scale)
            if step == "double":
                engine.double(source, start, stop, prepared, out[start:stop])
            else:
                engine.convolve(source, start, stop, prepared, norm, out[start:stop], add=step == "add")

    assert error(out, wanted) < BOUND


@torch.no_grad()
def test_silu_is_exact_where_exp_leaves_its_range() -> None:
    from sd_vae.ops import kernels

    y = torch.tensor([-1e30, -200.0, -88.0, -87.0, -20.0, -1e-30, 0.0, 1e-30, 20.0, 87.0, 88.0, 200.0, 1e30]).repeat(16)
    scale, shift, out = torch.ones(16), torch.zeros(16), torch.empty_like(y)
    place = [part.data_ptr() for part in (y, scale, shift, out)]

    kernels.normalise(place[0], len(y) // 16, 64, place[1], place[2], 1, place[3])

    # worst seen 1.2e-7 relative, and 2e-36 absolute below -87
    torch.testing.assert_close(out.double(), F.silu(y.double()), rtol=4e-7, atol=1e-7)


@torch.no_grad()
def test_convolution_lets_nan_through() -> None:
    x = draw(1, 32, 16, 16)
    x[0, 3, 5, 6] = torch.nan

    ours = ops.conv3x3(x, conv(32, 32))

    assert ours[0, :, 4:7, 5:8].isnan().all()
    assert not ours[0, :, 12:].isnan().any()
