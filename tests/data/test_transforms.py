import numpy as np
import pytest
import torch
from PIL import Image

from sd_vae.data.transforms import center_crop, random_resized_crop
from sd_vae.images import to_tensor


def coordinates(width, height):
    """A picture whose red is its column and whose green is its row."""
    columns, rows = np.meshgrid(np.arange(width), np.arange(height))
    return Image.fromarray(np.stack([columns, rows, 0 * rows], axis=-1).astype(np.uint8))


def as_bytes(x):
    return (x * 127.5 + 127.5).round().to(torch.int64)


def crops(image, size, scale, flip=False, count=50):
    return [random_resized_crop(image, size, scale, flip, np.random.default_rng(seed)) for seed in range(count)]


def test_random_resized_crop_without_resizing_copies_pixels():
    image = coordinates(100, 80)

    for x in crops(image, 32, (0.4, 0.4)):
        left, top = as_bytes(x)[0, 0, 0], as_bytes(x)[1, 0, 0]
        assert torch.equal(x, to_tensor(image)[0, :, top : top + 32, left : left + 32])


def test_random_resized_crop_reaches_every_corner():
    lefts, tops = zip(
        *[as_bytes(x)[:2, 0, 0].tolist() for x in crops(coordinates(40, 36), 32, (0.1, 0.1), count=300)], strict=True
    )

    assert set(lefts) == set(range(9))
    assert set(tops) == set(range(5))


def test_random_resized_crop_side_stays_within_the_scale():
    # Of a crop with side s, resized to 16 pixels, neighbours are s / 16 columns apart.
    sides = [
        (as_bytes(x)[0, 8, 12] - as_bytes(x)[0, 8, 4]).item() * 2 for x in crops(coordinates(200, 100), 16, (0.5, 0.8))
    ]

    assert min(sides) >= 50 - 4
    assert max(sides) <= 80 + 4
    assert max(sides) - min(sides) > 20


def test_random_resized_crop_takes_no_fewer_pixels_than_it_returns():
    # A fraction of 0.1 would be 10 pixels, enlarged to 64; it copies 64 instead.
    image = coordinates(100, 100)

    for x in crops(image, 64, (0.1, 0.2), count=5):
        left, top = as_bytes(x)[0, 0, 0], as_bytes(x)[1, 0, 0]
        assert torch.equal(x, to_tensor(image)[0, :, top : top + 64, left : left + 64])


@pytest.mark.parametrize(("width", "height"), [(20, 30), (1, 1), (300, 5)])
def test_random_resized_crop_enlarges_small_pictures(width, height):
    x = crops(coordinates(width, height), 64, (0.5, 1.0), count=1)[0]

    assert x.shape == (3, 64, 64)
    assert x.dtype == torch.float32
    assert x.abs().max() <= 1


def test_random_resized_crop_mirrors_half():
    mirrored = [
        bool(as_bytes(x)[0, 0, 0] > as_bytes(x)[0, 0, -1])
        for x in crops(coordinates(64, 64), 32, (1.0, 1.0), True, 200)
    ]

    # 200 fair coins: 5 standard deviations
    assert 65 < sum(mirrored) < 135


def test_random_resized_crop_is_antialiased():
    stripes = Image.fromarray(np.tile(np.array([0, 255], dtype=np.uint8), (64, 32)))

    x = crops(stripes.convert("RGB"), 16, (1.0, 1.0), count=1)[0]

    assert x.abs().max() < 0.1


def test_center_crop_takes_the_middle():
    image = coordinates(100, 40)

    assert torch.equal(center_crop(image, 40), to_tensor(image)[0, :, :, 30:70])


def test_center_crop_resizes():
    assert center_crop(coordinates(100, 40), 16).shape == (3, 16, 16)
