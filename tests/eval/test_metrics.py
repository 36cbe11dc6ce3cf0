import math

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torchmetrics.functional.image import (
    multiscale_structural_similarity_index_measure,
    structural_similarity_index_measure,
)

from eval.latent_stats import LatentStats, LatentSums
from eval.metrics import METRICS, l1, ms_ssim, perceptual_metric, pooled_psnr_db, psnr_db, ssim
from sd_vae.errors import UserError
from sd_vae.posterior import DiagonalGaussian


def posterior_of(seed, height=6, width=5):
    moments = torch.randn(1, 8, height, width, generator=torch.Generator().manual_seed(seed)) * 2 + 0.5
    return DiagonalGaussian(moments)


def test_psnr_equals_scikit_image(photos, noisy):
    for x in photos.values():
        recon = noisy(x)

        theirs = peak_signal_noise_ratio(np.asarray(x), np.asarray(recon), data_range=255)

        # worst seen 4e-15, noise of seeds 0 to 9: both are float64 means of squares
        assert psnr_db(recon, x) == pytest.approx(theirs, abs=1e-9)


def test_ssim_equals_scikit_image_on_8_bit_arrays(photos, noisy):
    for x in photos.values():
        recon = noisy(x)

        theirs = structural_similarity(
            np.asarray(x),
            np.asarray(recon),
            channel_axis=2,
            data_range=255,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )

        assert ssim(recon, x) == pytest.approx(theirs, abs=1e-6)  # worst seen 0, noise of seeds 0 to 9


def test_ssim_equals_torchmetrics_away_from_the_border(photos, noisy):
    for x in photos.values():
        recon = noisy(x)
        a, b = (torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].double() for picture in (recon, x))

        _, theirs = structural_similarity_index_measure(a, b, data_range=255.0, sigma=1.5, return_full_image=True)

        # worst seen 2e-15, noise of seeds 0 to 9; torchmetrics' own mean has the mirrored border: off by up to 7e-2
        assert ssim(recon, x) == pytest.approx(float(theirs[..., 5:-5, 5:-5].mean()), abs=1e-6)


def test_metrics_of_equal_pictures_are_infinite_psnr_and_ssim_one(photos):
    x = photos["cat"]

    assert psnr_db(x, x.copy()) == math.inf
    assert ssim(x, x.copy()) == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("measure", [psnr_db, ssim])
def test_metrics_refuse_different_sizes(measure, photos):
    with pytest.raises(UserError, match="37x25 and 32x32 cannot be compared"):
        measure(photos["cat"], photos["astronaut"])


def test_ssim_refuses_pictures_below_its_window():
    small = Image.new("RGB", (40, 10))

    with pytest.raises(UserError, match="at least 11x11 pixels, this one has 40x10"):
        ssim(small, small)


def test_latent_sums_describe_z_and_not_only_its_mean():
    posterior = posterior_of(0)

    sums = LatentSums.of(posterior)

    samples = torch.stack([posterior.sample(torch.Generator().manual_seed(i)) for i in range(4000)]).double()
    # worst seen 2.1% with 4000 draws, posteriors 0 to 4; without the posterior's variance it is off by up to 71%
    assert sums.z_squared == pytest.approx(samples.square().mean(0).sum(dim=(0, 2, 3)).tolist(), rel=0.05)
    assert sum(sums.kl) == pytest.approx(float(posterior.kl()), rel=1e-5)  # worst seen 1e-7, which is float32's


def test_latent_stats_equal_those_of_all_elements_together():
    posteriors = [posterior_of(0), posterior_of(1, height=9, width=4)]
    sharp = [DiagonalGaussian(torch.cat([p.mean, torch.full_like(p.mean, -30.0)], dim=1)) for p in posteriors]

    stats = LatentStats.pooled([LatentSums.of(p) for p in sharp])

    z = torch.cat([p.mean.double().flatten(2) for p in sharp], dim=2)  # (1, C, cells of both)
    assert stats.mean == pytest.approx(float(z.mean()), abs=1e-9)
    assert stats.std == pytest.approx(float(z.std(correction=0)), rel=1e-9)
    assert stats.channel_mean == pytest.approx(z.mean(dim=(0, 2)).tolist(), abs=1e-9)
    assert stats.channel_std == pytest.approx(z.std(dim=(0, 2), correction=0).tolist(), rel=1e-9)
    assert stats.scaling_factor == pytest.approx(1 / float(z.std(correction=0)), rel=1e-9)


def test_latent_stats_take_kl_per_element():
    posteriors = [posterior_of(0), posterior_of(1, height=9, width=4)]

    stats = LatentStats.pooled([LatentSums.of(p) for p in posteriors])

    kl = torch.cat([p.kl_map().double().flatten() for p in posteriors])
    assert stats.kl_per_element == pytest.approx(float(kl.mean()), rel=1e-5)


