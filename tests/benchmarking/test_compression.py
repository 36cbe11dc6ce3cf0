"""The script that puts compressed pictures beside JPEG and WebP."""

import numpy as np
import pytest
import skimage.data
from PIL import Image

from benchmarks.compression import large_picture, means, measure, plot, to_figures


@pytest.fixture
def picture() -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(skimage.data.astronaut()[:65, 100:180]))


def test_measure_puts_codecs_at_the_size_of_ours(tiny_vae, picture) -> None:
    rows = measure(tiny_vae, picture, None, qualities=(75.0,))

    assert [row["name"] for row in rows] == ["unquantised", "sd-vae", "JPEG", "WebP"]
    assert rows[1]["psnr_db"] == pytest.approx(rows[0]["psnr_db"], abs=0.3)
    assert rows[2]["bits_per_pixel"] == pytest.approx(rows[1]["bits_per_pixel"], rel=0.1)


def test_figures_hold_what_quantisation_costs(tiny_vae, picture) -> None:
    rows = means([measure(tiny_vae, picture, None, qualities=(75.0,))] * 2)

    cost, size = to_figures(rows, 50_000)

    assert f"{rows[0]['psnr_db'] - rows[1]['psnr_db']:.3f} dB" in cost.note
    assert (size.value, size.met) == (2.0, True)


def test_large_picture_has_ten_million_bytes(picture) -> None:
    large = large_picture([picture, picture.transpose(Image.Transpose.ROTATE_180)])

    assert 10_000_000 <= 3 * large.width * large.height < 11_000_000


def test_plot_draws_a_jpeg(tiny_vae, picture, tmp_path) -> None:
    plot(measure(tiny_vae, picture, None), tmp_path / "a.jpg", "a title")

    with Image.open(tmp_path / "a.jpg") as drawn:
        assert drawn.format == "JPEG"
