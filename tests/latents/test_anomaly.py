"""The detector as a whole: fitted to crops of a photo by a tiny VAE, and tried on others."""

import copy
import dataclasses
import json

import numpy as np
import pytest
import skimage.data
import torch
from safetensors.torch import load_file, save_file

from sd_vae.data import PictureTransform
from sd_vae.errors import UserError
from sd_vae.images import to_unit_range
from sd_vae.latents.anomaly import (
    SCORES,
    FitConfig,
    Origin,
    fit,
    fitting,
    load_detector,
    save_detector,
    score,
    vae_fingerprint,
)
from sd_vae.latents.anomaly.evidence import look, weigh, windows
from sd_vae.latents.anomaly.heat import heat_map
from sd_vae.latents.anomaly.painting import KINDS

SIDE = 24


def crops(count, *, seed=0):
    """Crops of one photo, (3, 24, 24) in uint8."""
    photo = torch.from_numpy(skimage.data.astronaut()).permute(2, 0, 1)
    rng = np.random.default_rng(seed)
    places = rng.integers(0, 512 - SIDE, (count, 2)).tolist()
    return [photo[:, top : top + SIDE, left : left + SIDE] for top, left in places]


@pytest.fixture(scope="module")
def vae():
    from sd_vae.autoencoder import AutoencoderKL

    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoencoderKL(
            block_out_channels=(8, 16),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=4,
        ).eval()


@pytest.fixture(scope="module")
def detector(vae):
    return fit(vae, crops(40), FitConfig(num_steps=2))


@pytest.fixture
def origin(vae, detector):
    return Origin(
        vae="vae",
        fingerprint=vae_fingerprint(vae),
        latent_channels=4,
        transform=PictureTransform(size=SIDE, factor=2),
        normal="normal",
        num_normal=40,
        num_calibrated=10,
        num_steps=2,
        seed=0,
    )


def test_fit_calibrates_on_pictures_that_it_leaves_out(detector):
    assert {name: len(values) for name, values in detector.calibration.items()} == dict.fromkeys(detector.scores, 10)


def test_fit_is_the_same_again(vae, detector):
    again = fit(vae, crops(40), FitConfig(num_steps=2))

    assert again.calibration == detector.calibration


def test_fit_tells_how_far_it_is(vae):
    told = []

    fit(vae, crops(8), FitConfig(num_steps=0), progress=lambda stage, done, total: told.append((stage, done)))

    assert told[:2] == [("looking at normal pictures", 1), ("looking at normal pictures", 2)]
    assert told[-1] == ("calibrating", 2)


def test_fit_keeps_pictures_from_all_of_them_for_the_network(vae, monkeypatch):
    given = []
    monkeypatch.setattr(fitting, "MAX_PICTURES", 5)
    monkeypatch.setattr(fitting, "teach", lambda pictures, **_: given.extend(pictures) or None)
    pictures = [torch.full((3, SIDE, SIDE), index, dtype=torch.uint8) for index in range(40)]

    fit(vae, pictures, FitConfig(num_steps=1))

    kept = [int(picture[0, 0, 0]) for picture in given]
    assert len(set(kept)) == 5
    assert max(kept) >= 20


def test_fit_tells_how_far_the_network_is(vae):
    told = []

    fit(vae, crops(8), FitConfig(num_steps=2), progress=lambda *one: told.append(one))

    assert [one for one in told if one[0] == "teaching the network"] == [
        ("teaching the network", 1, 2),
        ("teaching the network", 2, 2),
    ]


def test_fit_without_a_network_has_no_learned_scores(vae):
    detector = fit(vae, crops(8), FitConfig(num_steps=0))

    assert detector.net is None
    assert detector.scores == ("joint", "elbo", "pooled", "local", "structure", "pixel")


def test_fit_needs_pictures_on_both_sides(vae):
    with pytest.raises(UserError, match="1 normal pictures are left to fit to"):
        fit(vae, crops(2), FitConfig(calibration=0.5))
    with pytest.raises(UserError, match="1 normal pictures are left to calibrate alarms on"):
        fit(vae, crops(4), FitConfig(num_steps=0))


def test_config_names_every_value_that_is_out_of_range():
    with pytest.raises(UserError, match=r"calibration is 1.*num_steps is -1.*seed is -1"):
        FitConfig(calibration=1.0, num_steps=-1, seed=-1)


