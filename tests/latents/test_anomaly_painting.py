import numpy as np
import pytest
import skimage.data
import torch

from sd_vae.latents.anomaly.network import DefectNet, Example, teach
from sd_vae.latents.anomaly.painting import CHANCES, paint


@pytest.fixture
def photos():
    """Two photos of other sizes."""
    return skimage.data.astronaut()[100:196, 80:208], skimage.data.coffee()[40:120, 60:160]


def examples(count, *, seed=0):
    """Grey pictures, every other with a bright square that the reconstruction lacks."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for index in range(count):
        recon = torch.randint(80, 120, (3, 32, 32), generator=generator, dtype=torch.uint8)
        x, mask = recon.clone(), torch.zeros(32, 32, dtype=torch.float16)
        if index % 2:
            top, left = (8 * int(torch.randint(0, 4, (), generator=generator)) for _ in range(2))
            x[:, top : top + 8, left : left + 8] += 100
            mask[top : top + 8, left : left + 8] = 1.0
        found.append(Example(x, recon, torch.randn(4, 4, 4, generator=generator).half(), mask))
    return found


def test_paint_changes_the_picture_where_the_mask_says(photos):
    plain, donor = photos

    for seed in range(40):
        painted, mask = paint(plain, donor, np.random.default_rng(seed))

        assert painted.shape == plain.shape
        assert painted.dtype == np.uint8
        assert mask.shape == plain.shape[:2]
        assert mask.min() >= 0
        assert mask.max() <= 1 + 1e-6
        assert (painted != plain).any()
        # what is left outside of the mask is too little to be a defect; worst seen 0.49 levels
        assert np.abs(painted.astype(float) - plain)[mask == 0].mean() < 1.0


def test_paint_calls_nothing_a_defect_that_cannot_be_seen(monkeypatch):
    monkeypatch.setattr("sd_vae.latents.anomaly.painting.CHANCES", {"blur": 1.0})
    sky = np.full((96, 96, 3), (120, 160, 230), np.uint8)

    painted, mask = paint(sky, sky, np.random.default_rng(0))

    assert (painted == sky).all()
    assert not mask.any()


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
        painted, _ = paint(photos[0][:12, :9], photos[1], np.random.default_rng(seed))

        assert painted.shape == (12, 9, 3)


def test_kinds_of_defects_are_chosen_with_chances_that_add_up():
    assert sum(CHANCES.values()) == pytest.approx(1.0)


def test_taught_network_finds_what_the_reconstruction_lacks():
    net = teach(examples(32), num_steps=60, seed=0)
    seen = examples(8, seed=1)
    x, recon = (torch.stack([getattr(one, name) for one in seen]).float() / 127.5 - 1 for name in ("x", "recon"))

    logits = net(x, recon, torch.stack([one.mean for one in seen]).float())

    peaks = logits.flatten(1).max(dim=1).values
    assert logits.shape == (8, 4, 4)
    assert peaks[1::2].min() > peaks[::2].max()


def test_teaching_is_the_same_again_and_leaves_the_global_generator():
    before = torch.random.get_rng_state()

    one, again = (teach(examples(4), num_steps=2, seed=5) for _ in range(2))

    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), again.state_dict().values(), strict=True))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_teaching_tells_how_far_it_is():
    told = []

    teach(
        examples(4),
        [np.full((32, 32, 3), grey, np.uint8) for grey in (90, 110)],
        num_steps=1,
        num_first_steps=2,
        progress=lambda done, total: told.append((done, total)),
    )

    assert told == [(1, 3), (2, 3), (3, 3)]


def test_network_can_go_without_the_vae():
    net = DefectNet(latent_channels=4).eval()
    x = torch.rand(1, 3, 32, 32) * 2 - 1

    assert net(x).shape == (1, 4, 4)
    assert not torch.equal(net(x), net(x, -x, torch.ones(1, 4, 4, 4)))


def test_network_answers_once_in_eight_pixels_whatever_the_factor():
    net = DefectNet(latent_channels=2).eval()

    logits = net(torch.zeros(1, 3, 40, 24), torch.zeros(1, 3, 40, 24), torch.zeros(1, 2, 20, 12))

    assert logits.shape == (1, 5, 3)
