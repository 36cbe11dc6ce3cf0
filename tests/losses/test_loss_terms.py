"""The pixel and KL terms."""

import pytest
import torch

import sd_vae.losses
from sd_vae.errors import UserError
from sd_vae.losses.config import KLConfig
from sd_vae.losses.kl import kl_loss, kl_weight_at
from sd_vae.losses.reconstruction import reconstruction_loss
from sd_vae.posterior import DiagonalGaussian


def moments(batch_size=2, cells=8, seed=0):
    return torch.randn(batch_size, 8, cells, cells, generator=torch.Generator().manual_seed(seed))


def test_reconstruction_loss_l2_is_the_mean_square():
    recon, x = torch.tensor([0.5, -1.0]).view(1, 2, 1, 1), torch.zeros(1, 2, 1, 1)

    loss = reconstruction_loss(recon, x, "l2")

    assert loss.item() == (0.25 + 1.0) / 2


def test_reconstruction_loss_l1_is_the_mean_magnitude():
    recon, x = torch.tensor([0.5, -1.0]).view(1, 2, 1, 1), torch.zeros(1, 2, 1, 1)

    loss = reconstruction_loss(recon, x, "l1")

    assert loss.item() == 0.75


def test_reconstruction_loss_of_bf16_is_fp32():
    recon, x = torch.rand(1, 3, 8, 8).bfloat16(), torch.rand(1, 3, 8, 8).bfloat16()

    assert reconstruction_loss(recon, x, "l2").dtype == torch.float32


def test_reconstruction_loss_rejects_shapes_that_would_broadcast():
    with pytest.raises(UserError, match=r"recon has shape \(1, 3, 8, 8\) and x \(2, 3, 8, 8\), they must be equal"):
        reconstruction_loss(torch.zeros(1, 3, 8, 8), torch.zeros(2, 3, 8, 8), "l2")


def test_kl_loss_equals_torch_distributions():
    posterior = DiagonalGaussian(moments())
    q = torch.distributions.Normal(posterior.mean, posterior.std)
    expected = torch.distributions.kl_divergence(q, torch.distributions.Normal(0.0, 1.0)).mean()

    loss = kl_loss(posterior, "mean", 1)

    # worst seen 6e-8
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-6)


def test_kl_loss_ldm_weight_is_the_published_loss_over_image_elements():
    # CompVis sums pixels and KL and divides by the batch; over 3HW that is a pixel mean plus 1e-6 times this term.
    posterior, x, recon = DiagonalGaussian(moments()), torch.rand(2, 3, 64, 64), torch.rand(2, 3, 64, 64)
    num_elements = 3 * 64 * 64
    published = ((recon - x).square().sum() + 1e-6 * posterior.kl().sum()) / 2

    ours = reconstruction_loss(recon, x, "l2") + 1e-6 * kl_loss(posterior, "ldm", num_elements)

    torch.testing.assert_close(ours, published / num_elements, rtol=1e-6, atol=0)


def test_kl_loss_mean_has_its_ldm_equivalent_at_a_48th_of_the_weight():
    posterior = DiagonalGaussian(moments(cells=8))

    mean, ldm = kl_loss(posterior, "mean", 1), kl_loss(posterior, "ldm", 3 * 64 * 64)

    torch.testing.assert_close(mean / 48, ldm, rtol=1e-6, atol=0)


def test_kl_loss_of_bf16_moments_is_summed_in_fp32():
    parameters = moments(cells=32).bfloat16()

    loss = kl_loss(DiagonalGaussian(parameters), "ldm", 1)

    expected = DiagonalGaussian(parameters.double()).kl().mean().float()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)


def test_kl_loss_of_deterministic_posterior_is_zero():
    assert kl_loss(DiagonalGaussian(moments(), deterministic=True), "mean", 1) == 0


@pytest.mark.parametrize("convention", ["mean", "ldm"])
def test_free_bits_of_almost_nothing_change_nothing(convention):
    posterior = DiagonalGaussian(moments())

    with_floor = kl_loss(posterior, convention, 3 * 64 * 64, free_bits=1e-9)

    torch.testing.assert_close(with_floor, kl_loss(posterior, convention, 3 * 64 * 64))


def test_free_bits_floor_each_channel_of_each_image():
    parameters = torch.zeros(2, 8, 4, 4)  # mean 0, logvar 0: KL 0 everywhere
    parameters[0, 0] = 2.0  # but 2 nats in one channel of one image
    posterior = DiagonalGaussian(parameters)

    loss = kl_loss(posterior, "mean", 1, free_bits=0.5)

    assert loss == pytest.approx((7 * 0.5 + 2.0) / 8)


def test_free_bits_leave_no_gradient_below_the_floor():
    parameters = torch.zeros(1, 8, 4, 4)
    parameters[0, 0], parameters[0, 1] = 2.0, 0.1
    parameters.requires_grad_()

    kl_loss(DiagonalGaussian(parameters), "mean", 1, free_bits=0.5).backward()

    assert (parameters.grad[0, 0] != 0).all()
    assert (parameters.grad[0, 1:4] == 0).all()


def test_kl_weight_warms_up_linearly():
    config = KLConfig(weight=2.0, warmup_steps=4)

    assert [kl_weight_at(config, step) for step in (0, 1, 4, 9, None)] == [0.0, 0.5, 2.0, 2.0, 2.0]


def test_kl_weight_cycles():
    config = KLConfig(weight=2.0, cycle_steps=8)

    assert [kl_weight_at(config, step) for step in range(9)] == [0.0, 0.5, 1.0, 1.5, 2.0, 2.0, 2.0, 2.0, 0.0]
    assert kl_weight_at(config, None) == 2.0


def test_kl_weight_is_constant_by_default():
    assert kl_weight_at(KLConfig(weight=2.0), 0) == 2.0


def test_losses_package_exports_lazily():
    assert sd_vae.losses.kl_loss is kl_loss
    assert "Objective" in dir(sd_vae.losses)


def test_losses_package_has_no_other_names():
    with pytest.raises(AttributeError, match="no attribute 'huber'"):
        sd_vae.losses.huber  # noqa: B018
