"""Fitted priors have the covariances of what they were fitted to, over channels and space, at every size."""

from collections.abc import Callable
from pathlib import Path

import pytest
import synthetic_store as synthetic
import torch
from torch import Tensor

from sd_vae.errors import UserError
from sd_vae.latents import Item, LatentStore
from sd_vae.latents.prior import WINDOW, FieldPrior, GaussianField, NormalPrior, fit_prior


def _make(folder: Path, moments_of: Callable[[int], Tensor], num: int, content: str = "moments") -> Path:
    """A store of so many items."""
    store = LatentStore.create(
        folder, synthetic.describe(num_records=num, dtype="float32", shard_items=num, content=content)
    )
    with store.writer(0) as writer:
        for position in range(num):
            item: Item = synthetic.item(position)
            writer.add(item, moments_of(position))
    store.finish(num)
    return folder


def _streaks(position: int, height: int = 40, width: int = 32, logvar: float = -30.0) -> Tensor:
    """Streaks of 4 cells along a row; the same, 3 rows lower, halved; white noise; a constant."""
    generator = torch.Generator().manual_seed(position)
    noise = torch.randn(height + 3, width + 3, generator=generator)
    streaks = noise.unfold(1, 4, 1).mean(dim=2) * 2.0
    level = torch.randn((), generator=generator) * 3.0
    z = torch.stack(
        [
            streaks[3:],
            0.5 * streaks[:-3],
            torch.randn(height, width, generator=generator),
            level.expand(height, width),
        ]
    )
    return torch.cat([z, torch.full_like(z, logvar)])


@pytest.fixture(scope="module")
def streaks(tmp_path_factory: pytest.TempPathFactory) -> GaussianField:
    folder = _make(tmp_path_factory.mktemp("prior") / "store", _streaks, 60)
    return fit_prior(folder).components[0]


def test_fit_finds_covariances_over_channels_and_space(streaks: GaussianField) -> None:
    found = streaks.covariance

    # the mean of 60 pictures of 1280 cells is itself a draw
    assert found[0, 0, 0, 0] == pytest.approx(1.0, abs=0.05)
    assert found[0, 0, 0, 2] == pytest.approx(0.5 * 30 / 32, abs=0.05)  # 2 of 4 cells shared, 30 of 32 columns paired
    assert found[0, 0, 1, 0] == pytest.approx(0.0, abs=0.05)
    assert found[0, 1, 3, 0] == pytest.approx(0.5 * 37 / 40, abs=0.05)
    assert found[1, 0, -3, 0] == pytest.approx(0.5 * 37 / 40, abs=0.05)
    assert found[0, 1, -3, 0] == pytest.approx(0.0, abs=0.05)
    assert found[2, 2, 0, 0] == pytest.approx(1.0, abs=0.05)


def test_fit_keeps_what_differs_between_pictures_apart(streaks: GaussianField) -> None:
    assert float(streaks.mean_covariance[3, 3]) == pytest.approx(9.0, rel=0.5)
    assert float(streaks.covariance[3, 3].abs().max()) < 1e-9
    assert float(streaks.std[3]) == pytest.approx(float(streaks.mean_covariance[3, 3]) ** 0.5)


def test_spectrum_is_never_negative(streaks: GaussianField) -> None:
    spectrum = torch.fft.rfft2(streaks.covariance).permute(2, 3, 0, 1)

    values = torch.linalg.eigvalsh(spectrum)

    assert float(values.min()) > -1e-9 * float(values.max())


@pytest.mark.parametrize("size", [(40, 32), (24, 90)])
def test_draws_have_the_covariances_of_the_field(streaks: GaussianField, size: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)

    drawn = torch.stack([streaks.draw(*size, generator=generator) for _ in range(60)]).double()

    around = drawn - drawn.mean(dim=(2, 3), keepdim=True)
    assert drawn.shape[1:] == (4, *size)
    # a cell with one 3 rows lower, and with one 2 columns on
    below = (around[:, 0, :-3] * around[:, 1, 3:]).mean()
    beside = (around[:, 0, :, :-2] * around[:, 0, :, 2:]).mean()
    above = (around[:, 0, 3:] * around[:, 1, :-3]).mean()
    assert float(below) == pytest.approx(float(streaks.covariance[0, 1, 3, 0]), abs=0.08)
    assert float(beside) == pytest.approx(float(streaks.covariance[0, 0, 0, 2]), abs=0.08)
    assert float(above) == pytest.approx(0.0, abs=0.08)
    assert float(drawn[:, 3].mean(dim=(1, 2)).std()) == pytest.approx(float(streaks.std[3]), rel=0.3)


def test_draws_do_not_meet_around_the_torus(streaks: GaussianField) -> None:
    generator = torch.Generator().manual_seed(0)

    drawn = torch.stack([streaks.draw(64, 64, generator=generator)[0] for _ in range(60)])

    # columns 0 and 63 would be neighbours on a torus of 64, and share 3 of 4 cells
    assert float((drawn[:, :, 0] * drawn[:, :, 63]).mean()) == pytest.approx(0.0, abs=0.1)


