import pytest
import torch

from eval.metrics import psnr_db
from eval.photos import fit_photo, list_photos, read_photo
from eval.roundtrip import decode_picture, encode_picture
from eval.sanity import shuffled_latents_psnr_db, zero_latents_psnr_db
from sd_vae.errors import UserError


def test_zero_latents_compare_photos_with_what_zeros_decode_to(tiny_vae, photos):
    score = zero_latents_psnr_db(tiny_vae, photos, size=16)

    blank = decode_picture(tiny_vae, torch.zeros(1, 4, 8, 8), (16, 16))
    assert score == pytest.approx(sum(psnr_db(blank, x) for x in _squares(photos)) / 3, rel=1e-12)


def test_shuffled_latents_compare_each_photo_with_the_next_ones_decode(tiny_vae, photos):
    score = shuffled_latents_psnr_db(tiny_vae, photos, size=16)

    squares = _squares(photos)
    decoded = [decode_picture(tiny_vae, encode_picture(tiny_vae, x).z, x.size) for x in squares]
    expected = sum(psnr_db(decoded[(i + 1) % 3], x) for i, x in enumerate(squares)) / 3
    assert score == pytest.approx(expected, rel=1e-12)


def test_shuffled_latents_need_two_photos(tiny_vae, photos):
    with pytest.raises(UserError, match="there is 1; give at least 2"):
        shuffled_latents_psnr_db(tiny_vae, {"cat": photos["cat"]})


def test_shuffled_latents_need_one_size(tiny_vae, photos):
    with pytest.raises(UserError, match="photos of one size, these have 3"):
        shuffled_latents_psnr_db(tiny_vae, photos)


def _squares(photos):
    return [fit_photo(read_photo(photo), 16) for photo in list_photos(photos)]
