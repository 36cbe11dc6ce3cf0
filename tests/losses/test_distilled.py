"""The distilled perceptual network: a distance, of fixed size, with its own name, never on random weights."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from sd_vae import weights
from sd_vae.errors import UserError
from sd_vae.losses import Objective, PerceptualConfig, build_perceptual, distilled
from sd_vae.losses.config import LossConfig
from sd_vae.losses.distilled import Distilled, FeatureNet
from sd_vae.posterior import DiagonalGaussian

MAX_BYTES = 1_500_000


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Weights that nobody taught anything."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tensors = {name: tensor.half() for name, tensor in FeatureNet().state_dict().items()}
    save_file(tensors, tmp_path / "distilled.safetensors")
    return tmp_path / "distilled.safetensors"


@pytest.fixture
def pair() -> tuple[Tensor, Tensor]:
    x = torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return (x + 0.3 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))).clamp(-1, 1), x


def test_feature_net_is_small_enough_to_ship() -> None:
    assert 2 * sum(parameter.numel() for parameter in FeatureNet().parameters()) < MAX_BYTES


def test_distilled_is_a_distance(file: Path, pair: tuple[Tensor, Tensor]) -> None:
    recon, x = pair
    perceptual = Distilled(str(file))

    there, back, none = perceptual(recon, x), perceptual(x, recon), perceptual(x, x)

    assert there.shape == (2,)
    assert bool((there > 0).all())
    torch.testing.assert_close(there, back)
    assert none.tolist() == [0.0, 0.0]


def test_distilled_gives_each_image_its_own_distance(file: Path, pair: tuple[Tensor, Tensor]) -> None:
    recon, x = pair
    perceptual = Distilled(str(file))

    together = perceptual(recon, x)

    alone = torch.cat([perceptual(recon[i : i + 1], x[i : i + 1]) for i in range(2)])
    torch.testing.assert_close(together, alone)


def test_distilled_sends_gradients_to_the_reconstruction_alone(file: Path, pair: tuple[Tensor, Tensor]) -> None:
    recon, x = (each.requires_grad_() for each in pair)
    perceptual = Distilled(str(file))

    perceptual(recon, x).sum().backward()

    assert recon.grad is not None
    assert bool(recon.grad.isfinite().all())
    assert float(recon.grad.abs().sum()) > 0
    assert x.grad is None
    assert all(parameter.grad is None for parameter in perceptual.parameters())


def test_distilled_has_a_finite_gradient_on_flat_grey(file: Path) -> None:
    recon = torch.zeros(1, 3, 32, 32, requires_grad=True)

    Distilled(str(file))(recon, torch.zeros(1, 3, 32, 32)).sum().backward()

    assert recon.grad is not None
    assert bool(recon.grad.isfinite().all())


def test_distilled_refuses_images_below_one_cell(file: Path) -> None:
    with pytest.raises(UserError, match="distilled needs images of at least 31x31 pixels"):
        Distilled(str(file))(torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 8))


def test_objective_logs_the_distilled_distance_under_its_own_name(file: Path, pair: tuple[Tensor, Tensor]) -> None:
    recon, x = pair
    config = LossConfig(perceptual=PerceptualConfig(net="distilled", backbone=str(file)))

    terms = Objective(config)(x, recon, DiagonalGaussian(torch.zeros(2, 8, 4, 4))).terms

    assert "distilled" in terms
    assert not any(name.startswith("lpips") for name in terms)


def test_distilled_takes_the_weights_that_ship(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distilled, "shipped_folder", lambda name: file.parent)

    perceptual = build_perceptual(PerceptualConfig(net="distilled"))

    assert isinstance(perceptual, Distilled)


def test_distilled_never_runs_on_random_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(distilled, "shipped_folder", lambda name: weights.shipped_folder(name, tmp_path))

    with pytest.raises(
        UserError, match=r"no weights for 'distilled' .* train your own: python -m benchmarks\.mini_dis"
    ):
        build_perceptual(PerceptualConfig(net="distilled"))


def test_distilled_names_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no file .*none\.safetensors with weights of the distilled network"):
        Distilled(str(tmp_path / "none.safetensors"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("heads.0"), r"heads\.0 is missing there and \(64,\) here \(1 differ\)"),
        (lambda tensors: tensors.update(more=torch.ones(2)), r"more is \(2,\) there and none of its tensors here"),
        (lambda tensors: tensors.update({"heads.0": torch.ones(3)}), r"heads\.0 is \(3,\) there and \(64,\) here"),
        (lambda tensors: tensors["heads.1"].fill_(float("nan")), r"holds NaN or infinity in heads\.1; distil it again"),
    ],
    ids=["missing", "unexpected", "misshapen", "not finite"],
)
def test_distilled_refuses_other_weights(change, message: str, tmp_path: Path) -> None:
    tensors = FeatureNet().state_dict()
    change(tensors)
    save_file(tensors, tmp_path / "x.safetensors")

    with pytest.raises(UserError, match=message):
        Distilled(str(tmp_path / "x.safetensors"))
