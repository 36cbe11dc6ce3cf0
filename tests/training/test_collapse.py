"""The collapse monitor: its numbers, its advice, and the settings that it advises."""

import logging
from typing import Any

import pytest
import torch

from sd_vae.autoencoder import AutoencoderKL
from sd_vae.losses import KLConfig, LossConfig, Objective, PerceptualConfig
from sd_vae.posterior import DiagonalGaussian
from training.collapse import CollapseMonitor, channel_moments
from training.step import TrainingForward


def posterior(spread: list[float], batch_size: int = 4) -> DiagonalGaussian:
    """Unit variance and means of the given standard deviation by channel."""
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(batch_size, len(spread), 8, 8, generator=generator) * torch.tensor(spread).view(1, -1, 1, 1)
    return DiagonalGaussian(torch.cat([mean, torch.zeros_like(mean)], dim=1))


def test_channel_moments_of_batches_average_to_those_of_all() -> None:
    whole = posterior([1.0, 0.5])
    parts = [DiagonalGaussian(part) for part in whole.parameters.split(2)]

    together = torch.stack([channel_moments(part) for part in parts]).mean(dim=0)

    torch.testing.assert_close(together, channel_moments(whole))


def test_monitor_counts_active_units_by_the_variance_of_their_means() -> None:
    q = posterior([1.0, 0.2, 0.05, 0.0])

    rows = CollapseMonitor(0).rows(channel_moments(q), 1)

    assert rows["active_units"] == 2  # variances 1, 0.04, 0.0025 and 0 against 0.01
    assert rows["kl_channel/0"] == pytest.approx(float(q.kl_map()[:, 0].mean()))
    assert rows["dead_channels"] == 2


def test_monitor_warns_once_of_each_dead_channel(caplog: pytest.LogCaptureFixture) -> None:
    monitor, moments = CollapseMonitor(10), channel_moments(posterior([1.0, 0.0]))

    with caplog.at_level(logging.WARNING):
        for step in (5, 10, 15):
            monitor.rows(moments, step)

    (record,) = caplog.records
    assert record.getMessage().startswith(
        "posterior collapse: latent channels 1 of 2 say nothing of the picture at step 10"
    )
    assert "loss.kl.warmup_steps" in record.getMessage()


def test_monitor_is_silent_where_all_channels_live(caplog: pytest.LogCaptureFixture) -> None:
    CollapseMonitor(0).rows(channel_moments(posterior([1.0, 0.5])), 1)

    assert not caplog.records


def train_with(kl: KLConfig, vae: AutoencoderKL, num_steps: int = 80) -> dict[str, float]:
    """What the monitor says of a tiny VAE trained on smooth random pictures with that KL term."""
    vae.train()
    forward = TrainingForward(vae)
    objective = Objective(LossConfig(perceptual=PerceptualConfig(weight=0.0), kl=kl))
    optimizer = torch.optim.Adam(vae.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    for step in range(num_steps):
        small = torch.rand(8, 3, 4, 4, generator=generator) * 2 - 1
        x = torch.nn.functional.interpolate(small, size=(8, 8), mode="nearest")
        recon, q = forward(x, torch.randn(8, 4, 4, 4, generator=generator))
        optimizer.zero_grad()
        objective(x, recon, q, step).total.backward()
        optimizer.step()
    return CollapseMonitor(num_steps + 1).rows(channel_moments(q), num_steps)


def test_beta_of_ten_collapses_every_unit(tiny_vae: AutoencoderKL) -> None:
    rows = train_with(KLConfig(weight=10.0, convention="ldm"), tiny_vae)

    assert rows["active_units"] == 0
    assert rows["dead_channels"] == 4


def test_free_bits_and_warm_up_keep_every_unit_active_at_a_beta_of_ten(tiny_vae: AutoencoderKL) -> None:
    kl = KLConfig(weight=10.0, convention="ldm", free_bits=0.5, warmup_steps=40)

    rows = train_with(kl, tiny_vae)

    assert rows["active_units"] == 4
    assert rows["dead_channels"] == 0
    # between 0.10 and 0.33 nats over two seeds: still learning, and the floor is 0.5
    assert all(0.05 < rows[f"kl_channel/{channel}"] < 1.0 for channel in range(4))


def test_a_run_logs_kl_by_channel_and_warns(make_config: Any, caplog: pytest.LogCaptureFixture) -> None:
    from training import train, trainer
    from training.records import read_metrics

    with pytest.MonkeyPatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(trainer, "COLLAPSE_PATIENCE", 0)
        patch.setattr("training.collapse.DEAD_NATS", 1e9)
        result = train(make_config(steps=1))

    row = read_metrics(result.folder / "metrics.jsonl")[0]
    assert {f"kl_channel/{channel}" for channel in range(4)} <= row.keys()
    assert sum(row[f"kl_channel/{channel}"] for channel in range(4)) / 4 == pytest.approx(row["kl"], rel=1e-5)
    assert "posterior collapse: latent channels all of 4" in caplog.text
