import numpy as np
import pytest

from eval.curves import HEIGHT, LEFT, MAX_POINTS, RIGHT, TOP, WIDTH, Axis, panel
from sd_vae.errors import UserError


def points(polyline):
    return np.array([[float(v) for v in point.split(",")] for point in polyline.split()])


def test_panel_draws_high_values_high_and_late_steps_right():
    drawn = points(panel("loss", [(0, 1.0), (10, 3.0), (20, 2.0)]).raw)

    assert drawn[:, 0].tolist() == [LEFT, (LEFT + WIDTH - RIGHT) / 2, WIDTH - RIGHT]
    assert drawn[1, 1] == TOP
    assert drawn[0, 1] > drawn[2, 1] > drawn[1, 1]


def test_panel_sorts_by_step():
    assert panel("loss", [(2, 1.0), (0, 3.0), (1, 2.0)]) == panel("loss", [(0, 3.0), (1, 2.0), (2, 1.0)])


def test_panel_turns_logarithmic_for_a_wide_range_of_positive_values():
    assert panel("loss", [(0, 100.0), (1, 1.0)]).is_log
    assert not panel("loss", [(0, 100.0), (1, 6.0)]).is_log
    assert not panel("kl", [(0, 100.0), (1, 0.0)]).is_log


def test_panel_thins_long_curves_and_keeps_their_mean():
    curve = [(step, float(step % 2)) for step in range(4000)]

    drawn = panel("loss", curve)

    assert len(points(drawn.raw)) == MAX_POINTS
    assert drawn.last == "0.5"


def test_panel_draws_a_single_point_and_a_constant():
    assert points(panel("loss", [(5, 1.0)]).raw).shape == (1, 2)
    assert len(set(points(panel("loss", [(0, 2.0), (9, 2.0)]).raw)[:, 1])) == 1


@pytest.mark.parametrize("is_log", [False, True])
def test_axis_ticks_are_few_round_and_inside(is_log):
    axis = Axis(low=0.013, high=870.0, start=HEIGHT, end=0, is_log=is_log)

    ticks = axis.ticks()

    assert 3 <= len(ticks) <= 7
    assert all(0 <= tick.at <= HEIGHT for tick in ticks)
    assert [float(tick.label) for tick in ticks] == sorted(float(tick.label) for tick in ticks)


def test_axis_places_ratios_evenly_when_logarithmic():
    axis = Axis(low=1.0, high=100.0, start=0, end=10, is_log=True)

    assert axis.place(np.array([1.0, 10.0, 100.0])).tolist() == pytest.approx([0, 5, 10])


def test_panel_refuses_an_empty_curve():
    with pytest.raises(UserError, match="'loss' has no points"):
        panel("loss", [])


def test_panel_refuses_values_that_are_not_finite():
    with pytest.raises(UserError, match="'loss' is not finite at step 7"):
        panel("loss", [(6, 1.0), (7, float("nan"))])
