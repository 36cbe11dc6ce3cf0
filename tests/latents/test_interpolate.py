"""Paths begin and end at their ends; a slerp keeps lengths; a geodesic's steps look equally far apart."""

from typing import Any

import pytest
import torch
from torch import Tensor

from sd_vae.autoencoder import AutoencoderKL
from sd_vae.errors import UserError
from sd_vae.latents.interpolate import blend, grid_distances, interpolate, interpolate_grid


def _ends(num: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(4, 5, 6, generator=generator) for _ in range(num)]


def _squared(recon: Tensor, x: Tensor) -> Tensor:
    return (recon - x).square().mean(dim=(1, 2, 3))


class _Uneven(torch.nn.Module):
    """A decoder whose picture is z's mean, cubed: slow in the middle, fast at the ends."""

    def __init__(self, like: AutoencoderKL) -> None:
        super().__init__()
        self.config, self.device, self.dtype = like.config, like.device, like.dtype

    def decode(self, z: Tensor) -> Any:
        level = z.mean(dim=(1, 2, 3), keepdim=True) ** 3
        return type("Decoded", (), {"sample": level.expand(-1, 3, 4, 4)})()


def test_line_goes_from_end_to_end(tiny_vae: AutoencoderKL) -> None:
    a, b, c = _ends(3)

    found = interpolate(tiny_vae, [a, b, c], steps=5)

    assert found.positions == pytest.approx([0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75, 2])
    assert all(torch.equal(found.z[place], end) for place, end in ((0, a), (4, b), (8, c)))
    torch.testing.assert_close(found.z[2], (a + b) / 2)
    with torch.no_grad():
        torch.testing.assert_close(found.x[6], tiny_vae.decode(found.z[6:7]).sample[0].clamp(-1, 1))
    assert found.distances is None
    assert found.unevenness is None


def test_slerp_keeps_the_length_and_an_even_angle(tiny_vae: AutoencoderKL) -> None:
    a, b = _ends()
    b = b * a.norm() / b.norm()
    places = torch.linspace(0, 1, 5)

    found = blend(tiny_vae, a, b, places, "slerp")

    torch.testing.assert_close(found[0], a)
    torch.testing.assert_close(found[-1], b)
    torch.testing.assert_close(found.flatten(1).norm(dim=1), a.norm().expand(5))
    angles = torch.cosine_similarity(found[1:].flatten(1), found[:-1].flatten(1)).arccos()
    torch.testing.assert_close(angles, angles.mean().expand(4))


def test_slerp_turns_around_the_shift(tiny_vae: AutoencoderKL) -> None:
    a, b = _ends()
    expected = blend(tiny_vae, a, b, torch.tensor([0.3]), "slerp") + 7.0
    tiny_vae.register_to_config(shift_factor=7.0)

    found = blend(tiny_vae, a + 7.0, b + 7.0, torch.tensor([0.3]), "slerp")

    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("factor", [1.0, 2.0, 0.0])
def test_slerp_of_one_direction_is_a_line(factor: float, tiny_vae: AutoencoderKL) -> None:
    a, _ = _ends()

    found = blend(tiny_vae, a, factor * a, torch.tensor([0.5]), "slerp")

    torch.testing.assert_close(found[0], (1 + factor) / 2 * a)


def test_geodesic_walks_at_an_even_pace(tiny_vae: AutoencoderKL) -> None:
    ends = [torch.full((4, 2, 2), level) for level in (-1.0, 1.0)]
    vae: Any = _Uneven(tiny_vae)
    line = interpolate(vae, ends, steps=8, distance=_squared)

    found = interpolate(vae, ends, steps=8, path="geodesic", distance=_squared)

    assert line.unevenness is not None
    assert found.unevenness is not None
    assert line.unevenness > 2.0
    assert found.unevenness <= 0.05
    assert (found.positions[0], found.positions[-1]) == (0.0, 1.0)
    assert list(found.positions) == sorted(found.positions)
    torch.testing.assert_close(found.z[3], blend(vae, *ends, torch.tensor([found.positions[3]]), "lerp")[0])
    torch.testing.assert_close(_squared(found.x[1:], found.x[:-1]), torch.tensor(found.distances))


