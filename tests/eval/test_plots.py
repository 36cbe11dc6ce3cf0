import math
import re
from dataclasses import replace

import numpy as np
import pytest

from eval.curves import HEIGHT, LEFT, RIGHT, WIDTH
from eval.metrics import METRICS
from eval.plots import MAX_DOTS, NUM_COLOURS, STRIP_SPREAD, chart, distributions, mark
from eval.results import Evaluation, Interval, PhotoResult, PhotoSize, Plot, Row

PSNR = METRICS["psnr_db"]


@pytest.fixture
def evaluate_made():
    """Return an evaluation with rows of given PSNRs, photo by photo."""

    def build(**psnrs_db):
        rows = []
        for name, values in psnrs_db.items():
            photos = tuple(
                PhotoResult(name=str(n), metrics={"psnr_db": value}, latent_shape=None, latents=None)
                for n, value in enumerate(values)
            )
            rows.append(
                Row(name=name, kind="vae", means={"psnr_db": float(np.mean(values))}, latents=None, photos=photos)
            )
        num = len(next(iter(psnrs_db.values())))
        sizes = tuple(PhotoSize(name=str(n), width=8, height=8) for n in range(num))
        return Evaluation(size=None, metrics={"psnr_db": PSNR}, photos=sizes, rows=tuple(rows))

    return build


def plot_of(**lines):
    return Plot(title="Trips", x_label="trips", metric="psnr_db", lines=lines)


def points(polyline):
    return [tuple(float(v) for v in point.split(",")) for point in polyline.split()]


def circles(path):
    """Centres of the dots in a path."""
    return [(float(x) + 2.5, float(y)) for x, y in re.findall(r"M([\d.-]+),([\d.-]+)a", path)]


def test_chart_puts_every_row_on_the_same_axes(evaluate_made):
    drawn = chart(plot_of(a=((1, 30.0), (2, 20.0)), b=((1, 20.0),)), PSNR, evaluate_made(a=(1.0,), b=(1.0,)))

    (first, last), (other,) = points(drawn.lines[0].points), points(drawn.lines[1].points)
    assert first[0] < last[0]
    assert first[1] < last[1]  # SVG counts downwards
    assert other == (first[0], last[1])


def test_chart_gives_a_row_the_same_colour_and_mark_in_every_plot(evaluate_made):
    evaluation = evaluate_made(a=(1.0,), b=(1.0,), c=(1.0,))

    first = chart(plot_of(b=((1, 2.0),), c=((1, 3.0),)), PSNR, evaluation)
    second = chart(plot_of(c=((1, 3.0),)), PSNR, evaluation)

    assert [line.colour for line in first.lines] == [1, 2]
    assert (first.lines[1].colour, first.lines[1].key) == (second.lines[0].colour, second.lines[0].key)


def test_chart_draws_a_codecs_curve_in_the_colour_of_its_row(evaluate_made):
    evaluation = evaluate_made(**{"a": (1.0,), "b": (1.0,), "JPEG at equal bits": (1.0,)})

    drawn = chart(plot_of(a=((1, 2.0),), JPEG=((1, 2.0), (2, 3.0))), PSNR, evaluation)

    assert [(line.name, line.colour) for line in drawn.lines] == [("a", 0), ("JPEG", 2)]


def test_chart_of_a_line_that_is_no_row_has_its_own_colour(evaluate_made):
    drawn = chart(plot_of(a=((1, 2.0),), jpeg=((1, 3.0),)), PSNR, evaluate_made(a=(1.0,)))

    assert drawn.lines[0].key != drawn.lines[1].key
    assert drawn.lines[0].colour != drawn.lines[1].colour


def test_chart_leaves_out_what_is_not_finite(evaluate_made):
    drawn = chart(plot_of(a=((0.5, math.inf), (1, 30.0), (2, math.nan))), PSNR, evaluate_made(a=(1.0,)))

    assert len(points(drawn.lines[0].points)) == 1
    assert [words for _, words in drawn.lines[0].marks] == ["a: 30.00 at 1"]


def test_chart_of_nothing_finite_is_empty(evaluate_made):
    drawn = chart(plot_of(a=((1, math.inf),)), PSNR, evaluate_made(a=(1.0,)))

    assert drawn.lines[0].points == ""
    assert drawn.lines[0].marks == ()


def test_chart_counts_whole_numbers_in_whole_numbers(evaluate_made):
    lines = {"a": tuple((n, float(n)) for n in range(1, 9))}

    drawn = chart(plot_of(**lines), PSNR, evaluate_made(a=(1.0,)))

    assert all(float(tick.label).is_integer() for tick in drawn.x_ticks)


