"""Turning and scaling: what is drawn, what it does, and how far a VAE is from commuting with it."""

from collections import Counter

import pytest
import torch

from sd_vae.errors import UserError
from sd_vae.losses.config import EquivarianceConfig
from sd_vae.losses.equivariance import IDENTITY, Similarity, draw_similarity, equivariance_errors

CPU = torch.device("cpu")


def test_identity_returns_the_very_tensor():
    z = torch.randn(1, 4, 8, 8)

    assert IDENTITY(z) is z


def test_similarity_turns_counterclockwise_by_quarters():
    x = torch.arange(4.0).view(1, 1, 2, 2)

    turned = Similarity(quarter_turns=1)(x)

    assert turned.flatten().tolist() == [1.0, 3.0, 0.0, 2.0]


@pytest.mark.parametrize("scale", [0.25, 0.4, 0.9])
def test_similarity_keeps_the_grids_of_latent_and_picture_aligned(scale):
    similarity = Similarity(scale=scale, quarter_turns=1)

    z, x = similarity(torch.randn(1, 4, 6, 10)), similarity(torch.randn(1, 3, 48, 80), factor=8)

    assert [8 * side for side in z.shape[-2:]] == list(x.shape[-2:])


def test_draw_similarity_is_a_pure_function_of_seed_and_step():
    config = EquivarianceConfig(probability=1.0)

    assert draw_similarity(config, 7, 3, 32) == draw_similarity(config, 7, 3, 32)
    assert len({draw_similarity(config, 7, step, 32) for step in range(20)}) > 15


def test_draw_similarity_off_is_the_identity():
    assert draw_similarity(EquivarianceConfig(), 0, 0, 32) is IDENTITY


def test_draw_similarity_has_the_published_shares_and_scales():
    config = EquivarianceConfig(probability=0.5, small_probability=0.25)

    drawn = [draw_similarity(config, 0, step, 32) for step in range(2000)]

    kinds = Counter("turned" if s.quarter_turns else "small" if s.scale < 1 else "plain" for s in drawn)
    # three standard deviations of 2000 draws are 0.034
    assert {kind: count / 2000 for kind, count in kinds.items()} == pytest.approx(
        {"turned": 0.5, "small": 0.125, "plain": 0.375}, abs=0.034
    )
    assert {s.scale for s in drawn if s.quarter_turns} == {k / 32 for k in range(8, 32)}
    assert {s.quarter_turns for s in drawn} == {0, 1, 2, 3}
    assert not any(s.of_latent for s in drawn if s.scale < 1 and not s.quarter_turns)


class Averaging:
    """An encoder that averages 2x2 pixels and a decoder that repeats: exactly equivariant to turns."""

    factor = 2

    def encode(self, x):
        z = torch.nn.functional.avg_pool2d(x, 2)
        return type("Output", (), {"latent_dist": type("Posterior", (), {"mode": lambda self: z})()})

    def decode(self, z):
        return type("Output", (), {"sample": torch.nn.functional.interpolate(z, scale_factor=2)})


def test_equivariance_errors_of_an_equivariant_model_are_zero_for_turns():
    photos = torch.nn.functional.interpolate(torch.rand(2, 3, 8, 8), scale_factor=2)

    errors = equivariance_errors(Averaging(), photos, CPU)

    assert errors["latent_turn"] == 0.0
    assert errors["picture_turn"] == 0.0
    assert errors["latent_scale"] > 0


def test_equivariance_errors_of_a_random_vae_are_large(tiny_vae):
    errors = equivariance_errors(tiny_vae, torch.rand(2, 3, 16, 16) * 2 - 1, CPU)

    assert set(errors) == {"latent_turn", "picture_turn", "latent_scale", "picture_scale"}
    assert all(error > 0.3 for error in errors.values())


@pytest.mark.parametrize("fields", [{"probability": 1.5}, {"small_probability": -0.1}, {"min_scale": 0.0}])
def test_equivariance_config_rejects(fields):
    name, value = next(iter(fields.items()))
    with pytest.raises(UserError, match=rf"equivariance.{name} is {value}, it must be in"):
        EquivarianceConfig(**fields)
