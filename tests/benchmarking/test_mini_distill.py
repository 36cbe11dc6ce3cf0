"""Teaching the distilled network: damage, targets, and that it learns what it is told."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lpips import normalize_tensor
from torch import Tensor

from benchmarks import mini_distill
from benchmarks.mini_distortions import DISTORTIONS, distort
from sd_vae.losses.distilled import FILE_NAME, Distilled, FeatureNet
from sd_vae.losses.perceptual import _build_lpips
from sd_vae.weights import shipped_folder


class PixelTeacher:
    """Stands for LPIPS: the squared difference of pixels, of one layer."""

    def cell_distances(self, recon: Tensor, x: Tensor) -> list[Tensor]:
        return [(recon - x).square().mean(dim=1)]

    def __call__(self, recon: Tensor, x: Tensor) -> Tensor:
        return self.cell_distances(recon, x)[0].mean(dim=(1, 2))


def photos(count: int = 2, size: int = 32) -> Tensor:
    """Smooth random pictures."""
    coarse = torch.rand(count, 3, 5, 5, generator=torch.Generator().manual_seed(3)) * 2 - 1
    return torch.nn.functional.interpolate(coarse, size=size, mode="bilinear")


@pytest.mark.parametrize("name", DISTORTIONS)
def test_distortion_grows_with_its_strength(name: str) -> None:
    x = photos()

    errors = [
        float((DISTORTIONS[name](x, strength, torch.Generator().manual_seed(0)) - x).square().mean())
        for strength in (0.0, 1.0)
    ]

    assert 0 < errors[0] < errors[1]


def test_distort_stays_in_range_and_is_a_function_of_the_generator() -> None:
    x = photos()

    for seed in range(20):
        first, second = (distort(x, torch.Generator().manual_seed(seed)) for _ in range(2))

        assert torch.equal(first[0], second[0])
        assert first[0].shape == x.shape
        assert float(first[0].abs().max()) <= 1 + 1e-6


def test_target_parts_average_to_the_teachers_distance() -> None:
    x = photos()
    recon = (x + 0.2).clamp(-1, 1)
    teacher = PixelTeacher()

    parts = mini_distill.target_parts({"alex": teacher, "squeeze": teacher}, recon, x)

    assert parts.shape == (2, 4, 4)
    torch.testing.assert_close(parts.mean(dim=(1, 2)), teacher(recon, x))


def test_log_error_is_zero_for_equal_distances_and_counts_ratios() -> None:
    distance = torch.full((2, 4, 4), 0.3)

    assert float(mini_distill.log_error(distance, distance)) == 0
    # both whole and parts are off by ln 2 but for the floor: (1 + 0.5) ln(2)^2 = 0.7207
    assert float(mini_distill.log_error(2 * distance, distance)) == pytest.approx(0.72, abs=0.01)


def test_mislead_brings_images_nearer_in_the_networks_eyes() -> None:
    x = photos()
    recon = (x + 0.3 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))).clamp(-1, 1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = FeatureNet()

    misled = mini_distill.mislead(net, recon, x, 0.01)

    before, after = (float(mini_distill.distance_parts(net, each, x).detach().mean()) for each in (recon, misled))
    assert after < before
    assert all(parameter.grad is None for parameter in net.parameters())


def test_begin_takes_over_what_lpips_says_of_the_first_two_layers() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        teacher, net = SimpleNamespace(model=_build_lpips("alex").eval()), FeatureNet()
        x, recon = torch.rand(2, 1, 3, 64, 64) * 2 - 1

    mini_distill.begin_(net, teacher)

    with torch.no_grad():
        ours = net.compare(net(recon), net(x))[:2]
        layers = [teacher.model.net(teacher.model.scaling_layer(each)) for each in (recon, x)]
        pairs = [tuple(normalize_tensor(layer[index]) for layer in layers) for index in range(2)]
        theirs = [teacher.model.lins[index]((a - b).square()) for index, (a, b) in enumerate(pairs)]
    for distance, expected in zip(ours, theirs, strict=True):
        # features are softened: measured difference of the means 0.2%
        assert float(distance.mean()) == pytest.approx(float(expected.mean()), rel=0.01)
    assert [name for name, each in net.named_parameters() if not each.requires_grad] == [
        "first.weight",
        "first.bias",
        "second.weight",
        "second.bias",
    ]


def test_distil_learns_what_the_teacher_says() -> None:
    x = photos(8)

    def batches() -> Iterator[Tensor]:
        while True:
            yield x

    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = FeatureNet()
    teacher = PixelTeacher()

    losses = list(mini_distill.distil(net, batches(), {"alex": teacher}, [], steps=60, lr=2e-3))

    # 4.2 to 1.0 here
    assert sum(losses[-10:]) < 0.6 * sum(losses[:10])


def test_rank_correlation_is_one_with_itself(tiny_vae) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = FeatureNet()

    def teacher(recon: Tensor, x: Tensor) -> Tensor:
        return mini_distill.distance_parts(net, recon, x).mean(dim=(1, 2)).exp()

    assert mini_distill.rank_correlation(net, teacher, [photos(1), photos(1)], [tiny_vae]) == pytest.approx(1.0)


def test_save_writes_what_the_training_term_takes(tmp_path: Path) -> None:
    net = FeatureNet()

    mini_distill.save(net, tmp_path / "distilled")

    taken = Distilled(str(shipped_folder("distilled", tmp_path) / FILE_NAME)).model
    assert all(torch.equal(a, b.half().float()) for a, b in zip(taken.parameters(), net.parameters(), strict=True))
