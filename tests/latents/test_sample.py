"""Samples are what the prior draws, decoded; each is a function of (seed, number) alone."""

from typing import Any

import pytest
import torch

from sd_vae.autoencoder import AutoencoderKL
from sd_vae.errors import UserError
from sd_vae.latents.prior import NormalPrior
from sd_vae.latents.sample import sample


def test_sample_is_the_decoded_draw(tiny_vae: AutoencoderKL) -> None:
    (one,) = sample(tiny_vae, num=1, size=(8, 12))

    assert one.z.shape == (4, 4, 6)
    with torch.no_grad():
        expected = tiny_vae.decode(one.z[None]).sample[0].clamp(-1, 1)
    torch.testing.assert_close(one.x, expected)


def test_sample_depends_on_seed_and_number_alone(tiny_vae: AutoencoderKL) -> None:
    few = [one.z for one in sample(tiny_vae, num=2, size=(8, 8), seed=5)]
    many = [one.z for one in sample(tiny_vae, num=4, size=(8, 8), seed=5)]
    others = [one.z for one in sample(tiny_vae, num=2, size=(8, 8), seed=6)]

    assert all(torch.equal(a, b) for a, b in zip(few, many, strict=False))
    assert not any(torch.equal(a, b) for a in many for b in others)
    assert not torch.equal(many[0], many[1])


def test_sample_at_temperature_0_is_the_mean(tiny_vae: AutoencoderKL) -> None:
    (one,) = sample(tiny_vae, num=1, size=(8, 8), temperature=0.0)

    assert not one.z.any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num": 0}, r"num is 0, it must be at least 1"),
        ({"temperature": -1.0}, r"temperature is -1.0, it must be a finite number of at least 0"),
        ({"temperature": float("nan")}, r"temperature is nan"),
        ({"size": (8, 9)}, r"size is 8x9 pixels, both sides must be multiples of 2"),
        ({"size": (0, 8)}, r"size is 0x8 pixels"),
        ({"prior": NormalPrior(3)}, r"the prior is of 3 latent channels, the VAE takes 4; fit it"),
    ],
)
def test_sample_refuses(options: dict[str, Any], message: str, tiny_vae: AutoencoderKL) -> None:
    with pytest.raises(UserError, match=message):
        sample(tiny_vae, **options)
