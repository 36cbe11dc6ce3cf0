"""Pictures to files of quantised latents and back, by a tiny VAE."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from sd_vae.autoencoder import AutoencoderKL
from sd_vae.errors import UserError
from sd_vae.images import crop, pad_to_factor, to_tensor
from sd_vae.latents import encoder_fingerprint
from sd_vae.latents.compression import compress, decompress, open_srgb, read
from sd_vae.latents.compression.codec import quantise
from sd_vae.latents.compression.steps import level_of_quality, probe, sensitivity
from sd_vae.latents.fingerprint import decoder_fingerprint


@pytest.fixture
def x() -> torch.Tensor:
    """A smooth picture of 53x70 pixels, no multiple of anything."""
    coarse = torch.rand(1, 3, 6, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1
    return torch.nn.functional.interpolate(coarse, (53, 70), mode="bicubic").clamp(-1, 1)


def mean_of(vae: AutoencoderKL, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return vae.encode(pad_to_factor(x, vae.factor)).latent_dist.mode()


def test_decompress_decodes_the_quantised_latents(tiny_vae, x) -> None:
    found = compress(tiny_vae, x)

    recon = decompress(tiny_vae, found.data)

    with torch.no_grad():
        expected = crop(tiny_vae.decode(found.z).sample, 53, 70)
    assert torch.equal(recon, expected)
    assert torch.equal(read(found.data).z, found.z)


def test_compress_rounds_to_the_nearest_multiple(tiny_vae, x) -> None:
    found = compress(tiny_vae, x)

    difference = (found.z - mean_of(tiny_vae, x)).abs().amax(dim=(0, 2, 3))

    steps = sensitivity(tiny_vae, probe(x, 2)).steps(found.level_db)
    assert bool((difference <= torch.tensor(steps) / 2 * (1 + 1e-5)).all())


@pytest.mark.parametrize("level_db", [-30.0, -20.0])
def test_steps_add_the_error_that_they_promise(tiny_vae, x, level_db) -> None:
    told = sensitivity(tiny_vae, probe(x, 2))
    z = mean_of(tiny_vae, x)
    steps = torch.tensor(told.steps(level_db))[:, None, None]

    with torch.no_grad():
        change = tiny_vae.decode((z / steps).round() * steps).sample - tiny_vae.decode(z).sample

    # one draw of noise and a first-order estimate; worst seen 12% over 6 pictures
    assert float(change.square().mean()) == pytest.approx(told.error * 10 ** (level_db / 10), rel=0.25)


def test_sensitivity_is_the_length_of_the_jacobians_columns(tiny_vae, x) -> None:
    x = x[..., :8, :8]
    z = mean_of(tiny_vae, x)

    jacobian = torch.autograd.functional.jacobian(lambda z: tiny_vae.decode(z).sample, z)  # (1, 3, 8, 8, 1, 4, 4, 4)

    exact = jacobian.flatten(0, 4).square().sum(dim=0).mean(dim=(1, 2)).sqrt()
    drawn = torch.tensor(sensitivity(tiny_vae, x.repeat(64, 1, 1, 1)).gains)
    # 64 draws over 16 cells; worst seen 6% over 6 pictures
    torch.testing.assert_close(drawn, exact, rtol=0.1, atol=0)


def test_compress_works_in_inference_mode(tiny_vae, x) -> None:
    outside = compress(tiny_vae, x)

    with torch.inference_mode():
        inside = compress(tiny_vae, x.clone())

    assert inside.data == outside.data


def test_sensitivity_leaves_the_weights_without_gradients(tiny_vae, x) -> None:
    sensitivity(tiny_vae, probe(x, 2))

    assert all(parameter.grad is None for parameter in tiny_vae.parameters())


def test_a_better_quality_takes_more_bytes_and_errs_less(tiny_vae, x) -> None:
    z = mean_of(tiny_vae, x)

    found = [compress(tiny_vae, x, quality=quality) for quality in (25, 75, 100)]

    sizes = [len(one.data) for one in found]
    errors = [float((one.z - z).square().mean()) for one in found]
    assert sizes == sorted(sizes)
    assert errors == sorted(errors, reverse=True)
    assert found[1].data == compress(tiny_vae, x).data


def test_default_quality_costs_a_fifth_of_a_decibel() -> None:
    assert 10 * np.log10(1 + 10 ** (level_of_quality(75) / 10)) == pytest.approx(0.2, abs=0.01)


@pytest.mark.parametrize("rate", [{"max_bytes": 1500}, {"bits_per_pixel": 1500 * 8 / (53 * 70)}])
def test_compress_fills_the_size_that_it_is_given(tiny_vae, x, rate) -> None:
    found = compress(tiny_vae, x, **rate)

    # a quarter of a decibel is 0.04 bits a number, 4 x 945 of them
    assert 1500 - 40 <= len(found.data) <= 1500


def test_compress_refuses_a_size_that_is_too_small(tiny_vae, x) -> None:
    with pytest.raises(UserError, match=r"the smallest file of this picture has \d+ bytes, more than 100"):
        compress(tiny_vae, x, max_bytes=100)


@pytest.mark.parametrize(
    ("rate", "words"),
    [
        ({"quality": 0}, "quality is 0, it must be from 1 to 100"),
        ({"quality": float("nan")}, "quality is nan"),
        ({"max_bytes": 0}, "a size in bytes is 0"),
        ({"bits_per_pixel": float("inf")}, "bits per pixel is inf"),
        ({"quality": 5, "max_bytes": 9}, r"quality \(5\) and a size in bytes \(9\) are given; choose one"),
        ({"note": "x" * 1025}, "the note has 1025 bytes, at most 1024"),
    ],
)
def test_compress_refuses_what_makes_no_sense(tiny_vae, x, rate, words) -> None:
    with pytest.raises(UserError, match=words):
        compress(tiny_vae, x, **rate)


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (1, 1, 8, 8), (3, 8, 8), (1, 3, 0, 8)])
def test_compress_refuses_what_is_not_one_picture(tiny_vae, shape) -> None:
    with pytest.raises(UserError, match=r"it must be \(1, 3, H, W\)"):
        compress(tiny_vae, torch.zeros(shape))


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (7, 3), (300, 9)])
def test_pictures_of_any_size_come_back_in_it(tiny_vae, size) -> None:
    x = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(0)) * 2 - 1

    recon = decompress(tiny_vae, compress(tiny_vae, x).data)

    assert recon.shape == x.shape


def test_a_picture_of_one_colour_is_its_header(tiny_vae) -> None:
    found = compress(tiny_vae, torch.full((1, 3, 64, 64), 0.5))

    assert len(found.data) < 600  # 280 of them fixed


@pytest.mark.parametrize("value", [1.0, float("nan"), float("inf")])
def test_quantise_refuses_latents_beyond_the_format(value) -> None:
    with pytest.raises(UserError, match=r"a latent is .* steps large, the format holds 16384"):
        quantise(torch.full((1, 1, 2, 2), value), np.array([1e-5], np.float32))


def test_decompress_refuses_another_decoder(tiny_vae, x) -> None:
    data = compress(tiny_vae, x).data
    with torch.no_grad():
        tiny_vae.decoder.conv_out.bias += 1e-3

    with pytest.raises(UserError, match=r"a.svae was compressed for the decoder \w{12}, this VAE has \w{12}; give"):
        decompress(tiny_vae, data, name="a.svae")

    assert decompress(tiny_vae, data, allow_other_vae=True).shape == x.shape


def test_decompress_takes_a_vae_with_another_encoder(tiny_vae, x) -> None:
    data = compress(tiny_vae, x).data
    with torch.no_grad():
        tiny_vae.encoder.conv_in.bias += 1

    assert decompress(tiny_vae, data).shape == x.shape


def test_decompress_refuses_latents_of_another_shape(tiny_vae, x) -> None:
    data = compress(tiny_vae, x).data
    other = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4)

    with pytest.raises(UserError, match="latents of 4 channels and factor 2, this VAE has 4 and 1"):
        decompress(other, data)


def test_decompress_refuses_a_picture_that_is_too_large(tiny_vae, x) -> None:
    with pytest.raises(
        UserError, match="a picture of 70x53 pixels and 3780 numbers, more than the 100 that are accepted"
    ):
        decompress(tiny_vae, compress(tiny_vae, x).data, max_pixels=100)


def test_decoder_fingerprint_is_of_the_numbers_alone(tiny_vae) -> None:
    half = AutoencoderKL.from_config(dict(tiny_vae.config)).half()
    half.load_state_dict(tiny_vae.state_dict())
    full = AutoencoderKL.from_config(dict(tiny_vae.config))
    full.load_state_dict(half.state_dict())

    assert decoder_fingerprint(half) == decoder_fingerprint(full) != decoder_fingerprint(tiny_vae)
    assert encoder_fingerprint(half) != encoder_fingerprint(full)


def test_decoder_fingerprint_refuses_what_has_no_decoder() -> None:
    with pytest.raises(UserError, match=r"has no tensors named decoder\.\*"):
        decoder_fingerprint(torch.nn.Linear(1, 1))


def swapped_profile() -> bytes:
    """A profile in which red is green: what a picture says must not be what it shows."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    red, green = profile.index(b"rXYZ"), profile.index(b"gXYZ")
    profile[red : red + 4], profile[green : green + 4] = b"gXYZ", b"rXYZ"
    for name in (b"sRGB", "sRGB".encode("utf-16-be")):
        profile[:] = profile.replace(name, bytes(reversed(name)))
    return bytes(profile)


