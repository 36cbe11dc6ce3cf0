import math

import numpy as np
import pytest
from scipy import stats

from sd_vae.errors import UserError
from sd_vae.latents.anomaly import choose_threshold, measure_detection


def test_threshold_is_the_order_statistic_of_the_rate():
    found = choose_threshold(list(range(1, 100)), 0.05)

    # (99 + 1) * 0.95: a new normal picture is above the 95th of 99 in 5 of 100 cases.
    assert found.score.value == 95
    assert found.false_alarm_rate.value == pytest.approx(0.05)
    assert found.num_pictures == 99


def test_threshold_does_not_depend_on_the_order_of_the_scores():
    scores = list(np.random.default_rng(0).normal(size=60))

    assert choose_threshold(scores, 0.1) == choose_threshold(scores[::-1], 0.1)


def test_threshold_intervals_hold_the_truth_as_often_as_they_say():
    rng = np.random.default_rng(0)
    truth = stats.norm.ppf(0.9)
    held = {"score": 0, "rate": 0}

    for _ in range(400):
        found = choose_threshold(rng.normal(size=80).tolist(), 0.1)
        held["score"] += found.score.low <= truth <= found.score.high
        held["rate"] += found.false_alarm_rate.low <= stats.norm.sf(found.score.value) <= found.false_alarm_rate.high

    # 95% of 400 is 380; order statistics are whole, so the first is wider than it says.
    assert held["score"] >= 372
    assert held["rate"] >= 367


def test_threshold_is_unbounded_where_pictures_are_few():
    found = choose_threshold([1.0, 2.0, 3.0, 4.0], 0.25)

    assert found.score.value == 4.0
    assert math.isinf(found.score.high)


@pytest.mark.parametrize("rate", [0.0, 1.0, -0.1])
def test_threshold_refuses_a_rate_that_is_none(rate):
    with pytest.raises(UserError, match="must be above 0 and below 1"):
        choose_threshold([1.0, 2.0], rate)


def test_threshold_says_how_many_pictures_a_rate_needs():
    with pytest.raises(UserError, match=r"18 normal pictures cannot show a false-alarm rate of 0\.05.*at least 19"):
        choose_threshold([0.0] * 18, 0.05)

    assert choose_threshold([0.0] * 19, 0.05).num_pictures == 19


def test_detection_is_the_share_of_pairs_in_the_right_order():
    found = measure_detection([1.0, 2.0, 3.0, 4.0], [3.0, 5.0, 6.0])

    # 12 pairs: 3 of 4 above for 3.0 but for the tie, which counts half, 4 and 4 for the others.
    assert found.auroc.value == pytest.approx((2.5 + 4 + 4) / 12)
    assert (found.num_normal, found.num_abnormal) == (4, 3)


def test_detection_keeps_scores_apart_that_a_sigmoid_would_not():
    found = measure_detection([100.0, 101.0], [102.0, 103.0])

    assert found.auroc.value == 1.0
    assert found.average_precision == pytest.approx(1.0)


def test_detection_counts_precision_at_each_abnormal_picture():
    found = measure_detection([1.0, 3.0], [2.0, 4.0])

    # From the top: 4 right (1 of 1), 3 wrong, 2 right (2 of 3).
    assert found.average_precision == pytest.approx((1 + 2 / 3) / 2)


@pytest.mark.parametrize(("normal", "abnormal", "value"), [([0.0] * 9, [1.0] * 9, 1.0), ([1.0] * 9, [0.0] * 9, 0.0)])
def test_detection_is_never_certain(normal, abnormal, value):
    found = measure_detection(normal, abnormal)

    assert found.auroc.value == value
    assert 0.2 < found.auroc.high - found.auroc.low < 0.4


def test_detection_interval_holds_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    truth = stats.norm.cdf(1.0 / math.sqrt(2))
    held = 0

    for _ in range(200):
        found = measure_detection(rng.normal(size=40).tolist(), (1.0 + rng.normal(size=40)).tolist())
        held += found.auroc.low <= truth <= found.auroc.high

    assert held >= 182  # 95% of 200 is 190


@pytest.mark.parametrize(("normal", "abnormal"), [([], [1.0]), ([1.0], [])])
def test_detection_needs_both(normal, abnormal):
    with pytest.raises(UserError, match="cannot be told apart; give some of both"):
        measure_detection(normal, abnormal)
