"""The running average of weights."""

import torch

from sd_vae.autoencoder import AutoencoderKL
from training.ema import EMA


def test_ema_follows_its_formula(tiny_vae: AutoencoderKL) -> None:
    ema = EMA(tiny_vae, decay=0.5)
    weight = tiny_vae.encoder.conv_in.weight
    expected = weight.detach().clone()

    for step in range(12):
        with torch.no_grad():
            weight.add_(1.0)
        ema.update_parameters(tiny_vae)
        decay = min(0.5, (1 + step) / (10 + step)) if step else 0.0
        expected = decay * expected + (1 - decay) * weight.detach()

    # worst seen 2.4e-7 (lerp rounds differently)
    torch.testing.assert_close(ema.module.encoder.conv_in.weight, expected, rtol=0, atol=2e-6)


def test_ema_leaves_the_trained_model_alone(tiny_vae: AutoencoderKL) -> None:
    tiny_vae.train()
    before = {name: value.clone() for name, value in tiny_vae.state_dict().items()}

    EMA(tiny_vae, decay=0.9).update_parameters(tiny_vae)

    assert tiny_vae.training
    assert all(p.requires_grad for p in tiny_vae.parameters())
    assert all(torch.equal(before[name], value) for name, value in tiny_vae.state_dict().items())
