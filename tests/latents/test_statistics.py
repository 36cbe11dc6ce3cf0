"""Figures against numpy on everything at once, intervals against simulation."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import synthetic_store as synthetic
import torch
from synthetic_store import CHANNELS, NUM_RECORDS, REJECTED, moments_of, views_of

from sd_vae.errors import UserError
from sd_vae.latents import LatentStore, measure
from sd_vae.latents.statistics import ACTIVE_VARIANCE, LatentStatistics, PictureSums, _num_sums, summarize


def _everything(flip: bool = False, num_views: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Means and logvars of every cell of the synthetic store, (C, cells) each in float64."""
    items = [
        item
        for position in range(NUM_RECORDS)
        if position not in REJECTED
        for item in views_of(position, flip, num_views)
    ]
    moments = torch.cat([moments_of(item).double().flatten(1) for item in items], dim=1)
    mean, logvar = moments.chunk(2)
    return mean, logvar


@pytest.mark.parametrize(("flip", "num_views"), [(False, 1), (True, 2)])
def test_measure_counts_every_cell_once(flip: bool, num_views: int, tmp_path: Path) -> None:
    synthetic.make(tmp_path / "store", flip=flip, num_views=num_views, dtype="float32")
    mean, logvar = _everything(flip, num_views)
    covariance = torch.cov(mean, correction=0) + logvar.exp().mean(dim=1).diag()
    z_mean, z_var = mean.mean(dim=1), covariance.diagonal()

    found = measure(tmp_path / "store")

    assert (found.num_pictures, found.num_cells) == (9, mean.shape[1])
    assert found.num_items == 9 * (1 + flip) * num_views
    # float64 on both sides; worst seen 4e-16
    np.testing.assert_allclose(found.latents_mean, z_mean, rtol=1e-12)
    np.testing.assert_allclose(found.latents_std, z_var.sqrt(), rtol=1e-12)
    np.testing.assert_allclose([[cell.value for cell in row] for row in found.covariance], covariance, rtol=1e-11)
    np.testing.assert_allclose(found.shift_factor.value, z_mean.mean(), rtol=1e-12)
    pooled = (z_var + z_mean.square()).mean() - z_mean.mean().square()
    np.testing.assert_allclose(found.scaling_factor.value, pooled.rsqrt(), rtol=1e-12)


def test_measure_gives_the_kl_and_active_units(tmp_path: Path) -> None:
    synthetic.make(tmp_path / "store", dtype="float32")
    mean, logvar = _everything()
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean(dim=1)

    found = measure(tmp_path / "store")

    np.testing.assert_allclose([channel.kl.value for channel in found.channels if channel.kl], kl, rtol=1e-12)
    assert found.kl is not None
    assert found.kl.value == pytest.approx(float(kl.mean()), rel=1e-12)
    spreads = [channel.mean_variance.value for channel in found.channels if channel.mean_variance]
    np.testing.assert_allclose(spreads, mean.var(dim=1, correction=0), rtol=1e-11)
    assert found.num_active == CHANNELS


def test_measure_finds_a_channel_that_says_nothing() -> None:
    cells = 6
    parts = []
    for picture in range(20):
        mean = torch.randn(2, cells, dtype=torch.float64, generator=torch.Generator().manual_seed(picture))
        mean[1] *= 0.5 * ACTIVE_VARIANCE**0.5
        parts.append(_sums(mean))

    found = summarize(PictureSums.of(torch.stack(parts)), "mode", num_channels=2, num_items=20)

    assert [channel.is_active for channel in found.channels] == [True, False]
    assert found.num_active == 1


def _sums(mean: torch.Tensor) -> torch.Tensor:
    """The sums of one picture's means (C, cells), by their definition."""
    square = mean @ mean.T
    zeros = torch.zeros(len(mean), dtype=mean.dtype)
    return torch.cat([mean.new_tensor([mean.shape[1]]), mean.sum(1), square.flatten(), square.diagonal(), zeros])


@pytest.mark.parametrize(
    ("options", "holds_spread"), [({"content": "mode"}, True), ({"content": "sample", "seed": 1}, False)]
)
def test_measure_leaves_out_what_the_store_does_not_hold(
    options: dict[str, Any], holds_spread: bool, tmp_path: Path
) -> None:
    synthetic.make(tmp_path / "store", **options)

    found = measure(tmp_path / "store")

    assert found.kl is None
    assert all(channel.kl is None for channel in found.channels)
    assert (found.num_active is not None) == holds_spread
    assert all((channel.mean_variance is not None) == holds_spread for channel in found.channels)


def test_measure_of_modes_leaves_the_posterior_variance_out(tmp_path: Path) -> None:
    synthetic.make(tmp_path / "store", content="mode", dtype="float32")

    found = measure(tmp_path / "store")

    np.testing.assert_allclose(found.latents_std, _everything()[0].std(dim=1, correction=0), rtol=1e-12)


