"""The parts: bands and when they are let go of, merged statistics, slabs, counted memory."""

import pytest
import torch
from torch import Tensor

from sd_vae.banded.bands import Bands
from sd_vae.banded.planning import PeakMemory
from sd_vae.ops.compiled import band_statistics
from sd_vae.ops.dispatch import planned_for
from sd_vae.ops.groupnorm import Statistics, scale_and_shift, tensor_statistics


def make_bands(heights: list[int]) -> tuple[Bands, Tensor, list[Tensor]]:
    """A map (sum of heights, 3, 2), held in bands; the map; the bands that were given back, in order."""
    given: list[Tensor] = []
    whole = torch.arange(sum(heights) * 6.0).view(-1, 3, 2)
    bands = Bands(len(whole), 3, 2, give=given.append)
    for part in whole.split(heights):
        bands.append(part.clone())
    return bands, whole, given


@pytest.mark.parametrize("heights", [[7], [4, 3], [1, 1, 4, 1], [4, 4, 4]])
def test_pieces_are_the_rows_that_were_asked_for_within_the_map(heights) -> None:
    bands, whole, _ = make_bands(heights)

    for first in range(-2, len(whole)):
        for last in range(max(first, 0) + 1, len(whole) + 3):
            assert torch.equal(torch.cat(bands.pieces(first, last)), whole[max(first, 0) : last])


def test_pieces_share_the_bands_memory() -> None:
    bands, _, _ = make_bands([4, 4])

    bands.pieces(5, 6)[0].fill_(-1)

    assert (bands.pieces(4, 8)[0][1] == -1).all()


def test_addresses_are_those_of_the_rows_and_zero_outside() -> None:
    bands, whole, _ = make_bands([4, 3])
    rows = [row for piece in bands.pieces(0, 7) for row in piece]

    addresses = bands.addresses(-1, len(whole) + 2)

    assert addresses.tolist() == [0, *(row.data_ptr() for row in rows), 0, 0]


def test_each_names_the_first_row_of_every_band() -> None:
    bands, whole, _ = make_bands([4, 1, 2])

    for band, row in bands.each():
        assert torch.equal(band, whole[row : row + len(band)])


def test_release_gives_back_what_ends_above_a_row_and_once() -> None:
    bands, whole, given = make_bands([4, 4, 4])

    bands.release(7)
    bands.release(7)

    assert [band[0, 0, 0] for band in given] == [whole[0, 0, 0]]
    bands.release(8)
    assert len(given) == 2
    bands.release()
    assert len(given) == 3


def test_reading_rows_that_were_released_is_a_defect() -> None:
    bands, _, _ = make_bands([4, 4])
    bands.release(4)

    with pytest.raises(AssertionError, match="rows from 0 were let go of before their last reader"):
        bands.pieces(3, 5)
    with pytest.raises(AssertionError, match="the band at row 0 was let go of"):
        list(bands.each())


GATHERERS = {
    "torch": lambda band, groups: tensor_statistics(band, groups),
    "compiled": lambda band, groups: band_statistics(band, groups),
}


@pytest.mark.parametrize("gather", GATHERERS.values(), ids=GATHERERS)
@pytest.mark.parametrize("heights", [[24], [4, 20], [8, 8, 8], [1, 22, 1]])
def test_merged_statistics_equal_float64_where_the_mean_is_large(gather, heights) -> None:
    generator = torch.Generator().manual_seed(0)
    whole = (torch.randn(24, 20, 32, generator=generator) * 1e-2 + 30 * torch.randn(32, generator=generator)).float()
    grouped = whole.double().view(-1, 8, 4)

    merged = Statistics.merged([gather(band.contiguous(), 8) for band in whole.split(heights)])

    assert torch.equal(merged.count[0], torch.full((8,), 24.0 * 20 * 4, dtype=torch.float64))
    torch.testing.assert_close(merged.mean[0], grouped.mean((0, 2)), rtol=1e-6, atol=1e-7)
    variance = merged.second[0] / merged.count[0]
    torch.testing.assert_close(variance, grouped.var((0, 2), correction=0), rtol=1e-5, atol=0)


@pytest.mark.parametrize("gather", GATHERERS.values(), ids=GATHERERS)
def test_statistics_of_a_mean_far_above_the_deviation_equal_float64(gather) -> None:
    noise = torch.randint(-8, 9, (16, 16, 32), generator=torch.Generator().manual_seed(0))
    whole = 2.0**16 + noise / 8  # exact in fp32, mean / std = 1e5
    grouped = whole.double().view(-1, 8, 4)

    merged = Statistics.merged([gather(band.contiguous(), 8) for band in whole.split(4)])

    variance = merged.second[0] / merged.count[0]
    # worst seen 4e-4, in PyTorch: each band's mean is rounded to fp32; one-pass sums in fp32 have no digit right
    torch.testing.assert_close(variance, grouped.var((0, 2), correction=0), rtol=1e-3, atol=0)


def test_scale_and_shift_equal_group_norm() -> None:
    generator = torch.Generator().manual_seed(0)
    whole = torch.randn(12, 5, 32, generator=generator) + 3
    norm = torch.nn.GroupNorm(8, 32, eps=1e-2)
    torch.nn.init.normal_(norm.weight, generator=generator)
    torch.nn.init.normal_(norm.bias, generator=generator)

    with torch.no_grad():
        parts = [tensor_statistics(band, 8) for band in whole.split(4)]
        scale, shift = scale_and_shift(parts, norm.weight, norm.bias, norm.eps)
        expected = norm(whole.permute(2, 0, 1)[None])[0].permute(1, 2, 0)

    torch.testing.assert_close(whole * scale + shift, expected, rtol=0, atol=2e-6)


def count(work) -> int:
    with PeakMemory() as memory:
        work()
    return memory.peak_bytes


def meta(num_floats: int) -> Tensor:
    return torch.empty(num_floats, device="meta")


def test_peak_memory_counts_what_lives_at_once() -> None:
    def work() -> None:
        a, b = meta(100), meta(50)
        del a
        c = meta(60)
        del b, c

    assert count(work) == 4 * 150


def test_peak_memory_counts_temporaries() -> None:
    def work() -> None:
        (meta(100) + 1).mul(2)

    assert count(work) == 4 * 200


def test_peak_memory_counts_views_and_in_place_results_once() -> None:
    def work() -> None:
        a = meta(100)
        b = a.view(10, 10)[2:]
        b.add_(1)
        a[:5].t()

    assert count(work) == 4 * 100


def test_peak_memory_does_not_count_what_is_known() -> None:
    known = meta(100)

    with PeakMemory([known]) as memory:
        known.view(10, 10)

    assert memory.peak_bytes == 0


@pytest.mark.parametrize(
    ("device", "layout", "copied"),
    [("cpu", torch.contiguous_format, 12 + 54), ("cpu", torch.channels_last, 2 * 54), ("cuda", torch.channels_last, 0)],
)
def test_peak_memory_counts_what_a_convolution_reorders(device, layout, copied) -> None:
    x = torch.empty(1, 3, 2, 2, device="meta").contiguous(memory_format=layout)
    conv = torch.nn.Conv2d(3, 2, 3, padding=1, device="meta").requires_grad_(False)

    with PeakMemory([x, *conv.parameters()]) as memory, planned_for(device):
        conv(x)

    assert memory.peak_bytes == 4 * (8 + copied)
