import numpy as np
import pytest
import skimage.data
from PIL import Image

from eval.baselines import box_average
from eval.metrics import psnr_db
from eval.photos import fit_photo
from sd_vae.errors import UserError


def test_box_average_replaces_blocks_by_their_mean():
    pixels = np.arange(4 * 4 * 3, dtype=np.uint8).reshape(4, 4, 3)

    averaged = np.asarray(box_average(Image.fromarray(pixels), 2))

    means = pixels.reshape(2, 2, 2, 2, 3).astype(float).mean(axis=(1, 3))
    assert averaged.tolist() == np.rint(means).repeat(2, 0).repeat(2, 1).tolist()


def test_box_average_keeps_size_and_averages_cut_blocks_over_their_own_pixels():
    pixels = np.zeros((5, 7, 3), np.uint8)
    pixels[4, 6] = 200

    averaged = np.asarray(box_average(Image.fromarray(pixels), 4))

    assert averaged.shape == (5, 7, 3)
    assert averaged[4, 4:, 0].tolist() == [67, 67, 67]
    assert averaged[:4].max() == 0


def test_box_average_of_one_pixel_is_the_picture(photos):
    assert box_average(photos["cat"], 1).tobytes() == photos["cat"].tobytes()


def test_box_average_refuses_an_empty_block(photos):
    with pytest.raises(UserError, match="0 pixels, it must be at least 1"):
        box_average(photos["cat"], 0)


@pytest.mark.parametrize(("block", "expected_db"), [(32, 18.09), (16, 20.56)])
def test_box_average_is_the_yardstick_of_the_demo(block, expected_db):
    names = ("chelsea", "astronaut", "coffee")
    held_out = [fit_photo(Image.fromarray(getattr(skimage.data, name)()), 512) for name in names]

    scores = [psnr_db(box_average(photo, block), photo) for photo in held_out]

    assert np.mean(scores) == pytest.approx(expected_db, abs=0.02)
