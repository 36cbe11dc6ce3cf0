import math

import numpy as np
import pytest
from scipy import stats

from eval.compare import MIN_PHOTOS, Bootstrap, verdict
from eval.metrics import METRICS
from eval.results import Interval

NAMES = [f"{index:02}" for index in range(24)]
VALUES = np.random.default_rng(1).normal(25.0, 3.0, 24)


def test_interval_is_that_of_scipys_bootstrap_widened_for_few_photos():
    found = Bootstrap(NAMES).intervals({"psnr_db": VALUES.tolist()})["psnr_db"]

    reach = math.sqrt(24 / 23) * stats.t.ppf(0.975, 23)
    theirs = stats.bootstrap(
        (VALUES,),
        np.mean,
        n_resamples=9999,
        method="percentile",
        confidence_level=1 - 2 * stats.norm.cdf(-reach),
        rng=0,
    ).confidence_interval
    assert found.value == pytest.approx(VALUES.mean(), rel=1e-12)
    # both are random: worst seen 0.065 of an interval of 3.0, photos of seeds 0 to 9
    assert (found.low, found.high) == pytest.approx(tuple(theirs), abs=0.15)


def test_interval_ends_where_students_t_puts_them_among_the_draws():
    bootstrap = Bootstrap(NAMES[:6])

    found = bootstrap.intervals({"psnr_db": VALUES[:6].tolist()})["psnr_db"]

    level = stats.norm.cdf(-math.sqrt(6 / 5) * stats.t.ppf(0.975, 5))
    ends = np.quantile(bootstrap.means(VALUES[:6, None])[:, 0], [level, 1 - level])
    assert (found.low, found.high) == pytest.approx(tuple(ends), rel=1e-12)


def test_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    bootstrap = Bootstrap(NAMES[:10])

    columns = {str(index): rng.normal(0.0, 1.0, 10).tolist() for index in range(400)}
    found = bootstrap.intervals(columns)

    covered = np.mean([one.low <= 0.0 <= one.high for one in found.values()])
    assert 0.91 <= covered <= 0.98  # 0.918 to 0.960 with seeds 0 to 9; plain percentiles give 0.865 to 0.925


def test_intervals_do_not_depend_on_the_order_of_photos():
    turned = Bootstrap(NAMES[::-1]).intervals({"psnr_db": VALUES[::-1].tolist()})

    assert turned == Bootstrap(NAMES).intervals({"psnr_db": VALUES.tolist()})


@pytest.mark.parametrize("values", [[3.0], [3.0, math.inf]])
def test_interval_without_evidence_has_no_ends(values):
    found = Bootstrap(NAMES[: len(values)]).intervals({"psnr_db": values})["psnr_db"]

    assert (found.low, found.high) == (-math.inf, math.inf)


def test_compare_sees_a_small_difference_that_the_spread_hides():
    worse = (VALUES - 0.1 + np.random.default_rng(2).normal(0.0, 0.05, 24)).tolist()
    values = {"psnr_db": VALUES.tolist(), "l1": VALUES.tolist(), "hf_energy_ratio": VALUES.tolist()}
    others = dict.fromkeys(values, worse)

    found = Bootstrap(NAMES).compare("ours", values, "other", others, {name: METRICS[name] for name in values})

    assert [(one.metric, one.verdict) for one in found] == [("psnr_db", "better"), ("l1", "worse")]
    assert found[0].difference.value == pytest.approx(0.1, abs=0.03)
    assert (found[0].row, found[0].against) == ("ours", "other")


def test_compare_does_not_tell_equal_rows_apart():
    values = {"psnr_db": [*VALUES[:-1].tolist(), math.inf]}

    (found,) = Bootstrap(NAMES).compare("a", values, "b", values, {"psnr_db": METRICS["psnr_db"]})

    assert found.verdict == "not distinguishable"
    assert found.difference == Interval(value=0.0, low=0.0, high=0.0)


def test_verdict_needs_photos():
    difference = Interval(value=1.0, low=0.5, high=1.5)

    assert verdict(difference, MIN_PHOTOS - 1, higher_is_better=True) == "not distinguishable"
    assert verdict(difference, MIN_PHOTOS, higher_is_better=True) == "better"
    assert verdict(difference, MIN_PHOTOS, higher_is_better=False) == "worse"


def test_pooled_psnr_has_an_interval_around_it():
    found = Bootstrap(NAMES).pooled_psnr(VALUES.tolist())

    assert found.low < found.value < found.high < VALUES.mean() + 3.0
    assert math.isinf(Bootstrap(NAMES[:2]).pooled_psnr([math.inf, 30.0]).high)
