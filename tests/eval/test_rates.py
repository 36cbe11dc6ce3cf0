import pytest

from eval.codecs import encode
from eval.deeper import Deeper
from eval.evaluator import evaluate
from eval.metrics import psnr_db
from eval.protocols import get_protocol
from eval.rates import QUALITIES, rate_metrics

PSNR = get_protocol("pixels", metrics=["psnr_db"])


@pytest.fixture
def rate(tiny_vae, photos):
    """The plot of PSNR over the rate, of a model and two codecs."""
    large = {name: photo.resize((96, 80)) for name, photo in photos.items()}
    result = evaluate(
        {"ours": tiny_vae}, large, protocol=PSNR, codecs=("JPEG", "WebP"), deeper=Deeper(rates=("JPEG", "WebP"))
    )
    (plot,) = result.plots
    return plot, result, large


def test_codecs_are_curves_over_the_rate_and_models_are_points(rate):
    plot, result, _ = rate

    assert (plot.title, plot.metric, list(plot.lines)) == ("Rate", "psnr_db", ["ours", "JPEG", "WebP"])
    assert plot.lines["ours"] == ((result.rows[0].bits_per_pixel, result.rows[0].means["psnr_db"]),)
    for codec in ("JPEG", "WebP"):
        bits, psnrs = zip(*plot.lines[codec], strict=True)
        assert len(bits) == len(QUALITIES)
        assert list(psnrs) == sorted(psnrs)
        assert bits[0] < bits[-1] / 3


def test_a_point_is_bits_of_all_photos_over_their_pixels_and_the_mean_metric(rate):
    plot, _, large = rate

    coded = [encode(photo, "JPEG", QUALITIES[0]) for photo in large.values()]
    bits, psnr = plot.lines["JPEG"][0]
    assert bits == pytest.approx(8 * sum(one.num_bytes for one in coded) / (3 * 96 * 80), rel=1e-12)
    psnrs = [psnr_db(one.recon, photo) for one, photo in zip(coded, large.values(), strict=True)]
    assert psnr == pytest.approx(sum(psnrs) / 3, rel=1e-12)


def test_the_rate_is_drawn_for_psnr_and_lpips():
    class Measures:
        table = dict.fromkeys(("psnr_db", "ssim", "lpips_alex", "l1"))

    assert rate_metrics(Measures()) == ["psnr_db", "lpips_alex"]
