import logging

import pytest
import torch

from eval.deeper import MAX_TILING_ERROR, Deeper, DtypeCheck, RoundTrips, Sizes, TilingCheck
from eval.evaluator import evaluate
from eval.measures import build_measures
from eval.protocols import get_protocol
from eval.roundtrip import decode_picture, encode_picture
from sd_vae.errors import UserError

PIXELS = get_protocol("pixels")
PSNR = get_protocol("pixels", metrics=["psnr_db"])


@pytest.fixture
def measures():
    return build_measures(PSNR)


def test_round_trips_send_the_output_through_again(tiny_vae, photos):
    from eval.metrics import psnr_db

    x = photos["cat"]

    result = evaluate({"ours": tiny_vae}, {"cat": x}, protocol=PSNR, deeper=Deeper(round_trips=3))

    expected, recon = [], x
    for trip in (1, 2, 3):
        recon = decode_picture(tiny_vae, encode_picture(tiny_vae, recon).z, x.size)
        expected.append((float(trip), psnr_db(recon, x)))
    (plot,) = result.plots
    assert (plot.title, plot.metric) == ("Repeated round trips", "psnr_db")
    assert plot.lines == {"ours": tuple(expected)}


def test_round_trips_are_means_over_photos_and_begin_with_the_rows_own(tiny_vae, photos):
    result = evaluate({"ours": tiny_vae}, photos, deeper=Deeper(round_trips=2))

    assert {plot.metric: plot.lines["ours"][0] for plot in result.plots} == {
        name: (1.0, mean) for name, mean in result.rows[0].means.items()
    }


def test_sizes_are_evaluations_at_each_size(tiny_vae, photos):
    result = evaluate({"ours": tiny_vae}, photos, deeper=Deeper(sizes=(24, 16)))

    lines = {plot.metric: plot.lines["ours"] for plot in result.plots}
    for index, size in enumerate((16, 24)):
        alone = evaluate({"ours": tiny_vae}, photos, size=size).rows[0].means
        assert {name: line[index] for name, line in lines.items()} == {
            name: (float(size), value) for name, value in alone.items()
        }


def test_dtype_check_passes_bfloat16_and_leaves_the_model_alone(tiny_vae, photos):
    result = evaluate({"ours": tiny_vae}, photos, deeper=Deeper(dtypes=("bfloat16",)))

    (check,) = result.checks
    assert (check.title, check.row, check.passed) == ("bfloat16 against float32", "ours", True)
    assert check.facts["photos that did not come back"] == "0 of 3"
    assert next(tiny_vae.parameters()).dtype == torch.float32


def test_dtype_check_is_not_remarked_on_by_diffusers(tiny_vae, photos, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("diffusers"), "handlers", [caplog.handler])

    evaluate({"ours": tiny_vae}, {"cat": photos["cat"]}, protocol=PSNR, deeper=Deeper(dtypes=("bfloat16",)))

    assert caplog.messages == []


def test_dtype_check_counts_photos_that_overflow(tiny_vae, photos, monkeypatch):
    monkeypatch.setattr("sd_vae.autoencoder.ensure_finite", lambda *given: given[-1])
    probe = DtypeCheck("ours", tiny_vae, PIXELS, "bfloat16")
    torch.nn.init.constant_(probe._route.vae.decoder.conv_out.bias, float("inf"))
    from eval.photos import Photo
    from eval.probes import Trial

    x = photos["cat"]
    found = probe(Trial(Photo("cat", x), x, x, {"ours": x}))

    (check,) = probe.conclude([found]).checks
    assert not check.passed
    assert check.facts["photos that did not come back"] == "1 of 1"


def test_tiling_check_passes_ours_and_turns_tiling_off_again(tiny_vae, photos):
    result = evaluate({"ours": tiny_vae}, photos, deeper=Deeper(tiling=True))

    (check,) = result.checks
    assert check.passed
    assert not tiny_vae.use_tiling


def test_tiling_check_does_not_pass_tiles_that_blend(tiny_vae, photos):
    theirs = tiny_vae.to_diffusers()  # tiles of sample_size 32 with statistics of their own

    result = evaluate({"theirs": theirs}, {"cat": photos["cat"].resize((80, 80))}, deeper=Deeper(tiling=True))

    (check,) = result.checks
    assert not check.passed, check.facts
    assert f"at most {MAX_TILING_ERROR:.0e} is right" in check.facts["largest difference, decode"]


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda vae, m: RoundTrips({"a": vae}, PIXELS, m, 1), "round trips are 1, they must be at least 2"),
        (lambda vae, m: Sizes({"a": vae}, PIXELS, m, (16, 16)), "a size is given twice among 16, 16"),
        (lambda vae, m: Sizes({"a": vae}, PIXELS, m, (0,)), "size is 0 pixels"),
        (lambda vae, m: DtypeCheck("a", vae.half(), PIXELS, "float16"), "a runs in float16, half precision is checked"),
        (lambda vae, m: TilingCheck("a", torch.nn.Linear(1, 1)), "'a' is a Linear"),
    ],
)
def test_deeper_refuses(ask, message, tiny_vae, measures):
    with pytest.raises(UserError, match=message):
        ask(tiny_vae, measures)


def test_tiling_check_refuses_a_model_without_tiling(tiny_vae, monkeypatch):
    monkeypatch.setattr("eval.deeper._can_tile", lambda vae: False)

    with pytest.raises(UserError, match="which cannot tile; leave --tiling-check out"):
        TilingCheck("a", tiny_vae)
