"""The names, shapes and sizes of our parameters are diffusers', without building a single weight."""

import csv
from ast import literal_eval

import pytest
import torch

from sd_vae import PRESETS, AutoencoderKL
from sd_vae._diffusers import DiffusersAutoencoderKL


def shapes(vae: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in vae.state_dict().items()}


@pytest.mark.parametrize("preset", PRESETS)
def test_preset_has_the_tensors_of_diffusers(preset) -> None:
    with torch.device("meta"):
        ours = AutoencoderKL.from_preset(preset)
        theirs = DiffusersAutoencoderKL(**PRESETS[preset].to_dict())

    assert shapes(ours) == shapes(theirs)


def test_every_config_has_the_tensors_of_diffusers(pair) -> None:
    ours, theirs = pair

    assert shapes(ours) == shapes(theirs)


def test_sd1_has_its_published_size() -> None:
    with torch.device("meta"):
        vae = AutoencoderKL.from_preset("sd1")

    assert sum(weight.numel() for weight in vae.parameters()) == 83_653_863
    assert len(vae.state_dict()) == 248


def test_mini_stays_small() -> None:
    with torch.device("meta"):
        vae = AutoencoderKL.from_preset("mini")

    assert 4e6 < sum(weight.numel() for weight in vae.parameters()) < 6e6
    assert vae.factor == 8


def test_sd1_has_the_tensors_of_the_published_map(shared) -> None:
    with (shared / "reference" / "sd1_vae_keymap.tsv").open() as file:
        published = {row["diffusers"]: row["shape_diffusers"] for row in csv.DictReader(file, delimiter="\t")}

    with torch.device("meta"):
        vae = AutoencoderKL.from_preset("sd1")

    assert shapes(vae) == {name: literal_eval(shape) for name, shape in published.items()}


def test_every_group_norm_has_the_published_eps(small_pair) -> None:
    norms = [module for module in small_pair[0].modules() if isinstance(module, torch.nn.GroupNorm)]

    assert norms
    assert {norm.eps for norm in norms} == {1e-6}


def test_signature_defaults_are_those_of_diffusers() -> None:
    with torch.device("meta"):
        ours, theirs = dict(AutoencoderKL().config), dict(DiffusersAutoencoderKL().config)

    assert ours == theirs
