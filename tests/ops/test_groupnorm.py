"""GroupNorm with SiLU by the compiled kernels, and its statistics from pieces, against fp64."""

import pytest
import torch
import torch.nn.functional as F
from ops_cases import draw, error, group_norm, needs_compiled, wide
from torch import Tensor, nn

from sd_vae import ops
from sd_vae.ops.groupnorm import Statistics, scale_and_shift, tensor_statistics

SIZES = [(1, 1), (1, 9), (9, 1), (7, 13), (3, 200), (16, 16)]


def exact(x: Tensor, norm: nn.GroupNorm) -> Tensor:
    return F.silu(wide(norm)(x.double()))


@needs_compiled
@torch.no_grad()
@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_group_norm_silu_equals_fp64(height: int, width: int, batch_size: int) -> None:
    norm, x = group_norm(8, 48), draw(batch_size, 48, height, width) * 3 + 1
    norm.eps = 0.3  # large enough to be seen

    ours = ops.group_norm_silu(x, norm)

    # worst seen 3.2e-7, log-normal gains
    assert error(ours, exact(x, norm)) < 2e-6


# x itself is rounded to mean / 2^24 of a deviation.
@needs_compiled
@torch.no_grad()
@pytest.mark.parametrize(("mean", "bound"), [(100.0, 5e-5), (1e4, 5e-3)])  # worst seen 1.2e-5, 1.4e-3
def test_group_norm_silu_bears_a_mean_far_from_zero(mean: float, bound: float) -> None:
    worst = 0.0
    for seed in range(5):
        norm, x = group_norm(4, 32, seed=seed), draw(2, 32, 24, 31, seed=seed) + mean

        worst = max(worst, error(ops.group_norm_silu(x, norm), exact(x, norm)))

    assert worst < bound


@needs_compiled
@torch.no_grad()
def test_group_norm_silu_bears_channels_of_different_means() -> None:
    norm, x = group_norm(2, 32), draw(1, 32, 12, 13) + 1000 * draw(1, 32, 1, 1, seed=1)

    ours = ops.group_norm_silu(x, norm)

    assert error(ours, exact(x, norm)) < 2e-6  # worst seen 3e-7


@needs_compiled
@torch.no_grad()
def test_group_norm_silu_of_a_constant_map_is_its_bias() -> None:
    norm = group_norm(4, 32)

    ours = ops.group_norm_silu(torch.full((1, 32, 6, 5), 3.0), norm)

    # worst seen 6e-4: with variance 0 the scale is 1 / sqrt(eps), a thousand, and 3 * scale is rounded to 2e-4
    torch.testing.assert_close(ours[0, :, 0, 0], F.silu(norm.bias), rtol=0, atol=3e-3)


@needs_compiled
@torch.no_grad()
def test_group_norm_silu_leaves_x_alone() -> None:
    x = draw(1, 32, 6, 5).contiguous(memory_format=torch.channels_last)
    before = x.clone()

    ops.group_norm_silu(x, group_norm(4, 32))

    assert torch.equal(x, before)


@pytest.mark.parametrize("band_rows", [1, 3, 8, 20])
@pytest.mark.parametrize("way", ["torch", pytest.param("compiled", marks=needs_compiled)])
def test_statistics_of_bands_merge_to_the_whole_maps(way: str, band_rows: int) -> None:
    from sd_vae.ops import compiled

    gather = tensor_statistics if way == "torch" else compiled.band_statistics
    norm, x = group_norm(4, 32), draw(20, 11, 32) + 5 * draw(20, 1, 1, seed=1)
    bands = list(x.split(band_rows))

    scale, shift = scale_and_shift([gather(band, 4) for band in bands], norm.weight, norm.bias, norm.eps)

    theirs = wide(norm)(x.double().permute(2, 0, 1)[None])[0].permute(1, 2, 0)
    assert error(x.double() * scale + shift, theirs) < 1e-6  # worst seen 2.4e-7


def test_statistics_merge_in_any_order() -> None:
    parts = [tensor_statistics(draw(rows, 5, 8, seed=rows) + rows, 2) for rows in (1, 2, 7)]

    forward, backward = Statistics.merged(parts), Statistics.merged(parts[::-1])

    torch.testing.assert_close(forward.second, backward.second, rtol=1e-14, atol=0)


@torch.no_grad()
def test_statistics_of_half_precision_are_taken_in_fp32() -> None:
    x = draw(64, 64, 8) + 30

    half, full = tensor_statistics(x.half(), 2), tensor_statistics(x.half().float(), 2)

    assert torch.equal(half.second, full.second)


@torch.no_grad()
def test_group_norm_silu_in_bf16_on_a_cpu_takes_its_statistics_in_fp32() -> None:
    norm = group_norm(4, 32).bfloat16()
    x = (draw(1, 32, 64, 64) + 20).bfloat16().contiguous(memory_format=torch.channels_last)

    ours = ops.group_norm_silu(x, norm)

    assert ours.dtype == torch.bfloat16
    # worst seen 2.6e-3, the last rounding; sums in bf16 would be off by more than the deviation
    assert error(ours, exact(x, norm)) < 8e-3
