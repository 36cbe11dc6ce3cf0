"""STORE#N names one latent of a store."""

from pathlib import Path

import pytest
import torch

from sd_vae.autoencoder import AutoencoderKL
from sd_vae.errors import UserError
from sd_vae.latents import LatentDataset
from sd_vae.latents.stored_items import StoredModes, is_stored_item, read_stored_item


def test_name_with_a_store_and_a_mark_is_an_item(store_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "a#1.png").touch()

    assert is_stored_item(f"{store_folder}#3")
    assert not is_stored_item(str(store_folder))
    assert not is_stored_item(str(tmp_path / "a#1.png"))


def test_item_is_the_mean_and_names_its_encoder(store_folder: Path, tiny_vae: AutoencoderKL) -> None:
    z, encoder = read_stored_item(f"{store_folder}#3", tiny_vae)

    dataset = LatentDataset(store_folder, content="mode")
    assert torch.equal(z, dataset.sample(3))
    assert encoder == dataset.description.encoder


def test_modes_are_a_sequence(store_folder: Path) -> None:
    modes = StoredModes(store_folder)

    assert len(modes) == 9
    assert len([*modes]) == 9


@pytest.mark.parametrize("number", ["9", "-1", "x", ""])
def test_no_item_is_refused(number: str, store_folder: Path, tiny_vae: AutoencoderKL) -> None:
    with pytest.raises(UserError, match=rf"#{number} names no item: .* holds 9, the first is .*#0"):
        read_stored_item(f"{store_folder}#{number}", tiny_vae)


def test_item_of_other_channels_is_refused(store_folder: Path) -> None:
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=3)

    with pytest.raises(UserError, match=r"#0 has 4 channels, the VAE takes 3; give the VAE that made it"):
        read_stored_item(f"{store_folder}#0", vae)
