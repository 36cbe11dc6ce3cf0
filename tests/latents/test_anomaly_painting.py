import numpy as np
import pytest
import skimage.data
import torch

from sd_vae.images import to_unit_range
from sd_vae.latents.anomaly import network
from sd_vae.latents.anomaly.network import DefectNet, teach
from sd_vae.latents.anomaly.painting import KINDS, paint


@pytest.fixture
def photos():
    """Two photos of other sizes."""
    return skimage.data.astronaut()[100:196, 80:208], skimage.data.coffee()[40:120, 60:160]


def test_paint_changes_the_picture_where_the_mask_says(photos):
    plain, donor = photos

    for seed in range(40):
        painted, masks, inside = paint(plain, donor, np.random.default_rng(seed))

        mask = masks.max(axis=0)
        assert painted.shape == plain.shape
        assert painted.dtype == np.uint8
        assert masks.shape == (4, *plain.shape[:2])
        assert inside.shape == plain.shape[:2]
        assert mask.min() >= 0
        assert mask.max() <= 1 + 1e-6
        assert (painted != plain).any()
        # what is left outside of the mask is too little to be a defect; worst seen 0.49 levels
        assert np.abs(painted.astype(float) - plain)[mask == 0].mean() < 1.0


def test_paint_calls_nothing_a_defect_that_cannot_be_seen(monkeypatch):
    monkeypatch.setattr("sd_vae.latents.anomaly.painting.CHANCES", {"blur": 1.0})
    sky = np.full((96, 96, 3), (120, 160, 230), np.uint8)

    painted, masks, _ = paint(sky, sky, np.random.default_rng(0))

    assert (painted == sky).all()
    assert not masks.any()


@pytest.mark.parametrize(("painted", "kind"), [("lines", 0), ("blur", 1), ("noise", 2), ("foreign", 3), ("moved", 3)])
def test_paint_says_which_kind_it_painted(monkeypatch, photos, painted, kind):
    monkeypatch.setattr("sd_vae.latents.anomaly.painting.CHANCES", {painted: 1.0})

    masks = sum(paint(*photos, np.random.default_rng(seed)).masks for seed in range(5))

    assert [bool(mask.any()) for mask in masks] == [index == kind for index in range(len(KINDS))]


def test_inside_of_a_patch_is_away_from_its_edge(monkeypatch, photos):
    monkeypatch.setattr("sd_vae.latents.anomaly.painting.CHANCES", {"foreign": 1.0})
    monkeypatch.setattr("sd_vae.latents.anomaly.painting.MAX_DEFECTS", 1)

    found = [paint(*photos, np.random.default_rng(seed)) for seed in range(20)]

    assert sum(one.inside.any() for one in found) > 5
    assert not any(one.inside[one.masks[3] < 0.5].any() for one in found)


def test_paint_follows_from_its_generator(photos):
    one, again, other = (paint(*photos, np.random.default_rng(seed)) for seed in (3, 3, 4))

    assert (one[0] == again[0]).all()
    assert (one[0] != other[0]).any()


def test_paint_leaves_the_picture_that_it_is_given(photos):
    before = photos[0].copy()

    paint(*photos, np.random.default_rng(0))

    assert (photos[0] == before).all()


def test_paint_takes_pictures_smaller_than_its_patches(photos):
    for seed in range(10):
        painted, *_ = paint(photos[0][:12, :9], photos[1], np.random.default_rng(seed))

        assert painted.shape == (12, 9, 3)


def grey_pictures(count):
    """Grey pictures with soft clouds, 48x48."""
    clouds = torch.randn(count, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    levels = 110 + 20 * torch.nn.functional.interpolate(clouds, size=(48, 48), mode="bicubic")
    return list(levels.clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy())


def test_taught_network_finds_a_line(monkeypatch):
    monkeypatch.setattr("sd_vae.latents.anomaly.painting.CHANCES", {"lines": 1.0})
    pictures = grey_pictures(8)
    net = teach(pictures, num_steps=40, seed=0)
    struck = [picture.copy() for picture in pictures]
    for picture in struck:
        picture[20:22, 6:40] = 255

    plain, found = (
        net(to_unit_range(torch.from_numpy(np.stack(some)).permute(0, 3, 1, 2)))[:, 0] for some in (pictures, struck)
    )

    assert found.shape == (8, 6, 6)
    assert found.flatten(1).max(dim=1).values.min() > plain.flatten(1).max(dim=1).values.max()
    assert set((found.flatten(1).argmax(dim=1) // 6).tolist()) == {2}  # rows 16 to 23


def test_inside_of_patches_teaches_nothing():
    net = DefectNet().eval()
    plain = np.zeros((16, 16, 3), np.uint8)
    masks, inside = np.zeros((4, 16, 16), np.float32), np.zeros((16, 16), bool)
    masks[3, :8] = 1.0
    with_mask, inside[:8] = masks.copy(), True

    def loss(masks, inside):
        return network._loss(net, [network.Painted(plain, masks, inside)]).item()

    assert loss(with_mask, inside) == pytest.approx(loss(np.zeros_like(masks), inside))
    assert loss(with_mask, np.zeros_like(inside)) != pytest.approx(loss(np.zeros_like(masks), np.zeros_like(inside)))


def test_teaching_is_the_same_again_and_leaves_the_global_generator():
    before = torch.random.get_rng_state()

    one, again = (teach(grey_pictures(4), num_steps=2, seed=5) for _ in range(2))

    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), again.state_dict().values(), strict=True))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_one_small_picture_does_not_make_the_squares_small():
    large = [skimage.data.astronaut()[:160, :200], skimage.data.coffee()[:160, :200]]

    with_it, without = (teach(pictures, num_steps=1) for pictures in ([*large, large[0][:16, :16]], large))

    assert torch.equal(with_it.layers[0][0].weight, without.layers[0][0].weight)


@pytest.mark.parametrize("num_steps", [1, 2, 25, 3000])
def test_learning_rate_rises_and_falls(num_steps):
    rates = [network._rate(step, num_steps) for step in range(num_steps)]

    assert min(rates) > 0
    assert max(rates) <= 1
    assert max(rates) > 0.9
    assert rates[-1] < 0.6 or num_steps == 1


def test_teaching_tells_how_far_it_is():
    told = []

    teach(grey_pictures(2), num_steps=3, progress=lambda done, total: told.append((done, total)))

    assert told == [(1, 3), (2, 3), (3, 3)]


def test_network_answers_once_in_eight_pixels_for_each_kind():
    assert DefectNet().eval()(torch.zeros(1, 3, 40, 24)).shape == (1, 4, 5, 3)
