"""Converting: between all layouts, believed only after loading back."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from vae_files import equal_weights, ldm_tensors, listing

from sd_vae.checkpoints import convert, convert_vae, load_vae, save_vae
from sd_vae.errors import UserError

TARGETS = {"diffusers": "b", "ldm": "b.safetensors", "webui": "b.safetensors"}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("source", TARGETS)
def test_convert_vae_between_layouts(tmp_path: Path, vae, source: str, target: str) -> None:
    start = save_vae(vae, tmp_path / f"a{Path(TARGETS[source]).suffix}", source, metadata={"origin": "here"})

    done = convert_vae(start, tmp_path / TARGETS[target], target)

    assert equal_weights(load_vae(done.path), vae)
    assert (done.layout, done.family, done.is_folded, done.max_deviation) == (target, "sd1", False, 0.0)
    assert done.num_tensors == len(vae.state_dict())


def test_convert_vae_keeps_the_metadata(tmp_path: Path, vae) -> None:
    start = save_vae(vae, tmp_path / "a.safetensors", "ldm", metadata={"origin": "here"})

    convert_vae(start, tmp_path / "b", "diffusers")

    with safe_open(tmp_path / "b" / "diffusion_pytorch_model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "origin": "here"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_convert_vae_keeps_the_sources_dtype(tmp_path: Path, vae, dtype: torch.dtype) -> None:
    save_file({name: tensor.to(dtype) for name, tensor in ldm_tensors(vae).items()}, tmp_path / "a.safetensors")

    done = convert_vae(tmp_path / "a.safetensors", tmp_path / "b", "diffusers")

    assert done.dtype == str(dtype).removeprefix("torch.")
    stored = load_file(tmp_path / "b" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(stored[name], tensor.to(dtype)) for name, tensor in vae.state_dict().items())


def test_convert_vae_widens_a_file_of_mixed_dtypes(tmp_path: Path, vae) -> None:
    tensors = ldm_tensors(vae)
    tensors["quant_conv.bias"] = tensors["quant_conv.bias"].half()
    save_file(tensors, tmp_path / "a.safetensors")

    assert convert_vae(tmp_path / "a.safetensors", tmp_path / "b", "diffusers").dtype == "float32"


def test_convert_vae_folds_and_measures(tmp_path: Path, make_vae) -> None:
    start = save_vae(make_vae(scaling_factor=0.9, shift_factor=0.2), tmp_path / "a")

    done = convert_vae(start, tmp_path / "b.safetensors", "webui", family="sdxl")

    assert (done.family, done.is_folded, done.scaling_factor) == ("sdxl", True, 0.13025)
    assert 0 < done.max_deviation < 1e-5  # worst seen WORST


def test_convert_vae_in_place(tmp_path: Path, vae) -> None:
    start = save_vae(vae, tmp_path / "a")

    convert_vae(start, start, "diffusers", "float16", overwrite=True)

    assert equal_weights(load_vae(start), vae.half().float())


def test_convert_vae_writes_nothing_when_the_copy_has_other_tensors(tmp_path: Path, vae, monkeypatch) -> None:
    start = save_vae(vae, tmp_path / "a")
    load = load_vae

    def load_damaged(path: Path):
        copy = load(path)
        copy.quant_conv.bias.data[0] += 1e-3
        return copy

    monkeypatch.setattr(convert, "load_vae", load_damaged)

    with pytest.raises(AssertionError, match=r"read back, .*quant_conv.bias.* are not what was written"):
        convert_vae(start, tmp_path / "b.safetensors", "ldm")

    assert listing(tmp_path) == ["a", "a/config.json", "a/diffusion_pytorch_model.safetensors"]


def test_convert_vae_writes_nothing_when_the_copy_computes_something_else(
    tmp_path: Path, make_vae, monkeypatch
) -> None:
    start = save_vae(make_vae(scaling_factor=0.9), tmp_path / "a")
    store = convert.export

    def export_wrong(*args: object, **settings: object):
        tensors, config = store(*args, **settings)
        return tensors | {"quant_conv.bias": tensors["quant_conv.bias"] * 1.1}, config

    monkeypatch.setattr(convert, "export", export_wrong)

    with pytest.raises(AssertionError, match=r"the copy deviates by .* of the magnitude"):
        convert_vae(start, tmp_path / "b", "diffusers", family="sd1")

    assert listing(tmp_path) == ["a", "a/config.json", "a/diffusion_pytorch_model.safetensors"]


def test_convert_vae_refuses_damaged_weights(tmp_path: Path, vae) -> None:
    tensors = ldm_tensors(vae)
    tensors["quant_conv.bias"][0] = float("nan")
    save_file(tensors, tmp_path / "a.safetensors")

    with pytest.raises(UserError, match=r"not finite in 1 tensors: quant_conv\.bias"):
        convert_vae(tmp_path / "a.safetensors", tmp_path / "b", "diffusers")

    assert listing(tmp_path) == ["a.safetensors"]