def test_sums_merge_to_those_of_all_pictures_in_any_order() -> None:
    sums = 1e4 + torch.randn(50, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    parts = [PictureSums.of(part) for part in sums.split([13, 0, 1, 30, 6])]

    merged = PictureSums(7)
    for part in reversed(parts):
        merged.merge_(part)

    assert merged.num_pictures == 50
    torch.testing.assert_close(merged.mean, sums.mean(dim=0), rtol=1e-14, atol=0)
    # worst seen 3e-13; sums of squares that are subtracted, 1e4^2 against 1, lose 8 digits
    torch.testing.assert_close(merged.scatter, torch.cov(sums.T, correction=0) * 50, rtol=1e-10, atol=1e-10)


def _simulated(generator: torch.Generator, num_pictures: int, cells: int) -> LatentStatistics:
    """Two channels whose cells share much with their picture; true mean (1, 0), variance 2, covariance 1."""
    parts = []
    for _ in range(num_pictures):
        common = torch.randn(1, 1, dtype=torch.float64, generator=generator)
        own = torch.randn(2, cells, dtype=torch.float64, generator=generator)
        parts.append(_sums(torch.tensor([[1.0], [0.0]], dtype=torch.float64) + common + own))
    return summarize(PictureSums.of(torch.stack(parts)), "mode", num_channels=2, num_items=num_pictures)


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    generator = torch.Generator().manual_seed(0)
    pooled_std = math.sqrt(2 + 0.25)
    runs = [_simulated(generator, num_pictures=60, cells=64) for _ in range(300)]

    covered = {
        "mean": np.mean([run.channels[0].mean.low <= 1.0 <= run.channels[0].mean.high for run in runs]),
        "std": np.mean([run.channels[0].std.low <= 2**0.5 <= run.channels[0].std.high for run in runs]),
        "covariance": np.mean([run.covariance[0][1].low <= 1.0 <= run.covariance[0][1].high for run in runs]),
        "scale": np.mean([run.scaling_factor.low <= 1 / pooled_std <= run.scaling_factor.high for run in runs]),
        "shift": np.mean([run.shift_factor.low <= 0.5 <= run.shift_factor.high for run in runs]),
    }

    # 95% asked for; seen 0.91 (variances of 60 pictures) to 0.95. Cells taken as independent: 0.25 of the means
    assert all(0.88 <= share <= 0.99 for share in covered.values()), covered


def test_intervals_widen_with_the_confidence_and_never_pass_zero(store_folder: Path) -> None:
    narrow, wide = measure(store_folder, confidence=0.5), measure(store_folder, confidence=0.999)

    for less, more in zip(narrow.channels, wide.channels, strict=True):
        assert more.mean.low < less.mean.low < less.mean.value < less.mean.high < more.mean.high
        assert 0 < more.std.low < less.std.low < less.std.value < less.std.high < more.std.high
    assert narrow.scaling_factor.n == 9


def test_one_picture_tells_nothing_of_others() -> None:
    sums = _sums(torch.randn(2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))

    found = summarize(PictureSums.of(sums[None]), "mode", num_channels=2, num_items=1)

    assert (found.channels[0].mean.low, found.channels[0].mean.high) == (-math.inf, math.inf)
    assert (found.scaling_factor.low, found.scaling_factor.high) == (0.0, math.inf)
    assert found.scaling_factor.value > 0


def test_a_constant_latent_has_no_scale() -> None:
    sums = torch.stack([_sums(torch.zeros(2, 5, dtype=torch.float64))] * 3)

    found = summarize(PictureSums.of(sums), "mode", num_channels=2, num_items=3)

    assert found.latents_std == (0.0, 0.0)
    assert found.scaling_factor.value == math.inf


def test_measure_reports_each_shard_as_it_goes(store_folder: Path) -> None:
    seen = []

    measure(store_folder, progress=lambda record: seen.append(record.shard))

    assert seen == [0, 1, 2]


def test_measure_refuses_a_store_without_latents(tmp_path: Path) -> None:
    store = LatentStore.create(tmp_path / "store", synthetic.describe(num_records=1))
    with store.writer(0) as writer:
        writer.reject(synthetic.reject(0))
    store.finish(1)

    with pytest.raises(UserError, match=r"holds no latents to measure; see rejects.jsonl"):
        measure(tmp_path / "store")


def test_measure_skips_a_shard_of_rejects(tmp_path: Path) -> None:
    store = LatentStore.create(tmp_path / "store", synthetic.describe(num_records=2, shard_items=1))
    with store.writer(0) as writer:
        writer.reject(synthetic.reject(0))
    with store.writer(1) as writer:
        writer.add(synthetic.item(1), moments_of(synthetic.item(1)))
    store.finish(2)

    assert measure(tmp_path / "store").num_pictures == 1


@pytest.mark.parametrize("confidence", [0.0, 1.0, 95.0])
def test_measure_refuses_a_confidence_that_is_none(confidence: float, store_folder: Path) -> None:
    with pytest.raises(UserError, match=r"confidence is .*, it must be above 0 and below 1"):
        measure(store_folder, confidence=confidence)


def test_number_of_sums_is_that_of_a_picture() -> None:
    assert _num_sums(2) == len(_sums(torch.zeros(2, 3)))
