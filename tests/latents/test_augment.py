"""Variants: what they are made of, that each stands for itself, and who is mixed with whom."""

from pathlib import Path
from typing import Any

import pytest
import synthetic_store as synthetic
import torch

from sd_vae.errors import UserError
from sd_vae.latents import LatentDataset
from sd_vae.latents.augment import AugmentConfig, Variant, augment, posterior_reach, variants
from sd_vae.latents.direction import Direction

MOVE = Direction(vector=torch.ones(4, 1, 1), num_positive=2, num_negative=2, separation=1.0)


@pytest.fixture
def dataset(store_folder: Path) -> LatentDataset:
    """9 latents, those of records 2 and 8 of another size; labels are the record's number modulo 3."""
    return LatentDataset(store_folder, content="moments")


def _made(dataset: LatentDataset, labels: list[Any] | None = None, **options: Any) -> list[Variant]:
    return list(variants(dataset, labels, AugmentConfig(**options)))


def test_augment_is_its_formula() -> None:
    mean, std, partner = torch.randn(3, 4, 2, 2)
    std = std.abs()

    z = augment(
        mean,
        std,
        generator=torch.Generator().manual_seed(1),
        temperature=2.0,
        partner=partner,
        share=0.25,
        directions=(MOVE, MOVE),
        strengths=(0.5, 1.0),
    )

    noise = torch.randn(4, 2, 2, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(z, 0.75 * mean + 0.25 * partner + 2.0 * std * noise + 1.5)


def test_augment_without_anything_is_the_mean() -> None:
    mean = torch.randn(4, 2, 2)

    assert torch.equal(augment(mean, generator=torch.Generator()), mean)


def test_augment_refuses_a_partner_of_another_shape() -> None:
    with pytest.raises(UserError, match=r"the partner has shape \(4, 2, 3\), the latent \(4, 2, 2\)"):
        augment(torch.zeros(4, 2, 2), generator=torch.Generator(), partner=torch.zeros(4, 2, 3), share=0.5)


def test_variants_of_an_item_stand_together(dataset: LatentDataset) -> None:
    made = _made(dataset, per_image=3)

    assert [(one.index, one.number) for one in made] == [(index, number) for index in range(9) for number in range(3)]


def test_variant_depends_on_seed_item_and_number_alone(dataset: LatentDataset) -> None:
    few, many, other = _made(dataset, per_image=1), _made(dataset, per_image=3), _made(dataset, per_image=1, seed=1)

    assert all(torch.equal(a.z, b.z) for a, b in zip(few, many[::3], strict=True))
    assert not any(torch.equal(a.z, b.z) for a, b in zip(few, other, strict=True))


def test_partners_have_the_same_label_and_size(dataset: LatentDataset) -> None:
    labels = dataset.column("label")

    made = _made(dataset, labels, per_image=20)

    sizes = dataset.sizes.tolist()
    mixed = [one for one in made if one.partner is not None]
    assert len(mixed) > 100
    assert all(labels[one.index] == labels[one.partner] for one in mixed if one.partner is not None)
    assert all(sizes[one.index] == sizes[one.partner] for one in mixed if one.partner is not None)
    assert all(one.index != one.partner for one in mixed)
    assert max(one.share for one in mixed) <= 0.3


def test_without_labels_any_of_one_size_are_mixed(dataset: LatentDataset) -> None:
    labels = dataset.column("label")

    made = _made(dataset, None, per_image=20)

    assert any(labels[one.index] != labels[one.partner] for one in made if one.partner is not None)


def test_an_item_alone_with_its_label_is_not_mixed(dataset: LatentDataset) -> None:
    made = _made(dataset, list(range(9)), temperature=0.0)

    assert all((one.partner, one.share) == (None, 0.0) for one in made)
    assert all(torch.equal(one.z, dataset.sample(one.index)[:4]) for one in made)


def test_strength_0_leaves_everything(dataset: LatentDataset) -> None:
    made = _made(dataset, strength=0.0, directions=(MOVE,))

    assert all(torch.equal(one.z, dataset.sample(one.index)[:4]) for one in made)


def test_directions_are_added_by_factors_of_both_signs(dataset: LatentDataset) -> None:
    made = _made(dataset, directions=(MOVE,), temperature=0.0, mix=0.0, strength=2.0)

    factors = [one.strengths[0] for one in made]
    assert min(factors) < -1.0
    assert max(factors) > 1.0
    torch.testing.assert_close(made[0].z, dataset.sample(0)[:4] + factors[0])


def test_mixing_does_not_move_the_noise(dataset: LatentDataset) -> None:
    plain, mixed = _made(dataset, mix=0.0)[0], _made(dataset, mix=0.5)[0]

    assert mixed.partner is not None
    way = dataset.sample(mixed.partner)[:4] - dataset.sample(0)[:4]
    torch.testing.assert_close(mixed.z, plain.z + mixed.share * way)


def test_posterior_reach_is_the_share_of_the_spread(dataset: LatentDataset) -> None:
    moments = [dataset.sample(index) for index in range(9)]
    own = torch.stack([one[4:].exp().mean() for one in moments]).mean()
    spread = torch.cat([one[:4].flatten() for one in moments]).var(correction=0)

    assert posterior_reach(dataset) == pytest.approx(float((own / spread).sqrt()))


def test_a_store_without_posterior_has_variants_without_noise(tmp_path: Path) -> None:
    synthetic.make(tmp_path / "store", content="mode")
    dataset = LatentDataset(tmp_path / "store", content="mode")

    assert len(_made(dataset, temperature=0.0)) == 90
    assert posterior_reach(dataset) is None
    with pytest.raises(UserError, match=r"holds content mode, which has no posterior to draw from; encode moments, or"):
        _made(dataset)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"per_image": 0}, r"per_image is 0, it must be at least 1"),
        ({"strength": -1.0}, r"strength is -1.0, it must be a finite number of at least 0"),
        ({"temperature": float("inf")}, r"temperature is inf"),
        ({"mix": 1.5}, r"mix is 1.5, it must be in \[0, 1\]"),
        ({"mix": 0.6, "strength": 2.0}, r"mix is 0.6 and strength 2.0, their product must be at most 1"),
        ({"mix": -1.0, "per_image": 0}, r"per_image is 0, .*; mix is -1.0"),
    ],
)
def test_config_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        AugmentConfig(**options)
