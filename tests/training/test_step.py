"""What Accelerate wraps: everything with a gradient, in one call."""

import torch

from sd_vae.autoencoder import AutoencoderKL
from training.config import ModelConfig
from training.model import prepare_training_
from training.step import TrainingForward


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