def test_temperature_scales_what_departs_from_the_mean(streaks: GaussianField) -> None:
    cold, plain, hot = (
        streaks.draw(8, 8, temperature=temperature, generator=torch.Generator().manual_seed(3))
        for temperature in (0.0, 1.0, 2.0)
    )

    torch.testing.assert_close(cold, streaks.mean.float()[:, None, None].expand(4, 8, 8))
    torch.testing.assert_close(hot - cold, 2.0 * (plain - cold))


def test_posterior_variance_is_part_of_the_field(tmp_path: Path) -> None:
    def moments_of(position: int) -> Tensor:
        return _streaks(position, 8, 8, logvar=1.0)

    with_own = fit_prior(_make(tmp_path / "a", moments_of, 8)).components[0]
    without = fit_prior(_make(tmp_path / "b", moments_of, 8, content="mode")).components[0]

    difference = with_own.covariance[..., 0, 0] - without.covariance[..., 0, 0]
    torch.testing.assert_close(difference, torch.eye(4, dtype=torch.float64) * torch.e, atol=1e-6, rtol=0)
    assert with_own.covariance[0, 0, 0, 1] == without.covariance[0, 0, 0, 1]


def test_mixture_tells_groups_apart(tmp_path: Path) -> None:
    def moments_of(position: int) -> Tensor:
        moments = _streaks(position, 16, 16)
        return (
            moments + 50.0 * torch.tensor([1.0, 0, 0, 0, 0, 0, 0, 0])[:, None, None] if position % 3 == 0 else moments
        )

    prior = fit_prior(_make(tmp_path / "store", moments_of, 24), num_components=2)

    assert [field.num_pictures for field in prior.components] == [16, 8]
    assert [field.weight for field in prior.components] == pytest.approx([2 / 3, 1 / 3])
    assert [round(float(field.mean[0]) / 50) for field in prior.components] == [0, 1]


def test_mixture_draws_components_by_weight() -> None:
    fields = []
    for weight, mean in ((0.75, 0.0), (0.25, 100.0)):
        zero = torch.zeros(1, 1, dtype=torch.float64)
        field = torch.zeros(1, 1, 2 * WINDOW, 2 * WINDOW, dtype=torch.float64)
        fields.append(
            GaussianField(
                weight=weight,
                num_pictures=4,
                mean=torch.full((1,), mean, dtype=torch.float64),
                mean_covariance=zero,
                covariance=field,
            )
        )
    generator = torch.Generator().manual_seed(0)

    drawn = [float(FieldPrior(tuple(fields)).draw(1, 1, generator=generator)) for _ in range(100)]

    assert set(drawn) == {0.0, 100.0}
    assert sum(drawn) / 100 == pytest.approx(25, abs=10)


def test_small_groups_are_dissolved(tmp_path: Path) -> None:
    def moments_of(position: int) -> Tensor:
        moments = _streaks(position, 8, 8)
        return moments + 1000.0 if position == 0 else moments

    prior = fit_prior(_make(tmp_path / "store", moments_of, 12), num_components=3)

    assert sum(field.num_pictures for field in prior.components) == 12
    assert min(field.num_pictures for field in prior.components) >= 4


def test_equal_pictures_make_one_component(tmp_path: Path) -> None:
    prior = fit_prior(_make(tmp_path / "store", lambda position: _streaks(0, 8, 8), 8), num_components=2)

    assert [field.num_pictures for field in prior.components] == [8]


def test_latents_larger_than_a_window_and_of_several_sizes_are_taken(tmp_path: Path) -> None:
    def moments_of(position: int) -> Tensor:
        return _streaks(position, 70 if position % 2 else 9, 12)

    field = fit_prior(_make(tmp_path / "store", moments_of, 8)).components[0]

    assert field.covariance[0, 0, 0, 0] == pytest.approx(1.0, abs=0.2)
    assert float(field.covariance[..., WINDOW, :].abs().max()) < 1e-12


def test_fit_tells_how_far_it_is(tmp_path: Path) -> None:
    steps: list[tuple[int, int]] = []

    fit_prior(
        _make(tmp_path / "store", lambda position: _streaks(position, 8, 8), 8),
        num_components=2,
        progress=lambda done, total: steps.append((done, total)),
    )

    assert steps == [(done, 16) for done in range(1, 17)]


@pytest.mark.parametrize(
    ("num_components", "message"),
    [
        (0, r"num_components is 0, it must be at least 1"),
        (3, r"holds 9 items, 3 components need at least 12; encode more pictures or ask for fewer components"),
    ],
)
def test_fit_refuses(num_components: int, message: str, store_folder: Path) -> None:
    with pytest.raises(UserError, match=message):
        fit_prior(store_folder, num_components=num_components)


def test_normal_prior_is_normal() -> None:
    drawn = NormalPrior(4).draw(100, 100, temperature=2.0, generator=torch.Generator().manual_seed(0))

    assert drawn.shape == (4, 100, 100)
    assert float(drawn.std()) == pytest.approx(2.0, abs=0.03)
