"""What Accelerate wraps: everything with a gradient, in one call; and what a step does to places."""

from typing import Any

import torch

from sd_vae.autoencoder import AutoencoderKL
from sd_vae.losses import EquivarianceConfig, TilingConfig, Window
from sd_vae.losses.equivariance import IDENTITY
from training.config import ModelConfig
from training.model import prepare_training_
from training.step import Geometry, TrainingForward, draw_geometry


def test_forward_equals_encode_sample_decode(tiny_vae: AutoencoderKL) -> None:
    x, noise = torch.rand(2, 3, 16, 16) * 2 - 1, torch.randn(2, 4, 8, 8)

    recon, posterior = TrainingForward(tiny_vae)(x, noise)

    expected = tiny_vae.encode(x).latent_dist
    torch.testing.assert_close(posterior.mean, expected.mean, rtol=0, atol=0)
    z = expected.mean + expected.std * noise
    torch.testing.assert_close(recon, tiny_vae.decode(z).sample, rtol=0, atol=0)


def test_forward_gives_every_parameter_a_gradient(tiny_vae: AutoencoderKL) -> None:
    forward = TrainingForward(tiny_vae.train())

    recon, posterior = forward(torch.rand(1, 3, 16, 16), torch.randn(1, 4, 8, 8))
    (recon.square().mean() + posterior.kl().mean()).backward()

    without = [name for name, parameter in tiny_vae.named_parameters() if parameter.grad is None]
    assert not without


def test_forward_keeps_moments_in_fp32_under_autocast(tiny_vae: AutoencoderKL) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        _, posterior = TrainingForward(tiny_vae)(torch.rand(1, 3, 16, 16), torch.randn(1, 4, 8, 8))

    assert posterior.mean.dtype == posterior.logvar.dtype == torch.float32


def test_decoder_training_leaves_encoder_and_quant_conv_still(tiny_vae: AutoencoderKL) -> None:
    parameters = prepare_training_(tiny_vae, ModelConfig(trainable="decoder"))

    moving = {name.split(".")[0] for name, p in tiny_vae.named_parameters() if p.requires_grad}
    assert moving == {"decoder", "post_quant_conv"}
    assert len(parameters) == sum(p.requires_grad for p in tiny_vae.parameters())


def test_forward_decodes_a_tile_by_itself(tiny_vae: AutoencoderKL) -> None:
    x, noise = torch.rand(1, 3, 16, 16) * 2 - 1, torch.randn(1, 4, 8, 8)
    tile = Window(top=1, left=3, side=4)

    recon, posterior, decoded = TrainingForward(tiny_vae)(x, noise, IDENTITY, tile)

    z = posterior.sample(noise=noise)
    torch.testing.assert_close(recon, tiny_vae.decode(z).sample, rtol=0, atol=0)
    torch.testing.assert_close(decoded, tiny_vae.decode(z[..., 1:5, 3:7]).sample, rtol=0, atol=0)


def test_geometry_leaves_everything_as_it_is_by_default(make_config: Any) -> None:
    assert draw_geometry(make_config(), 0, 2) == Geometry(crop=None, similarity=IDENTITY, tile=None)


def test_geometry_keeps_every_part_inside_what_the_parts_before_leave(make_config: Any) -> None:
    loss = {
        "equivariance": EquivarianceConfig(probability=0.5, min_scale=0.5),
        "tiling": TilingConfig(weight=1.0, margin=1),
    }
    config = make_config(data={"size": 64, "min_size": 32}, loss=loss)

    drawn = [draw_geometry(config, step, 2) for step in range(200)]

    assert {geometry.crop.side for geometry in drawn if geometry.crop} == set(range(16, 33))
    for crop, similarity, tile in drawn:
        assert crop is not None
        assert tile is not None
        cells = similarity(torch.zeros(1, 1, crop.side, crop.side)).shape[-1]
        assert tile.side < cells
        assert max(tile.top, tile.left) + tile.side <= cells
