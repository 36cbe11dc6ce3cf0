"""Short runs that are compared: each finished once, what differs between them, and the tables."""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import mini_perceptual, regularisers, short_runs, three_losses
from benchmarks.mini_distortions import DISTORTIONS
from sd_vae.autoencoder import AutoencoderKL
from sd_vae.errors import UserError


@pytest.fixture
def args(tmp_path: Path, tiny_vae: AutoencoderKL) -> argparse.Namespace:
    tiny_vae.save_pretrained(tmp_path / "vae")
    (tmp_path / "photos").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (48, 48, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photos" / "0.png")
    parser = argparse.ArgumentParser()
    short_runs.add_arguments(parser)
    places = ["--train", str(tmp_path / "photos"), "--photos", str(tmp_path / "photos"), "--work", str(tmp_path / "w")]
    sizes = ["--steps", "2", "--size", "16", "--batch-size", "1"]
    return parser.parse_args([str(tmp_path / "vae"), *places, *sizes])


def test_finish_trains_once(args: argparse.Namespace, monkeypatch: pytest.MonkeyPatch) -> None:
    config = short_runs.base_config(args, "run", 0)
    folder = short_runs.finish(config)
    monkeypatch.setattr(short_runs, "train", lambda *args, **settings: pytest.fail("it trains again"))

    assert short_runs.finish(config) == folder
    assert set(short_runs.last_means(folder)) >= {"loss", "reconstruction", "kl"}


def test_finish_refuses_a_run_of_other_settings(args: argparse.Namespace) -> None:
    short_runs.finish(short_runs.base_config(args, "run", 0))

    with pytest.raises(UserError, match=r"run is a run with other settings; name another --work"):
        short_runs.finish(short_runs.base_config(args, "run", 1))


def test_kept_measures_once(tmp_path: Path) -> None:
    measurements = iter([{"psnr_db": 1.0}, {"psnr_db": 2.0}])

    first, second = (short_runs.kept(tmp_path / "x.json", lambda: next(measurements)) for _ in range(2))

    assert first == second == {"psnr_db": 1.0}


def test_three_losses_differ_in_their_terms_alone(args: argparse.Namespace) -> None:
    args.backbone, args.lpips_weight, args.discriminator_lr, args.gan_weight, args.gan_warmup = (
        "a.pth",
        0.1,
        1e-4,
        0.5,
        9,
    )

    plain, perceptual, adversarial = (three_losses.run_config(args, loss, 3) for loss in three_losses.LOSSES)

    assert [c.loss.perceptual.weight for c in (plain, perceptual, adversarial)] == [0.0, 0.1, 0.1]
    assert [c.loss.adversarial.weight for c in (plain, perceptual, adversarial)] == [0.0, 0.0, 0.5]
    assert plain.data == perceptual.data == adversarial.data
    assert plain.seed == 3
    assert plain.optim == adversarial.optim


def test_three_losses_bars_are_told_by_seed() -> None:
    values = {"L2": 0.5, "L2 + LPIPS": 0.4, "L2 + LPIPS + GAN": 0.41}
    results: dict[Any, Any] = {(loss, 0): {"lpips_alex": value, "psnr_db": 20.0} for loss, value in values.items()}

    first, second = three_losses.to_figures(results, photos="kodak24")

    assert (first.verdict, second.verdict) == ("met", "MISSED")  # 0.41 is 2.5% more than 0.4
    assert "| L2 + LPIPS | 0 | 0.4 | 20 | - |" in three_losses.to_details(values_of_start(), results)


def values_of_start() -> dict[str, float]:
    return {"lpips_alex": 0.6, "psnr_db": 19.0}


def test_tile_error_is_zero_where_one_tile_is_the_whole(tiny_vae: AutoencoderKL) -> None:
    photos = torch.rand(1, 3, 32, 32) * 2 - 1

    assert regularisers.tile_error(tiny_vae, photos, tile=32) == 0.0
    assert regularisers.tile_error(tiny_vae, photos, tile=16) > 1.0


def test_regularisers_differ_in_their_term_alone(args: argparse.Namespace) -> None:
    args.tiling_weight = 2.0

    plain, equivariance, tiling = (regularisers.run_config(args, name).loss for name in regularisers.RUNS)

    assert (plain.equivariance.probability, equivariance.equivariance.probability) == (0.0, 0.5)
    assert (plain.tiling.weight, tiling.tiling.weight) == (0.0, 2.0)
    assert plain.kl == equivariance.kl == tiling.kl


def test_perceptual_runs_differ_in_their_term_alone(args: argparse.Namespace) -> None:
    args.seed, args.weight, args.alex, args.distilled = 3, 0.2, "a.pth", None

    plain, real, ours = (mini_perceptual.run_config(args, term) for term in mini_perceptual.TERMS)

    assert plain.loss.perceptual.weight == 0
    assert (real.loss.perceptual.net, real.loss.perceptual.backbone) == ("alex", "a.pth")
    assert (ours.loss.perceptual.net, ours.loss.perceptual.weight) == ("distilled", 0.2)
    assert real.seed == ours.seed == plain.seed == 3
    assert {config.optim for config in (plain, real, ours)} == {plain.optim}


@pytest.mark.parametrize(("distilled", "met"), [(0.21, [True, True]), (0.23, [False, True]), (0.26, [False, False])])
def test_perceptual_bars_compare_with_lpips_and_with_l2_alone(distilled: float, met: list[bool]) -> None:
    distances = {"none": 0.3, "alex": 0.2, "distilled": distilled}

    assert [figure.met for figure in mini_perceptual.training_figures(distances)] == met


def test_perceptual_times_are_told_for_both(monkeypatch: pytest.MonkeyPatch) -> None:
    class Distance(torch.nn.Module):
        def forward(self, recon: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
            return (recon - x).square().mean(dim=(1, 2, 3))

    monkeypatch.setattr(mini_perceptual, "_vgg", lambda: (Distance(), "random"))
    ours: Any = Distance()

    alex, vgg = mini_perceptual.time_figures(ours, ours, 2)

    assert alex.value is not None
    assert alex.value > 0
    assert vgg.note == "vgg with random weights"


def test_every_kind_of_distortion_has_its_correlation() -> None:
    class Distance(torch.nn.Module):
        def forward(self, recon: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
            return (recon - x).square().mean(dim=(1, 2, 3))

    ours: Any = Distance()
    photos = list((torch.rand(2, 1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1).unbind())

    assert mini_perceptual.kind_correlations(ours, ours, photos) == pytest.approx(dict.fromkeys(DISTORTIONS, 1.0))