def test_geodesic_is_even_within_each_leg(tiny_vae: AutoencoderKL) -> None:
    ends = [torch.full((4, 2, 2), level) for level in (-1.0, 1.0, 0.0)]
    vae: Any = _Uneven(tiny_vae)

    found = interpolate(vae, ends, steps=6, path="geodesic", distance=_squared)

    assert found.distances is not None
    for leg in (torch.tensor(found.distances[:5]), torch.tensor(found.distances[5:])):
        assert float(leg.max() - leg.min()) <= 0.05 * float(leg.mean())
    assert found.positions[5] == 1.0


def test_geodesic_between_equal_pictures_stays(tiny_vae: AutoencoderKL) -> None:
    a, _ = _ends()

    found = interpolate(tiny_vae, [a, a], steps=4, path="geodesic", distance=_squared)

    assert found.distances == (0.0, 0.0, 0.0)
    assert found.unevenness == 0.0


@pytest.mark.parametrize("path", ["lerp", "geodesic"])
def test_progress_ends_at_its_total(path: Any, tiny_vae: AutoencoderKL) -> None:
    steps: list[tuple[int, int]] = []

    interpolate(
        tiny_vae,
        _ends(3),
        steps=4,
        path=path,
        distance=_squared,
        progress=lambda done, total: steps.append((done, total)),
    )

    assert [done for done, _ in steps[:-1]] == list(range(1, len(steps)))
    assert all(done <= total for done, total in steps)
    assert steps[-1][0] == steps[-1][1]


def test_grid_has_its_corners(tiny_vae: AutoencoderKL) -> None:
    corners = _ends(4)

    x = interpolate_grid(tiny_vae, corners, steps=3)

    with torch.no_grad():
        decoded = tiny_vae.decode(torch.stack(corners)).sample.clamp(-1, 1)
        middle = tiny_vae.decode(torch.stack(corners).mean(dim=0, keepdim=True)).sample[0].clamp(-1, 1)
    assert x.shape == (3, 3, 3, 10, 12)
    torch.testing.assert_close(torch.stack([x[0, 0], x[0, 2], x[2, 0], x[2, 2]]), decoded)
    torch.testing.assert_close(x[1, 1], middle)


def test_grid_distances_are_of_neighbours() -> None:
    levels = torch.tensor([[0.0, 1.0, 2.0], [0.0, 0.0, 0.0]])
    x = levels[:, :, None, None, None].expand(2, 3, 3, 4, 4)

    right, below = grid_distances(x, _squared, "cpu")

    assert right == pytest.approx([1.0, 0.0])
    assert below == pytest.approx([5 / 3])


@pytest.mark.parametrize(
    ("ends", "options", "message"),
    [
        (_ends(1), {}, r"there are 1 pictures to go between, at least 2 are needed"),
        (_ends(), {"steps": 1}, r"steps is 1, it must be at least 2: the ends themselves"),
        (_ends(), {"path": "curve"}, r"path is 'curve', choose one of: lerp, slerp, geodesic"),
        (_ends(), {"path": "geodesic"}, r"path is geodesic and nothing measures .*; give a distance"),
        ([_ends()[0], _ends()[0][:, :2]], {}, r"latent 2 has shape \(4, 2, 6\), the first has \(4, 5, 6\)"),
        ([torch.zeros(3, 2, 2)] * 2, {}, r"latent 1 has shape \(3, 2, 2\), this VAE takes \(4, h, w\)"),
        ([_ends()[0], -_ends()[0]], {"path": "slerp"}, r"two latents point opposite ways, .*; choose lerp"),
    ],
)
def test_interpolate_refuses(
    ends: list[Tensor], options: dict[str, Any], message: str, tiny_vae: AutoencoderKL
) -> None:
    with pytest.raises(UserError, match=message):
        interpolate(tiny_vae, ends, **options)


@pytest.mark.parametrize(
    ("num", "options", "message"),
    [
        (3, {}, r"there are 3 pictures to go between, at least 4 are needed"),
        (5, {}, r"a grid has 4 corners, there are 5 pictures"),
        (4, {"path": "geodesic"}, r"path is geodesic, which spaces the steps of a line"),
        (4, {"steps": 1}, r"steps is 1, it must be at least 2: the corners themselves"),
    ],
)
def test_grid_refuses(num: int, options: dict[str, Any], message: str, tiny_vae: AutoencoderKL) -> None:
    with pytest.raises(UserError, match=message):
        interpolate_grid(tiny_vae, _ends(num), **options)
