"""Weights that ship: found by name, checked against their digests, loaded like any folder."""

import hashlib
from pathlib import Path

import pytest
import torch

import sd_vae
from sd_vae import weights
from sd_vae.autoencoder import AutoencoderKL
from sd_vae.checkpoints import load
from sd_vae.errors import UserError

FILES = ("config.json", "diffusion_pytorch_model.safetensors")


@pytest.fixture
def released(tmp_path: Path, tiny_vae: AutoencoderKL) -> Path:
    """A root with the weights `mini`, as a release has them."""
    folder = tmp_path / "root" / "mini"
    tiny_vae.save_pretrained(folder)
    sums = [f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}\n" for name in FILES]
    (folder / "SHA256SUMS").write_text("".join(sums))
    return folder.parent


@pytest.fixture
def installed(released: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same, as what this installation brings."""
    monkeypatch.setattr(load, "shipped_folder", lambda name: weights.shipped_folder(name, released))
    monkeypatch.chdir(released.parent)
    return released


def test_shipped_folder_is_the_one_of_the_name(released: Path) -> None:
    assert weights.shipped_folder("mini", released) == released / "mini"


def test_shipped_folder_refuses_a_changed_file(released: Path) -> None:
    with (released / "mini" / FILES[1]).open("ab") as file:
        file.write(b"x")

    with pytest.raises(UserError, match=r"safetensors is damaged: its sha256 is \w{64}, SHA256SUMS says \w{64}; inst"):
        weights.shipped_folder("mini", released)


def test_shipped_folder_names_a_missing_file(released: Path) -> None:
    (released / "mini" / FILES[0]).unlink()

    with pytest.raises(UserError, match=r"config\.json is missing, though SHA256SUMS beside it lists it"):
        weights.shipped_folder("mini", released)


def test_shipped_folder_says_how_to_do_without(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no weights for 'mini' .*, or train your own: sd-vae train --config mini"):
        weights.shipped_folder("mini", tmp_path)


def test_load_vae_takes_the_name_of_shipped_weights(installed: Path, tiny_vae: AutoencoderKL) -> None:
    vae = sd_vae.load_vae("mini")

    assert vae.config.block_out_channels == tiny_vae.config.block_out_channels
    assert all(map(torch.equal, vae.parameters(), tiny_vae.parameters()))


def test_load_vae_checks_shipped_weights(installed: Path) -> None:
    (installed / "mini" / FILES[0]).write_text("{}")

    with pytest.raises(UserError, match=r"config\.json is damaged"):
        sd_vae.load_vae("mini")


def test_load_vae_prefers_what_is_on_the_disk(installed: Path, tiny_vae: AutoencoderKL) -> None:
    tiny_vae.register_to_config(scaling_factor=0.5)
    tiny_vae.save_pretrained("mini")

    assert sd_vae.load_vae("mini").config.scaling_factor == 0.5


def test_load_vae_lists_what_ships_where_nothing_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    with pytest.raises(UserError, match=r"there is nothing at mni; .* or a VAE that ships: mini"):
        sd_vae.load_vae("mni")


@pytest.mark.parametrize(
    "name", [name for name in weights.SHIPPED_VAES if (Path(weights.__file__).parent / name).is_dir()]
)
def test_shipped_weights_are_whole_and_load(name: str) -> None:
    vae = sd_vae.load_vae(weights.shipped_folder(name))

    assert vae.config.scaling_factor != 1.0