def test_open_srgb_converts_by_the_profile_and_says_so(tmp_path) -> None:
    path = tmp_path / "a.png"
    Image.new("RGB", (4, 4), (255, 0, 0)).save(path, icc_profile=swapped_profile())

    picture, note = open_srgb(path)

    assert picture.getpixel((0, 0)) == pytest.approx((0, 255, 0), abs=2)
    assert note.startswith("colours converted from '")
    assert note.endswith("' to sRGB")


def test_open_srgb_leaves_srgb_alone(tmp_path) -> None:
    pixels = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.fromarray(pixels).save(tmp_path / "a.png", icc_profile=profile)

    picture, note = open_srgb(tmp_path / "a.png")

    np.testing.assert_array_equal(np.asarray(picture), pixels)
    assert note == ""


@pytest.mark.parametrize(
    ("mode", "colour", "words"),
    [("RGBA", (9, 9, 9, 9), "transparency laid over white"), ("I;16", 65535, "16 bits rounded to 8"), ("L", 9, "")],
)
def test_open_srgb_notes_what_is_lost(tmp_path, mode, colour, words) -> None:
    Image.new(mode, (4, 4), colour).save(tmp_path / "a.png")

    assert open_srgb(tmp_path / "a.png")[1] == words


def test_open_srgb_refuses_a_profile_that_is_none(tmp_path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png", icc_profile=b"no profile")

    with pytest.raises(UserError, match=r"the colour profile of .*a.png cannot be used"):
        open_srgb(tmp_path / "a.png")


def test_compressed_picture_is_that_of_to_tensor(tiny_vae, tmp_path) -> None:
    Image.new("RGB", (9, 5), (10, 20, 30)).save(tmp_path / "a.png")
    picture, note = open_srgb(tmp_path / "a.png")

    held = read(compress(tiny_vae, to_tensor(picture), note=note).data)

    assert (held.width, held.height, held.note) == (9, 5, "")
