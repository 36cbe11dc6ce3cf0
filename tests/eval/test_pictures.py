import numpy as np
import pytest
import torch
from PIL import Image

from eval.pictures import ERROR_CEILING, TILE_GAP, error_map, latent_channels, latent_colours, side_by_side


def luminance(picture):
    return np.asarray(picture.convert("L"), float)


def test_error_map_is_black_where_pictures_are_equal(photos):
    assert luminance(error_map(photos["cat"], photos["cat"])).max() <= 1


def test_error_map_grows_with_the_difference_up_to_its_ceiling():
    x = Image.new("RGB", (ERROR_CEILING + 40, 1))
    recon = Image.fromarray(np.arange(ERROR_CEILING + 40, dtype=np.uint8)[None, :, None].repeat(3, axis=2))

    brightness = luminance(error_map(recon, x))[0]

    assert (np.diff(brightness[: ERROR_CEILING + 1]) >= 0).all()
    assert brightness[ERROR_CEILING] == brightness[-1] > 240


def test_error_map_does_not_know_the_sign(photos, noisy):
    x = photos["cat"]

    assert error_map(noisy(x), x).tobytes() == error_map(x, noisy(x)).tobytes()


def test_latent_channels_are_tiles_of_one_pixel_a_cell():
    z = torch.randn(1, 3, 5, 7, generator=torch.Generator().manual_seed(0))

    assert latent_channels(z).size == (3 * 7 + 2 * TILE_GAP, 5)
    assert latent_channels(z.repeat(1, 2, 1, 1)).size == (4 * 7 + 3 * TILE_GAP, 2 * 5 + TILE_GAP)


def test_latent_channels_stand_in_reading_order_between_clear_gaps():
    z = torch.zeros(1, 6, 1, 2)
    z[0, 5, 0, 1] = 1.0

    sheet = latent_channels(z)

    assert [sheet.getpixel(at) for at in ((0, 0), (2, 0), (4, 3), (5, 3), (8, 3))] == [
        (128, 255),
        (0, 0),
        (0, 255),
        (255, 255),
        (0, 0),
    ]


def test_latent_channels_are_stretched_each_by_itself_and_shrug_off_outliers():
    z = torch.linspace(0, 1, 400).reshape(1, 1, 20, 20).repeat(1, 2, 1, 1)
    z[0, 1] *= 1000
    z[0, 0, 0, 0] = 1e6

    strip = np.asarray(latent_channels(z).convert("L"))

    np.testing.assert_allclose(strip[1:, :20], strip[1:, 20 + TILE_GAP :], atol=3)


def test_latent_channels_show_a_constant_as_mid_grey():
    assert latent_channels(torch.full((1, 1, 2, 2), 3.0)).getcolors() == [(4, (128, 255))]


def test_latent_colours_show_the_strongest_component_as_red():
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(1, 6, 16, 16, generator=generator)
    ramp = torch.linspace(-20, 20, 16).expand(16, 16)
    z[0, 4] = ramp

    red = np.asarray(latent_colours(z), float)[..., 0]

    assert np.corrcoef(red.ravel(), ramp.numpy().ravel())[0, 1] > 0.99


def test_latent_colours_do_not_depend_on_the_order_of_channels():
    z = torch.randn(1, 5, 9, 8, generator=torch.Generator().manual_seed(0))

    one, two = (np.asarray(latent_colours(order), int) for order in (z, z.flip(1)))

    # rounding may move a level
    assert np.abs(one - two).max() <= 1


def test_side_by_side_aligns_tops_on_white():
    strip = side_by_side([Image.new("RGB", (3, 4), "red"), Image.new("RGB", (2, 2), "blue")], gap=1)

    assert strip.size == (6, 4)
    assert [strip.getpixel(at) for at in ((0, 3), (3, 0), (4, 1), (4, 2))] == [
        (255, 0, 0),
        (255, 255, 255),
        (0, 0, 255),
        (255, 255, 255),
    ]


@pytest.mark.parametrize("num_channels", [4, 16])
def test_latent_pictures_take_any_number_of_channels(num_channels):
    z = torch.randn(1, num_channels, 6, 5, dtype=torch.bfloat16)

    assert latent_colours(z).size == (5, 6)
    assert latent_channels(z).size == (4 * 5 + 3 * TILE_GAP, (num_channels // 4) * (6 + TILE_GAP) - TILE_GAP)
