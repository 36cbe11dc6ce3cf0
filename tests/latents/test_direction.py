"""Directions are differences of means; the separation is measured on the other half; files come back whole or not."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from sd_vae.errors import UserError
from sd_vae.latents.direction import Direction, direction, load_direction, save_direction


def _latents(num: int, seed: int, shift: float = 0.0, size: tuple[int, int] = (3, 5)) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(4, *size, generator=generator) + shift for _ in range(num)]


def test_direction_is_the_difference_of_means() -> None:
    positive, negative = _latents(5, 0, 2.0), _latents(3, 1)

    found = direction(positive, negative)

    expected = torch.stack(positive).mean(dim=0) - torch.stack(negative).mean(dim=0)
    torch.testing.assert_close(found.vector, expected)
    assert (found.num_positive, found.num_negative) == (5, 3)
    assert not found.is_pooled


def test_pooled_direction_takes_every_size() -> None:
    positive, negative = [*_latents(2, 0, 1.0), *_latents(2, 1, 1.0, (2, 2))], _latents(4, 2)

    found = direction(positive, negative, pooled=True)

    means = [torch.stack([z.mean(dim=(1, 2)) for z in group]).mean(dim=0) for group in (positive, negative)]
    torch.testing.assert_close(found.vector, (means[0] - means[1])[:, None, None])
    assert found.is_pooled


def test_separation_is_1_where_groups_lie_apart() -> None:
    assert direction(_latents(6, 0, 1.0), _latents(7, 1)).separation == 1.0


def test_separation_of_nothing_is_chance() -> None:
    # On its own pictures such a direction separates perfectly: 60 numbers a latent, 20 latents.
    areas = [direction(_latents(10, 2 * seed), _latents(10, 2 * seed + 1)).separation for seed in range(20)]

    assert sum(areas) / len(areas) == pytest.approx(0.5, abs=0.1)


def test_direction_moves_by_its_strength() -> None:
    found = direction(_latents(3, 0, 2.0), _latents(3, 1))
    z = torch.randn(2, 4, 3, 5)

    torch.testing.assert_close(found(z, 1.5), z + 1.5 * found.vector)


def test_pooled_direction_moves_every_size() -> None:
    found = direction(_latents(3, 0, 2.0), _latents(3, 1), pooled=True)

    assert found(torch.zeros(4, 9, 7), 1.0).shape == (4, 9, 7)


def test_direction_tells_how_far_it_is() -> None:
    steps: list[tuple[int, int]] = []

    direction(_latents(3, 0), _latents(2, 1), progress=lambda done, total: steps.append((done, total)))

    assert steps == [(done, 10) for done in range(1, 11)]


@pytest.mark.parametrize(
    ("positive", "negative", "message"),
    [
        (_latents(1, 0), _latents(3, 1), r"there are 1 positive latents, at least 2 are needed"),
        (_latents(3, 0), [], r"there are 0 negative latents, at least 2 are needed"),
        (
            _latents(3, 0),
            _latents(3, 1, 0, (5, 3)),
            r"negative latent 0 has shape \(4, 5, 3\), others have \(4, 3, 5\)",
        ),
        ([*_latents(2, 0), *_latents(1, 0, 0, (2, 2))], _latents(3, 1), r"positive latent 2 has shape \(4, 2, 2\)"),
    ],
)
def test_direction_refuses(positive: list[Tensor], negative: list[Tensor], message: str) -> None:
    with pytest.raises(UserError, match=message):
        direction(positive, negative)


@pytest.mark.parametrize("pooled", [False, True])
def test_direction_refuses_other_latents(pooled: bool) -> None:
    found = direction(_latents(3, 0), _latents(3, 1), pooled=pooled)

    with pytest.raises(UserError, match=r"the direction is of latents of shape \(4, .*, these are \(3, 3, 5\)"):
        found(torch.zeros(3, 3, 5), 1.0)


def test_direction_of_cells_refuses_other_sizes() -> None:
    found = direction(_latents(3, 0), _latents(3, 1))

    with pytest.raises(UserError, match=r"these are \(4, 4, 5\); bring the pictures to its size, or make a pooled"):
        found(torch.zeros(4, 4, 5), 1.0)


def test_file_comes_back(tmp_path: Path) -> None:
    found = direction(_latents(3, 0), _latents(4, 1), encoder="abc")

    save_direction(tmp_path / "d.safetensors", found)

    back = load_direction(tmp_path / "d.safetensors")
    assert torch.equal(back.vector, found.vector)
    assert (back.num_positive, back.num_negative, back.separation, back.encoder) == (3, 4, found.separation, "abc")


def _file(path: Path, tensors: dict[str, Tensor], about: Any) -> Path:
    save_file(tensors, path, metadata={"sd-vae": about if isinstance(about, str) else json.dumps(about)})
    return path


GOOD = {
    "format": "sd-vae direction",
    "version": 1,
    "num_positive": 2,
    "num_negative": 2,
    "separation": 1.0,
    "encoder": None,
}
VECTOR = {"direction": torch.zeros(4, 1, 1)}


@pytest.mark.parametrize(
    ("tensors", "about", "message"),
    [
        (VECTOR, GOOD | {"version": 2}, r"is a direction of version 2, this sd-vae reads 1; make it anew"),
        (VECTOR, GOOD | {"format": "other"}, r"holds no direction; make one with sd-vae latents direction"),
        (VECTOR, [1], r"holds no direction"),
        (VECTOR, "{", r"is no direction \("),
        ({"other": torch.zeros(4, 1, 1)}, GOOD, r"holds no direction"),
        ({"direction": torch.zeros(4)}, GOOD, r"holds no direction"),
        ({"direction": torch.full((4, 1, 1), torch.nan)}, GOOD, r"holds values that are not finite"),
        (VECTOR, {key: value for key, value in GOOD.items() if key != "separation"}, r"misses the key 'separation'"),
    ],
)
def test_load_refuses(tensors: dict[str, Tensor], about: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        load_direction(_file(tmp_path / "d.safetensors", tensors, about))


def test_load_refuses_what_is_not_there_or_no_tensors(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no tensors")

    with pytest.raises(UserError, match=r"there is no direction .*nope; make one with"):
        load_direction(tmp_path / "nope")
    with pytest.raises(UserError, match=r"text is no direction \(.*\); make one with"):
        load_direction(tmp_path / "text")
    with pytest.raises(UserError, match=r"is no direction"):
        load_direction(tmp_path)


def test_direction_is_not_pooled_when_cells_count() -> None:
    assert not Direction(vector=torch.zeros(4, 1, 2), num_positive=2, num_negative=2, separation=0.5).is_pooled
