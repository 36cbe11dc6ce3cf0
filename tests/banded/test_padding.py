"""Sizes that the factor does not divide: refused by the model, padded by reflection and cropped back elsewhere."""

import pytest
import torch
from banded_cases import draw, make_vae, run
from PIL import Image

from sd_vae import crop, open_image, pad_to_factor, to_pil, to_tensor
from sd_vae.cli import main
from sd_vae.errors import UserError


@pytest.mark.parametrize("tiling", [False, True])
def test_encode_refuses_a_size_that_the_factor_does_not_divide(tiling) -> None:
    vae = make_vae()
    vae.enable_tiling(tiling)
    x = draw(vae, "encode", 4, 4)[..., :-1]

    with pytest.raises(UserError, match=r"image size 8x7 is not a multiple of 2 in both directions; pad it with"):
        run(vae, "encode", x)


def test_pad_to_factor_reflects_at_the_right_and_the_bottom() -> None:
    x = torch.rand(2, 3, 13, 11)

    padded = pad_to_factor(x, 8)

    rows, columns = [*range(13), 11, 10, 9], [*range(11), 9, 8, 7, 6, 5]
    assert torch.equal(padded, x[:, :, rows][..., columns])


def test_pad_to_factor_repeats_the_edge_of_what_is_too_short_to_reflect() -> None:
    x = torch.rand(1, 3, 3, 8)

    padded = pad_to_factor(x, 8)

    assert torch.equal(padded, x[:, :, [0, 1, 2, 2, 2, 2, 2, 2]])


@pytest.mark.parametrize(("shape", "factor"), [((5, 7), 0), ((5, 7), -8), ((5, 7), 2.5), ((0, 7), 8)])
def test_pad_to_factor_refuses(shape, factor) -> None:
    with pytest.raises(UserError, match=r"a picture of \dx7 pixels cannot be padded to multiples of .*; give some"):
        pad_to_factor(torch.zeros(1, 3, *shape), factor)


@pytest.mark.parametrize(("height", "width"), [(9, 4), (4, 9), (0, 4), (4, -1)])
def test_crop_refuses_what_is_not_there(height, width) -> None:
    with pytest.raises(UserError, match=f"{height}x{width} pixels cannot be cropped from 8x8; give a size within it"):
        crop(torch.zeros(1, 3, 8, 8), height, width)


def test_reconstruct_pads_and_crops_back_exactly(tmp_path) -> None:
    vae = make_vae()
    vae.save_pretrained(tmp_path / "vae")
    x = torch.rand(1, 3, 21, 15, generator=torch.Generator().manual_seed(0)) * 2 - 1
    to_pil(x).save(tmp_path / "picture.png")

    code = main(["reconstruct", str(tmp_path / "vae"), str(tmp_path / "picture.png"), "--out", str(tmp_path / "out")])

    padded = pad_to_factor(to_tensor(Image.open(tmp_path / "picture.png")), vae.factor)
    with torch.inference_mode():
        expected = to_pil(crop(vae(padded).sample, 21, 15))
    assert code == 0
    assert open_image(tmp_path / "out" / "picture.png").tobytes() == expected.tobytes()
