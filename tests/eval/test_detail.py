import math

import numpy as np
import pytest
import skimage.data
from PIL import Image, ImageFilter
from skimage.color import deltaE_ciede2000, rgb2lab

from eval.detail import ciede2000, colour_shift, gradient_retention, hf_energy_ratio
from sd_vae.errors import UserError

ALL = [ciede2000, colour_shift, gradient_retention, hf_energy_ratio]


@pytest.mark.parametrize(("measure", "best"), [*zip(ALL, (0.0, 0.0, 1.0, 1.0), strict=True)])
def test_detail_of_equal_pictures_is_perfect(measure, best, photos):
    assert measure(photos["cat"], photos["cat"].copy()) == pytest.approx(best, abs=1e-9)


@pytest.mark.parametrize("measure", ALL)
def test_detail_refuses_different_sizes(measure, photos):
    with pytest.raises(UserError, match="37x25 and 32x32 cannot be compared"):
        measure(photos["cat"], photos["astronaut"])


def test_ciede2000_equals_scikit_image(photos, noisy):
    x = photos["cat"]
    recon = noisy(x)

    theirs = deltaE_ciede2000(rgb2lab(np.asarray(x)), rgb2lab(np.asarray(recon))).mean()

    assert ciede2000(recon, x) == pytest.approx(theirs, abs=1e-6)  # worst seen 2e-15, noise of seeds 0 to 9


def test_colour_shift_sees_a_cast_and_hardly_noise(photos, noisy):
    x = photos["cat"]
    green = Image.fromarray((np.asarray(x) * [0.9, 1.0, 0.9]).astype(np.uint8))

    assert colour_shift(green, x) > 3.0
    assert colour_shift(noisy(x), x) < 1.0 < 3.0 < ciede2000(noisy(x), x)


def test_gradient_retention_falls_with_softness_and_ignores_noise(noisy):
    x = Image.fromarray(skimage.data.astronaut()).resize((128, 128))

    assert gradient_retention(x.filter(ImageFilter.GaussianBlur(1)), x) < 0.8
    assert gradient_retention(noisy(x), x) == pytest.approx(1.0, abs=0.03)


def test_hf_energy_ratio_falls_with_softness_and_rises_with_noise(noisy):
    x = Image.fromarray(skimage.data.astronaut()).resize((128, 128))

    assert hf_energy_ratio(x.filter(ImageFilter.GaussianBlur(1)), x) < 0.2
    assert hf_energy_ratio(noisy(x), x) > 1.1


def test_detail_of_a_flat_photo_is_defined(photos):
    flat = Image.new("RGB", (37, 25), (9, 9, 9))

    assert gradient_retention(flat, flat) == hf_energy_ratio(flat, flat) == 1.0
    assert hf_energy_ratio(photos["cat"], flat) == math.inf
