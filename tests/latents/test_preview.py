"""The linear preview finds a matrix that is there, says how good it is, and reads as ComfyUI's do."""

import ast
from pathlib import Path

import pytest
import synthetic_store as synthetic
import torch
from PIL import Image

from sd_vae.autoencoder import AutoencoderKL
from sd_vae.errors import UserError
from sd_vae.latents import LatentStore
from sd_vae.latents.preview import LinearPreview, contact_sheet, fit_linear_preview, preview

TRUE = LinearPreview(((0.1, 0.0, -0.05), (0.0, 0.2, 0.0), (0.03, -0.1, 0.1), (-0.1, 0.0, 0.02)), (0.1, -0.2, 0.0))


def _latents(count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(4, 3, 5 + index % 2, generator=generator) for index in range(count)]


def test_fit_finds_the_matrix_that_made_the_pictures() -> None:
    latents = _latents(9)

    fit = fit_linear_preview(latents, [TRUE(one) for one in latents])

    # worst seen 3e-8: the pictures are float32
    torch.testing.assert_close(torch.tensor(fit.preview.factors), torch.tensor(TRUE.factors), rtol=0, atol=1e-6)
    torch.testing.assert_close(torch.tensor(fit.preview.bias), torch.tensor(TRUE.bias), rtol=0, atol=1e-6)
    assert fit.r2 > 1 - 1e-9
    assert fit.psnr_db > 100
    assert (fit.num_fitted, fit.num_held_out) == (7, 2)


def test_fit_is_measured_on_other_pictures() -> None:
    latents = _latents(4)
    pictures = [TRUE(one) for one in latents]
    pictures[3] = -pictures[3]

    fit = fit_linear_preview(latents, pictures)

    assert (fit.num_fitted, fit.num_held_out) == (3, 1)
    assert fit.r2 < 0


def test_fit_measures_what_noise_leaves() -> None:
    latents, generator = _latents(400), torch.Generator().manual_seed(1)
    pictures = [0.5 * TRUE(one) + 0.1 * torch.randn(3, *one.shape[1:], generator=generator) for one in latents]

    fit = fit_linear_preview(latents, pictures)

    # noise of 0.1 in [-1, 1] is 0.05 in [0, 1]: 26.0 dB; seen 26.1, the mean of the pictures' own
    assert fit.psnr_db == pytest.approx(26.02, abs=0.3)


def test_fit_leaves_out_a_constant_channel() -> None:
    latents = [torch.cat([one[:3], torch.zeros_like(one[3:])]) for one in _latents(8)]

    fit = fit_linear_preview(latents, [TRUE(one) for one in latents])

    assert fit.r2 > 1 - 1e-9
    assert fit.preview.factors[3] == pytest.approx((0, 0, 0), abs=1e-9)


def test_fit_refuses_one_picture() -> None:
    with pytest.raises(UserError, match=r"at least 2 pictures, .* and there are 1; take more"):
        fit_linear_preview(_latents(1), [TRUE(_latents(1)[0])])


def test_comfyui_reads_what_is_printed() -> None:
    values = {
        target.id: ast.literal_eval(statement.value)
        for statement in ast.parse(TRUE.comfyui()).body
        if isinstance(statement, ast.Assign)
        for target in statement.targets
        if isinstance(target, ast.Name)
    }

    assert values == {
        "latent_rgb_factors": [list(row) for row in TRUE.factors],
        "latent_rgb_factors_bias": list(TRUE.bias),
    }


def test_linear_preview_stays_in_range() -> None:
    shown = TRUE(1000 * _latents(1)[0])

    assert (float(shown.min()), float(shown.max())) == (-1.0, 1.0)


def test_preview_shows_what_the_decoder_gives(tmp_path: Path, tiny_vae: AutoencoderKL) -> None:
    synthetic.make(tmp_path / "store", dtype="float32")
    steps: list[tuple[int, int]] = []

    found = preview(
        tmp_path / "store", tiny_vae, num_pictures=4, seed=1, progress=lambda done, total: steps.append((done, total))
    )

    assert steps == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert sorted(set(found.indices)) == list(found.indices)
    assert [picture.size for picture in found.decoded] == [picture.size for picture in found.linear]
    dataset = LatentStore.open(tmp_path / "store")
    reader = dataset.reader(dataset.manifest().shards[0])
    if found.indices[0] < len(reader):
        height, width = reader.latent_sizes[found.indices[0]]
        assert found.decoded[0].size == (width * tiny_vae.factor, height * tiny_vae.factor)


def test_preview_reads_a_store_of_modes(tmp_path: Path, tiny_vae: AutoencoderKL) -> None:
    synthetic.make(tmp_path / "store", content="mode")

    found = preview(tmp_path / "store", tiny_vae, num_pictures=3)

    assert len(found.decoded) == 3


def test_preview_is_of_latents_by_the_scale_of_the_vae(tmp_path: Path, tiny_vae: AutoencoderKL) -> None:
    synthetic.make(tmp_path / "store", dtype="float32")
    tiny_vae.register_to_config(scaling_factor=1.0, shift_factor=0.0)
    plain = preview(tmp_path / "store", tiny_vae).fit.preview
    tiny_vae.register_to_config(scaling_factor=4.0, shift_factor=0.0)

    scaled = preview(tmp_path / "store", tiny_vae).fit.preview

    # float32 latents; worst seen 1e-8
    torch.testing.assert_close(torch.tensor(scaled.factors) * 4, torch.tensor(plain.factors), rtol=0, atol=1e-6)


def test_preview_takes_a_store_of_samples(tmp_path: Path, tiny_vae: AutoencoderKL) -> None:
    synthetic.make(tmp_path / "store", content="sample", seed=3)

    assert len(preview(tmp_path / "store", tiny_vae, num_pictures=100).decoded) == 9


def test_preview_refuses_latents_of_other_channels(store_folder: Path) -> None:
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=3)

    with pytest.raises(UserError, match=r"holds latents of 4 channels, the VAE takes 3"):
        preview(store_folder, vae)


def test_contact_sheet_places_pictures_row_by_row() -> None:
    pictures = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]

    sheet = contact_sheet(pictures, columns=2)

    assert sheet.size == (20, 20)
    assert [sheet.getpixel(place) for place in ((4, 4), (16, 4), (4, 16), (16, 16), (10, 10))] == [
        (255, 0, 0),
        (0, 255, 0),
        (0, 0, 255),
        (255, 255, 255),
        (255, 255, 255),
    ]


def test_contact_sheet_shrinks_and_centres_what_is_too_large() -> None:
    sheet = contact_sheet([Image.new("RGB", (40, 20), "red")], side=10)

    assert sheet.size == (10, 10)
    assert [sheet.getpixel((5, row)) == (255, 0, 0) for row in range(10)] == [False] * 2 + [True] * 5 + [False] * 3