def test_score_gives_every_score_and_map(vae, detector):
    x = to_unit_range(torch.stack(crops(3, seed=1)))

    found = score(detector, vae, x)

    assert set(found.scores) == set(SCORES) - {"lpips"}
    assert {tuple(values.shape) for values in found.scores.values()} == {(3,)}
    assert {tuple(values.shape) for values in found.maps.values()} == {(3, SIDE // 2, SIDE // 2)}
    assert set(found.maps) == set(found.scores) - {"pooled"}


def test_learned_is_the_surest_of_the_kinds(vae, detector):
    found = score(detector, vae, to_unit_range(torch.stack(crops(3, seed=1))))

    for values in (found.scores, found.maps):
        assert torch.equal(values["learned"], torch.stack([values[kind] for kind in KINDS]).amax(dim=0))


def test_one_hot_cell_is_seen_whatever_the_factor(vae, detector):
    class OneCell(torch.nn.Module):
        def forward(self, x):
            logits = torch.full((1, 4, x.shape[2] // 8, x.shape[3] // 8), -8.0)
            logits[..., 1, 1] = 8.0
            return logits

    x = torch.zeros(1, 3, 64, 64)
    fine = look(vae, x)
    coarse = fine._replace(mean=fine.mean[..., ::16, ::16], rate=fine.rate[..., ::16, ::16])  # factor 32

    for seen in (fine, coarse):
        found = dataclasses.replace(detector, net=OneCell()).examine(seen)
        assert float(found.scores["lines"]) == 8.0
        assert float(found.maps["lines"].max()) > 4.0


def test_score_of_a_picture_does_not_depend_on_the_batch(vae, detector):
    x = to_unit_range(torch.stack(crops(3, seed=1)))

    together, alone = score(detector, vae, x), score(detector, vae, x[1:2])

    for name, values in alone.scores.items():
        torch.testing.assert_close(together.scores[name][1:2], values, rtol=1e-4, atol=1e-5)


def test_noise_is_less_normal_than_the_photo(vae, detector):
    x = to_unit_range(torch.stack(crops(6, seed=1)))
    noisy = (x + 0.8 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))).clamp(-1, 1)

    plain, other = score(detector, vae, x).scores, score(detector, vae, noisy).scores

    assert all(other[name].mean() > plain[name].mean() for name in ("joint", "local", "pooled"))


def test_elbo_is_the_gaussian_likelihood_and_the_divergence(vae, detector):
    seen = look(vae, to_unit_range(torch.stack(crops(2, seed=1))))

    found = detector.examine(seen).scores["elbo"]

    normal = torch.distributions.Normal(seen.recon.double(), detector.noise**0.5)
    expected = (seen.rate.double().sum(dim=(1, 2)) - normal.log_prob(seen.x.double()).sum(dim=(1, 2, 3))) / seen.x[
        0
    ].numel()
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


def test_colour_is_the_part_of_the_error_that_keeps_brightness(vae):
    seen = look(vae, to_unit_range(torch.stack(crops(1))))
    grey = seen._replace(recon=seen.x + 0.1)
    tinted = seen._replace(recon=seen.x + torch.tensor([0.1, -0.1, 0.0])[:, None, None])

    plain, coloured = weigh(grey), weigh(tinted)

    torch.testing.assert_close(plain.pixel, torch.full_like(plain.pixel, 0.01))
    assert plain.colour.max() < 1e-6
    torch.testing.assert_close(coloured.colour, coloured.pixel)


def test_windows_hold_each_cell_with_its_neighbours():
    mean = torch.arange(24.0).view(1, 2, 3, 4)

    found = windows(mean)

    assert found.shape == (1, 12, 18)
    assert found[0, 5].tolist() == [*mean[0, 0, :3, :3].flatten().tolist(), *mean[0, 1, :3, :3].flatten().tolist()]
    assert found[0, 0, :3].tolist() == [0, 0, 1]  # the nearest cell stands for what is outside


def test_pictures_smaller_than_the_ssim_window_are_refused(vae):
    with pytest.raises(UserError, match="8x8 pixels are smaller than SSIM's window of 11"):
        weigh(look(vae, torch.zeros(1, 3, 8, 8)))


def test_another_lpips_than_that_of_the_fit_is_refused(vae, detector):
    seen = look(vae, to_unit_range(torch.stack(crops(1))))

    with pytest.raises(UserError, match="fitted with LPIPS network alex and is used with none"):
        dataclasses.replace(detector, lpips_net="alex").examine(seen)


@pytest.mark.shared
def test_lpips_is_a_score_with_a_map_whose_mean_is_lpips(vae, shared):
    from sd_vae.losses.perceptual import LPIPS

    perceptual = LPIPS("alex", str(shared / "weights" / "alexnet_features_torchvision.pth"))
    photos = torch.from_numpy(skimage.data.astronaut()).permute(2, 0, 1)
    pictures = [photos[:, 64 * index : 64 * index + 64, 100:164] for index in range(7)]
    detector = fit(vae, pictures, FitConfig(calibration=0.3, num_steps=0), perceptual=perceptual)
    seen = look(vae, to_unit_range(pictures[0][None]))

    found = detector.examine(seen, perceptual)

    assert "lpips" in detector.scores
    # brought to the size of the latent by bilinear interpolation, which keeps the mean but for the borders
    torch.testing.assert_close(found.maps["lpips"].mean(), perceptual(seen.recon, seen.x)[0], rtol=0.1, atol=0.0)


@pytest.mark.parametrize("has_network", [True, False])
def test_detector_comes_back_from_its_file(vae, detector, origin, tmp_path, has_network):
    if not has_network:
        detector, origin = fit(vae, crops(40), FitConfig(num_steps=0)), dataclasses.replace(origin, num_steps=0)
    save_detector(tmp_path / "m.safetensors", detector, origin)
    before = torch.random.get_rng_state()

    again, found = load_detector(tmp_path / "m.safetensors")

    assert torch.equal(torch.random.get_rng_state(), before)
    assert again.scores == detector.scores

    assert found == origin
    assert again.calibration == detector.calibration
    assert again.ranges == detector.ranges
    x = to_unit_range(torch.stack(crops(2, seed=1)))
    expected = score(detector, vae, x).scores
    assert all(torch.equal(values, expected[name]) for name, values in score(again, vae, x).scores.items())


def test_a_file_that_is_no_detector_is_refused(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "m.safetensors")

    with pytest.raises(UserError, match="is not a detector of sd-vae"):
        load_detector(tmp_path / "m.safetensors")


def test_a_damaged_detector_is_refused_with_what_is_wrong(detector, origin, tmp_path):
    path = tmp_path / "m.safetensors"
    save_detector(path, detector, origin)
    tensors = load_file(path)
    del tensors["joint.mean"]
    tensors["extra"] = torch.zeros(1)
    tensors["local.mean"] = torch.zeros(5)
    tensors["pooled.mean"][0] = float("nan")
    save_file(tensors, path, {"sd_vae_anomaly": json.dumps(dataclasses.asdict(origin))})

    with pytest.raises(
        UserError, match=r"joint.mean is missing.*extra is unexpected.*\(5,\) instead of.*pooled.mean holds"
    ):
        load_detector(path)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("{", "the description in .* is not JSON"),
        ("[]", "has version None of a detector's layout"),
        ('{"version": 1}', "has version 1 of a detector's layout, this sd-vae reads version 2"),
        ('{"version": 2}', "vae is missing"),
    ],
)
def test_a_description_that_cannot_be_read_is_refused(tmp_path, text, complaint):
    save_file({"noise": torch.zeros(())}, tmp_path / "m.safetensors", {"sd_vae_anomaly": text})

    with pytest.raises(UserError, match=complaint):
        load_detector(tmp_path / "m.safetensors")


def test_fingerprint_is_of_encoder_and_decoder(vae):
    encoder, decoder = copy.deepcopy(vae), copy.deepcopy(vae)
    with torch.no_grad():
        encoder.encoder.conv_in.bias += 1.0
        decoder.decoder.conv_out.bias += 1.0

    assert len({vae_fingerprint(one) for one in (vae, encoder, decoder)}) == 3
    assert vae_fingerprint(copy.deepcopy(vae)) == vae_fingerprint(vae)


def test_heat_is_bright_where_the_map_is_high():
    values = torch.zeros(4, 4)
    values[1, 2] = 2.0

    picture = np.asarray(heat_map(torch.zeros(3, 32, 32), values, (0.0, 2.0)).convert("L"), float)

    assert picture.shape == (32, 32)
    assert np.unravel_index(picture.argmax(), picture.shape)[0] // 8 == 1
    assert picture[8:16, 16:24].mean() > picture[24:, :8].mean() + 40
