"""Four-phase upsampling against repeating and convolving: values, gradients, formats, dtypes."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sd_vae.ops.four_phase import fold_weight, upsample_conv, upsample_conv_folded

SIZES = [(1, 1), (1, 7), (7, 1), (3, 5), (8, 8)]


def reference(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.conv2d(F.interpolate(x, scale_factor=2.0, mode="nearest"), weight, bias, padding=1)


def draw(height: int, width: int, *, batch_size: int = 2, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """x, weight, bias in fp64: 5 channels to 3, the width that no power of two divides."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    return normal(batch_size, 5, height, width), normal(3, 5, 3, 3), normal(3)


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.double() - theirs).abs().max() / theirs.abs().max())


@pytest.mark.parametrize("batch_size", [1, 2, 3])
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_upsample_conv_equals_reference(height: int, width: int, batch_size: int) -> None:
    x, weight, bias = draw(height, width, batch_size=batch_size)

    ours = upsample_conv(x, weight, bias)

    # worst seen 6e-16: fp64 rounding, so the two are the same formula at every border
    assert relative(ours, reference(x, weight, bias)) < 4e-15


def test_upsample_conv_takes_no_bias() -> None:
    x, weight, _ = draw(3, 5)

    ours = upsample_conv(x, weight, None)

    assert relative(ours, reference(x, weight, None)) < 4e-15


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_upsample_conv_has_reference_gradients(height: int, width: int) -> None:
    arguments = [part.requires_grad_() for part in draw(height, width)]
    direction = reference(*draw(height, width, seed=1))

    ours = torch.autograd.grad(upsample_conv(*arguments), arguments, direction)
    theirs = torch.autograd.grad(reference(*arguments), arguments, direction)

    # worst seen 6e-16 over x, weight and bias
    assert max(relative(*pair) for pair in zip(ours, theirs, strict=True)) < 4e-15


# Of the largest magnitude, against fp64 on the same values; 20 seeds of 32 channels on 9x13.
# worst seen: fp32 3e-7 (reference 7e-7), bf16 4.1e-3 (3.1e-3), fp16 5.2e-4 (4.0e-4): the folded filter is rounded again
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 8e-3), (torch.float16, 1e-3)], ids=str
)
def test_upsample_conv_rounds_little(dtype: torch.dtype, bound: float) -> None:
    worst = 0.0
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(1, 32, 9, 13, generator=generator).to(dtype)
        gains = torch.randn(32, 1, 1, 1, generator=generator).exp()  # harsh: filters of very different sizes
        weight = (torch.randn(32, 32, 3, 3, generator=generator) * gains / 17).to(dtype)

        ours = upsample_conv(x, weight, None)

        worst = max(worst, relative(ours, reference(x.double(), weight.double(), None)))
        assert ours.dtype == dtype
    assert worst < bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_upsample_conv_keeps_channels_last(dtype: torch.dtype) -> None:
    x, weight, bias = (part.to(dtype) for part in draw(3, 5))

    ours = upsample_conv(x.contiguous(memory_format=torch.channels_last), weight, bias)

    assert ours.is_contiguous(memory_format=torch.channels_last)


def test_upsample_conv_bf16_has_reference_gradients() -> None:
    x, weight, bias = draw(4, 6)
    direction = reference(*draw(4, 6, seed=1)).bfloat16()
    half = [part.bfloat16().requires_grad_() for part in (x, weight, bias)]
    wide = [part.detach().double().requires_grad_() for part in half]

    ours = torch.autograd.grad(upsample_conv(half[0], half[1], half[2]), half, direction)
    theirs = torch.autograd.grad(reference(wide[0], wide[1], wide[2]), wide, direction.double())

    # worst seen 1.2e-2 over 20 seeds and five sizes, of the largest magnitude: bf16 rounds to 4e-3
    assert max(relative(*pair) for pair in zip(ours, theirs, strict=True)) < 2.4e-2


def test_upsample_conv_runs_in_autocast_training() -> None:
    x, weight, bias = (part.float().requires_grad_() for part in draw(3, 5))

    with torch.autocast("cpu", dtype=torch.bfloat16):
        upsample_conv(x, weight, bias).float().square().mean().backward()

    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32


def test_fold_weight_rounds_once() -> None:
    # 1 + 2^-8 + 2^-8: in bf16 the first sum alone would round back to 1.
    weight = torch.zeros(1, 1, 3, 3, dtype=torch.bfloat16)
    weight[0, 0, 0, 0], weight[0, 0, 0, 1], weight[0, 0, 1, 0] = 1, 2**-8, 2**-8

    folded = fold_weight(weight)

    assert folded[0, 0, 2, 2] == 1 + 2**-7


def test_upsample_conv_folded_takes_a_kept_filter() -> None:
    x, weight, bias = draw(3, 5)
    folded = fold_weight(weight)

    ours = upsample_conv_folded(x, folded, bias)

    assert torch.equal(ours, upsample_conv(x, weight, bias))
