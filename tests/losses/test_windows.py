"""Windows: what is drawn, which pixels belong to it, and how a tile is held to the whole."""

import pytest
import torch

from sd_vae.errors import UserError
from sd_vae.losses import TilingConfig, Window, draw_crop, draw_tile, require_cells, tile_loss


def test_window_takes_the_pixels_of_its_cells():
    x = torch.arange(64.0).view(1, 1, 8, 8)

    part = Window(top=1, left=2, side=2)(x, factor=2)

    assert torch.equal(part, x[..., 2:6, 4:8])


def test_window_of_cells_and_of_pixels_are_the_same_place():
    z = torch.rand(1, 4, 8, 8)
    window = Window(top=3, left=0, side=5)

    pixels = window(z.repeat_interleave(8, 2).repeat_interleave(8, 3), factor=8)

    assert torch.equal(pixels, window(z).repeat_interleave(8, 2).repeat_interleave(8, 3))


def test_draw_crop_covers_every_side_and_stays_inside():
    drawn = [draw_crop(4, 0, step, 8) for step in range(200)]

    assert {window.side for window in drawn} == {4, 5, 6, 7, 8}
    assert all(0 <= start <= 8 - window.side for window in drawn for start in (window.top, window.left))
    assert len({(window.top, window.left) for window in drawn if window.side == 4}) > 10


def test_draw_tile_is_smaller_than_the_whole_and_has_an_inside():
    config = TilingConfig(weight=1.0, min_scale=0.25, margin=2)

    sides = {draw_tile(config, 0, step, 12).side for step in range(200)}

    assert sides == {5, 6, 7, 8, 9, 10, 11}  # a quarter would be 3 cells, of which two margins leave none


def test_draws_are_pure_functions_of_seed_and_step():
    config = TilingConfig(weight=1.0)

    assert draw_tile(config, 7, 3, 32) == draw_tile(config, 7, 3, 32)
    assert len({draw_tile(config, 7, step, 32) for step in range(20)}) > 15
    assert len({draw_crop(16, 7, step, 32) for step in range(20)}) > 15
    assert draw_crop(16, 7, 3, 32) != draw_crop(16, 8, 3, 32)


def test_tile_loss_is_the_mean_square_inside_the_margins():
    recon = torch.zeros(2, 3, 16, 16)
    window = Window(top=1, left=2, side=4)
    tile = torch.full((2, 3, 8, 8), 9.0)
    tile[..., 2:6, 2:6] = 0.5

    loss = tile_loss(tile, recon, window, factor=2, margin=1)

    assert float(loss) == 0.25


def test_tile_loss_of_a_decoder_that_looks_at_nothing_else_is_zero():
    recon = torch.rand(1, 3, 16, 16)
    window = Window(top=2, left=3, side=5)

    assert float(tile_loss(window(recon, 2), recon, window, factor=2, margin=0)) == 0.0


def test_tile_loss_pulls_the_tile_and_leaves_the_whole():
    recon = torch.rand(1, 3, 16, 16, requires_grad=True)
    tile = torch.rand(1, 3, 8, 8, requires_grad=True)

    tile_loss(tile, recon, Window(top=0, left=0, side=4), factor=2, margin=1).backward()

    assert recon.grad is None
    assert tile.grad is not None
    assert tile.grad[..., 2:6, 2:6].abs().min() > 0
    assert tile.grad[..., :2, :].abs().max() == 0


def test_require_cells_names_what_is_needed():
    config = TilingConfig(weight=1.0, margin=2)

    require_cells(config, 6)
    with pytest.raises(
        UserError, match=r"margin of 2 needs latents of at least 6x6 cells, these are 5x5; train on larger crops or"
    ):
        require_cells(config, 5)


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"weight": -1.0}, r"tiling.weight is -1.0, it must be a finite number >= 0"),
        ({"min_scale": 1.0}, r"tiling.min_scale is 1.0, it must be in \(0, 1\)"),
        ({"margin": -1}, r"tiling.margin is -1, it must be at least 0"),
    ],
)
def test_tiling_config_rejects(fields, match):
    with pytest.raises(UserError, match=match):
        TilingConfig(**fields)
