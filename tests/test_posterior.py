"""The diagonal Gaussian: against torch.distributions, differentiable, batch-shaped also when deterministic."""

import math

import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch.distributions import Normal, kl_divergence

from sd_vae.errors import UserError
from sd_vae.posterior import LOGVAR_MAX, LOGVAR_MIN, DiagonalGaussian


@pytest.fixture
def moments() -> torch.Tensor:
    return torch.randn(3, 8, 4, 5, generator=torch.Generator().manual_seed(0))


def normal(posterior: DiagonalGaussian) -> Normal:
    return Normal(posterior.mean, posterior.std)


def test_posterior_splits_mean_and_logvar(moments: torch.Tensor) -> None:
    posterior = DiagonalGaussian(moments)

    assert torch.equal(posterior.mean, moments[:, :4])
    assert torch.equal(posterior.logvar, moments[:, 4:])
    assert torch.equal(posterior.var, moments[:, 4:].exp())
    torch.testing.assert_close(posterior.std.square(), posterior.var)
    assert torch.equal(posterior.mode(), posterior.mean)


def test_posterior_is_what_pipelines_look_for(moments: torch.Tensor) -> None:
    assert isinstance(DiagonalGaussian(moments), DiagonalGaussianDistribution)


def test_posterior_clamps_logvar_both_ways() -> None:
    moments = torch.tensor([0.0, 0.0, -1000.0, 1000.0]).reshape(1, 4, 1, 1)

    posterior = DiagonalGaussian(moments)

    assert posterior.logvar.flatten().tolist() == [LOGVAR_MIN, LOGVAR_MAX] == [-30.0, 20.0]
    assert posterior.kl().isfinite().all()


def test_sample_equals_diffusers_for_one_generator(moments: torch.Tensor) -> None:
    ours = DiagonalGaussian(moments).sample(torch.Generator().manual_seed(7))
    theirs = DiagonalGaussianDistribution(moments).sample(torch.Generator().manual_seed(7))

    assert torch.equal(ours, theirs)


def test_sample_takes_one_generator_per_item(moments: torch.Tensor) -> None:
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2, 3)]

    z = DiagonalGaussian(moments).sample(generators)

    alone = DiagonalGaussian(moments[1:2]).sample(torch.Generator().manual_seed(2))
    assert torch.equal(z[1:2], alone)


def test_sample_takes_noise(moments: torch.Tensor) -> None:
    posterior = DiagonalGaussian(moments)
    noise = torch.randn_like(posterior.mean)

    z = posterior.sample(noise=noise)

    assert torch.equal(z, posterior.mean + posterior.std * noise)


def test_sample_rejects_noise_of_another_shape(moments: torch.Tensor) -> None:
    with pytest.raises(UserError, match=r"noise has shape \(1, 4, 4, 5\), z has \(3, 4, 4, 5\); draw one per latent\."):
        DiagonalGaussian(moments).sample(noise=torch.zeros(1, 4, 4, 5))


def test_sample_keeps_dtype(moments: torch.Tensor) -> None:
    posterior = DiagonalGaussian(moments.bfloat16())

    assert posterior.sample().dtype is torch.bfloat16
    assert posterior.sample(noise=torch.zeros(3, 4, 4, 5)).dtype is torch.bfloat16


def test_sample_is_differentiable_in_mean_and_logvar(moments: torch.Tensor) -> None:
    noise = torch.full((3, 4, 4, 5), 2.0)
    moments.requires_grad_()

    DiagonalGaussian(moments).sample(noise=noise).sum().backward()

    assert torch.equal(moments.grad[:, :4], torch.ones(3, 4, 4, 5))
    # d/dlogvar of exp(logvar / 2) * eps, with eps = 2
    torch.testing.assert_close(moments.grad[:, 4:], (moments[:, 4:] / 2).exp().detach())


def test_deterministic_posterior_collapses_to_its_mean(moments: torch.Tensor) -> None:
    posterior = DiagonalGaussian(moments, deterministic=True)

    assert torch.equal(posterior.sample(), posterior.mean)
    assert not posterior.std.any()
    assert not posterior.var.any()


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_deterministic_kl_and_nll_keep_shape_and_device(moments: torch.Tensor, device: str) -> None:
    # diffusers returns tensor([0.]) on the CPU, whatever the batch and the device
    posterior = DiagonalGaussian(moments.to(device), deterministic=True)

    for value in (posterior.kl(), posterior.nll(posterior.mean)):
        assert value.shape == (3,)
        assert value.device.type == device
    assert posterior.kl_map().shape == posterior.mean.shape


def test_kl_equals_torch_distributions(moments: torch.Tensor) -> None:
    posterior = DiagonalGaussian(moments)
    expected = kl_divergence(normal(posterior), Normal(0.0, 1.0))

    # worst seen over 20 seeds: 2e-6 in a map of values up to 20, 1.4e-7 of a sum
    torch.testing.assert_close(posterior.kl_map(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(posterior.kl(), expected.sum((1, 2, 3)), rtol=1e-6, atol=1e-6)


def test_kl_between_posteriors_equals_torch_distributions(moments: torch.Tensor) -> None:
    posterior, other = DiagonalGaussian(moments), DiagonalGaussian(moments.flip(0) * 0.5)
    expected = kl_divergence(normal(posterior), normal(other)).sum((1, 2, 3))

    torch.testing.assert_close(posterior.kl(other), expected, rtol=1e-6, atol=1e-6)


def test_kl_equals_diffusers(moments: torch.Tensor) -> None:
    other = moments.flip(0)

    ours, theirs = DiagonalGaussian(moments), DiagonalGaussianDistribution(moments)

    # worst seen 0 over 20 seeds; the order of a sum may differ on another machine
    torch.testing.assert_close(ours.kl(), theirs.kl(), rtol=1e-6, atol=0)
    torch.testing.assert_close(
        ours.kl(DiagonalGaussian(other)), theirs.kl(DiagonalGaussianDistribution(other)), rtol=1e-6, atol=0
    )


def test_kl_of_standard_normal_is_zero() -> None:
    assert torch.equal(DiagonalGaussian(torch.zeros(2, 8, 3, 3)).kl(), torch.zeros(2))


def test_kl_of_half_precision_moments_does_not_overflow() -> None:
    # 4 * 64 * 64 elements of mean 6 are 3e5 nats, and exp(20) is 5e8; fp16 ends at 65504
    moments = torch.cat([torch.full((1, 4, 64, 64), 6.0), torch.full((1, 4, 64, 64), 20.0)], dim=1).half()

    posterior = DiagonalGaussian(moments)

    expected = 4 * 64 * 64 * 0.5 * (36.0 + math.exp(20.0) - 1.0 - 20.0)
    assert posterior.kl().item() == pytest.approx(expected, rel=1e-6)
    assert posterior.nll(posterior.mean).isfinite().all()


def test_nll_equals_torch_distributions(moments: torch.Tensor) -> None:
    posterior = DiagonalGaussian(moments)
    z = torch.randn(3, 4, 4, 5)

    # worst seen 1.6e-7 over 20 seeds
    torch.testing.assert_close(posterior.nll(z), -normal(posterior).log_prob(z).sum((1, 2, 3)), rtol=1e-6, atol=0)


def test_nll_sums_over_the_given_dims(moments: torch.Tensor) -> None:
    assert DiagonalGaussian(moments).nll(torch.zeros(3, 4, 4, 5), dims=[1]).shape == (3, 4, 5)
