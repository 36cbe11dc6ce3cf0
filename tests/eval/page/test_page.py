"""What the page says, read as text."""

import html
import math
import re
from dataclasses import replace

import pytest

import eval.page
from eval.metrics import METRICS
from eval.results import Comparison, Interval, Region


@pytest.fixture
def read(evaluation):
    """Render an evaluation, with changes to it; returns the words of the page, or of one of its sections."""

    def render(section=None, *, worst=2, worst_by="psnr_db", **changes):
        page = eval.page.render(
            replace(evaluation, **changes),
            title="A page",
            summary=(),
            curves={},
            sections=(),
            provenance={},
            worst=worst,
            worst_by=worst_by,
        )
        body = page.partition("<body>")[2].partition("<script>")[0]
        if section:
            body = body.partition(f'<section aria-labelledby="{section}">')[2].partition("</section>")[0]
        return " ".join(html.unescape(re.sub("<[^>]*>", " ", body)).split())

    return render


def test_page_shows_means_with_their_intervals(read):
    words = read("numbers")

    assert "22.25 21.25 to 23.25" in words
    assert "Bits per pixel" in words
    assert "1.500" in words


def test_page_shows_numbers_of_the_whole_set(read, evaluation):
    first, *others = evaluation.rows
    rows = (replace(first, pooled={"rfid": 4.7, "my_number": 0.125}), *others)

    words = read("numbers", rows=rows)

    assert METRICS["rfid"].heading in words
    assert "4.700" in words
    assert "my_number" in words
    assert "0.1250" in words


def test_page_leaves_out_columns_that_no_row_fills(read, evaluation):
    rows = tuple(replace(row, bits_per_pixel=None, intervals={}) for row in evaluation.rows)

    words = read("numbers", rows=rows)

    assert "Bits per pixel" not in words
    assert "confidence interval" not in words


def test_page_tells_verdicts_in_words(read, evil):
    def compared(metric, verdict, value):
        interval = Interval(value=value, low=value - 0.5, high=value + 0.5)
        return Comparison(row="A", against=evil, metric=metric, difference=interval, verdict=verdict)

    words = read(
        "verdicts",
        comparisons=(
            compared("l1", "worse", 1.25),
            compared("psnr_db", "better", 1.0),
            compared("ssim", "not distinguishable", -0.25),
        ),
    )

    assert f"A against {evil}" in words
    assert "Better PSNR +1.00 dB (0.50 to 1.50)" in words
    assert "Worse L1 +1.250 levels (0.750 to 1.750)" in words
    assert "Not distinguishable SSIM −0.2500 (−0.7500 to 0.2500)" in words
    assert "fewer than 6 photos" in words
    assert words.index("Better") < words.index("Worse") < words.index("Not distinguishable")


def test_page_stamps_protocol_and_weights(read, evaluation):
    first, *others = evaluation.rows

    words = read(rows=(replace(first, fingerprint="3f" * 32), *others))

    assert "Data sha256 " + 64 * "0" in words
    assert "Weights of A " + "3f" * 32 in words


def test_page_lists_what_could_not_be_read(read):
    assert read("rejects") == "Left out 1 photo could not be read; no number counts it. broken.png the file ends early."


def test_page_says_which_checks_failed(read):
    assert read("checks") == "Checks Failed Tiled A Bound 1e-5"


def test_page_shows_marked_parts(read):
    found = Region(
        label="faces",
        row="A",
        num_regions=7,
        num_left_out=2,
        means={"psnr_db": Interval(value=25.0, low=24.0, high=26.0)},
    )

    words = read("regions", regions=(found,))

    assert words.startswith("Marked parts")
    assert words.endswith("faces A 7 2 25.00 24.00 to 26.00")


def test_page_draws_plots_with_a_legend(read, evil):
    words = read("plots")

    assert "Trips PSNR (dB) ↑" in words
    assert "A: 30.00 at 1" in words


def test_page_ranks_the_worst_and_says_which_have_no_picture(read):
    words = read("worst", worst=3)

    assert re.findall(r"[\d.]+ dB", words) == ["9.50 dB", "27.00 dB", "30.25 dB"]
    assert "unseen (not pictured) 27.00 dB" in words
    assert words.count("not pictured") == 1


def test_page_ranks_low_values_first_only_where_high_ones_are_better(read):
    lower = {"psnr_db": replace(METRICS["psnr_db"], higher_is_better=False)}

    assert re.findall(r"[\d.]+ dB", read("worst", worst=3, metrics=lower)) == ["30.25 dB", "27.00 dB", "9.50 dB"]


def test_page_ranks_photos_without_a_value_last(read, evaluation):
    first, *others = evaluation.rows
    missing, *photos = first.photos
    rows = (replace(first, photos=(replace(missing, metrics={"psnr_db": math.nan}), *photos)), *others)

    words = read("worst", worst=3, rows=rows)

    assert words.endswith("unseen (not pictured) 27.00 dB cat – dB")


def test_page_has_no_gallery_without_a_ranking(read):
    assert "Where it does worst" not in read(worst=0)
    assert "Where it does worst" not in read(worst_by=None)


def test_page_lists_the_worst_photos_where_there_are_too_many(read, monkeypatch):
    monkeypatch.setattr(eval.page, "MAX_TABLE_ROWS", 6)

    words = read("each")

    assert "The 2 photos of 3 on which A does worst in PSNR are listed" in words
    assert "unseen" in words
    assert "cat" not in words


def test_page_links_the_sections_that_it_has(read):
    words = read(checks=(), plots=())

    assert "Numbers Which is better Protocol Left out Before and after Where it does worst" in words
    assert "How photos differ Photo by photo Numbers" in words