def test_chart_marks_the_sizes_that_were_tried(evaluate_made):
    few = chart(plot_of(a=((96, 1.0), (192, 2.0), (512, 3.0))), PSNR, evaluate_made(a=(1.0,)))
    close = chart(plot_of(a=((96, 1.0), (100, 2.0), (512, 3.0))), PSNR, evaluate_made(a=(1.0,)))

    assert [tick.label for tick in few.x_ticks] == ["96", "192", "512"]
    assert [tick.at for tick in few.x_ticks] == [x for x, _ in points(few.lines[0].points)]
    assert [tick.label for tick in close.x_ticks] != ["96", "100", "512"]


def test_chart_of_a_wide_range_is_logarithmic_and_says_so(evaluate_made):
    drawn = chart(plot_of(a=((0.1, 20.0), (1.0, 30.0), (10.0, 40.0))), PSNR, evaluate_made(a=(1.0,)))

    x = [place[0] for place in points(drawn.lines[0].points)]
    assert x[1] - x[0] == pytest.approx(x[2] - x[1], abs=0.2)
    assert drawn.x_label == "trips (log scale)"


def test_chart_does_not_spread_what_is_nearly_equal(evaluate_made):
    drawn = chart(plot_of(a=((0.998, 20.0), (1.002, 30.0))), PSNR, evaluate_made(a=(1.0,)))

    (left, _), (right, _) = points(drawn.lines[0].points)
    assert 0 < right - left < WIDTH / 20
    assert left > WIDTH / 3


def test_chart_stays_inside_its_frame(evaluate_made):
    drawn = chart(plot_of(a=((1, 20.0), (9, 40.0))), PSNR, evaluate_made(a=(1.0,)))

    for x, y in points(drawn.lines[0].points):
        assert LEFT <= x <= WIDTH - RIGHT
        assert 0 <= y <= HEIGHT


def test_distribution_has_a_dot_a_photo_and_the_mean_between(evaluate_made):
    (spread,) = distributions(evaluate_made(a=(20.0, 30.0, 40.0)))

    dots = circles(spread.strips[0].path)
    x = [place[0] for place in dots]
    assert x == sorted(x)
    assert spread.strips[0].mean == pytest.approx((x[1],) * 3, abs=0.1)
    assert all(abs(y - spread.strips[0].y) <= STRIP_SPREAD for _, y in dots)
    assert spread.strips[0].words == "a: mean 30.00, photos from 20.00 to 40.00"


def test_distribution_draws_the_interval_of_the_mean(evaluate_made):
    evaluation = evaluate_made(a=(20.0, 30.0, 40.0))
    row = replace(evaluation.rows[0], intervals={"psnr_db": Interval(value=30.0, low=25.0, high=35.0)})

    (spread,) = distributions(replace(evaluation, rows=(row,)))

    mean, low, high = spread.strips[0].mean
    left, right = (x for x, _ in (circles(spread.strips[0].path)[0], circles(spread.strips[0].path)[2]))
    assert [(low - left) / (right - left), (high - left) / (right - left)] == pytest.approx([0.25, 0.75], abs=0.01)
    assert low < mean < high


def test_distribution_of_many_photos_is_a_histogram(evaluate_made):
    values = [20.0] * MAX_DOTS + [30.0] * (MAX_DOTS // 2)

    (spread,) = distributions(evaluate_made(a=values))

    heights = [float(a) - float(b) for a, b in re.findall(r"M[\d.]+,([\d.]+)V([\d.]+)", spread.strips[0].path)]
    assert heights == pytest.approx([2 * STRIP_SPREAD, STRIP_SPREAD])
    assert circles(spread.strips[0].path) == []


def test_distribution_leaves_out_infinity_and_an_infinite_mean(evaluate_made):
    (spread,) = distributions(evaluate_made(a=(20.0, math.inf), b=(10.0, 30.0)))

    assert len(circles(spread.strips[0].path)) == 1
    assert spread.strips[0].mean is None
    assert spread.strips[1].mean is not None


def test_there_is_no_distribution_of_one_photo_or_of_nothing_finite(evaluate_made):
    assert distributions(evaluate_made(a=(20.0,))) == []
    assert distributions(evaluate_made(a=(math.inf, math.inf))) == []


def test_marks_of_the_first_rows_differ_and_their_repeat_has_another_colour():
    paths = [mark(number, 0, 0) for number in range(7)]

    assert len(set(paths)) == 7
    assert mark(7, 0, 0) == paths[0]
    assert 7 % NUM_COLOURS != 0