def test_latent_stats_do_not_depend_on_the_order_of_photos():
    # plain sums of these give 9 in one direction and 0 in the other
    sums = [
        LatentSums(num_cells=1, z=(v / 9, 0.0), z_squared=(v, 0.0), mean_squared=(v, 0.0), kl=(v, 0.0))
        for v in (9e16, -9e16, 9.0)
    ]

    assert LatentStats.pooled(sums) == LatentStats.pooled(sums[::-1])
    assert LatentStats.pooled(sums).kl_per_element == 9 / 6


def test_latent_stats_of_a_constant_have_no_scaling_factor():
    stats = LatentStats.pooled(
        [LatentSums(num_cells=4, z=(4.0,) * 2, z_squared=(4.0,) * 2, mean_squared=(4.0,) * 2, kl=(0.0,) * 2)]
    )

    assert stats.std == 0.0
    assert stats.scaling_factor == math.inf


@pytest.mark.parametrize(
    ("name", "heading"),
    [
        ("psnr_db", "PSNR (dB) ↑"),
        ("lpips_vgg", "LPIPS vgg ↓"),
        ("l1", "L1 (levels) ↓"),
        ("hf_energy_ratio", "High-frequency energy"),
        ("kl_per_element", "KL per element (nats)"),
    ],
)
def test_metric_heading_states_unit_and_direction(name, heading):
    assert METRICS[name].heading == heading


def test_metric_table_states_a_range_for_every_metric():
    assert all(metric.range and metric.about for metric in METRICS.values())
    assert perceptual_metric("mine").heading == "mine ↓"


@pytest.mark.parametrize(
    ("value", "text"), [(18.046, "18.05"), (-0.5, "−0.50"), (-0.004, "0.00"), (math.inf, "∞"), (-math.inf, "−∞")]
)
def test_metric_formats_its_value(value, text):
    assert METRICS["psnr_db"].format(value) == text


def test_ms_ssim_equals_torchmetrics(noisy):
    x = Image.fromarray(skimage.data.chelsea())  # 451x300: odd lines are dropped on the way down
    recon = noisy(x)
    a, b = (torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].double() for picture in (recon, x))

    theirs = multiscale_structural_similarity_index_measure(a, b, data_range=255.0, normalize="relu")

    # worst seen 4e-11, noise of seeds 0 to 2
    assert ms_ssim(recon, x) == pytest.approx(float(theirs), abs=1e-6)


def test_ms_ssim_refuses_pictures_that_its_coarsest_window_does_not_fit():
    small = Image.new("RGB", (400, 175))

    with pytest.raises(UserError, match="MS-SSIM needs pictures of at least 176x176 pixels, this one has 400x175"):
        ms_ssim(small, small)


def test_ssim_with_a_uniform_window_equals_scikit_images_default(photos, noisy):
    x = photos["cat"]
    recon = noisy(x)

    theirs = structural_similarity(np.asarray(x), np.asarray(recon), channel_axis=2, data_range=255)

    assert ssim(recon, x, "uniform-7") == pytest.approx(theirs, abs=1e-6)


def test_pooled_psnr_is_that_of_the_mean_squared_error():
    psnrs = [20.0, 30.0, 40.0]

    mse = sum(255**2 / 10 ** (psnr / 10) for psnr in psnrs) / 3
    assert pooled_psnr_db(psnrs) == pytest.approx(10 * math.log10(255**2 / mse), rel=1e-12)
    assert pooled_psnr_db([math.inf, math.inf]) == math.inf
    assert pooled_psnr_db([math.inf, 30.0]) == pytest.approx(30.0 + 10 * math.log10(2))


def test_l1_is_in_levels(photos, noisy):
    x = photos["cat"]
    recon = noisy(x)

    assert l1(recon, x) == pytest.approx(np.abs(np.asarray(x, float) - np.asarray(recon, float)).mean(), rel=1e-12)
    assert l1(Image.new("RGB", (4, 4), "white"), Image.new("RGB", (4, 4), "black")) == 255.0


def test_latent_stats_count_channels_that_vary():
    moving = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    mean = torch.cat([moving, torch.full_like(moving, 3.0), 0.05 * moving], dim=1)
    posterior = DiagonalGaussian(torch.cat([mean, torch.zeros_like(mean)], dim=1))

    stats = LatentStats.pooled([LatentSums.of(posterior)])

    assert stats.active_units == 1  # a large mean and a large posterior variance do not count
    assert stats.channel_kl == pytest.approx(posterior.kl_map().mean(dim=(0, 2, 3)).tolist(), rel=1e-5)


def test_latents_without_a_posterior_have_no_kl():
    stats = LatentStats.pooled([LatentSums.of_point(torch.randn(1, 4, 8, 8))])

    assert math.isnan(stats.kl_per_element)
    assert METRICS["kl_per_element"].format(stats.kl_per_element) == "–"
    assert stats.channel_kl == ()
