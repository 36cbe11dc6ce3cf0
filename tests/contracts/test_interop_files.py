"""Folders that we write open in plain diffusers; folders that diffusers wrote, old and new, open here."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sd_vae import AutoencoderKL, ops
from sd_vae._diffusers import DiffusersAutoencoderKL

READ_ALL = """
import pathlib, torch
from diffusers import AutoencoderKL
x = torch.load("x.pt", weights_only=True)
for folder in sorted(path for path in pathlib.Path().iterdir() if path.is_dir()):
    variant = "fp16" if folder.name == "variant" else None
    vae = AutoencoderKL.from_pretrained(folder, variant=variant, local_files_only=True).eval()
    with torch.no_grad():
        posterior = vae.encode(x).latent_dist
        torch.save([posterior.parameters, vae.decode(posterior.mode()).sample], f"{folder}.pt")
    print(folder, type(vae).__module__)
"""


@pytest.fixture
def x() -> torch.Tensor:
    return torch.rand(2, 3, 16, 24) * 2 - 1


@torch.no_grad()
def numbers(vae: AutoencoderKL, x: torch.Tensor) -> list[torch.Tensor]:
    posterior = vae.encode(x).latent_dist
    return [posterior.parameters, vae.decode(posterior.mode()).sample]


def rename_as_in_old_diffusers(folder: Path) -> None:
    """Rewrite the weights with the attention names that diffusers used before 0.15."""
    path = folder / "diffusion_pytorch_model.safetensors"
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    weights = load_file(path)
    for new, old in names.items():
        weights = {name.replace(f".{new}.", f".{old}."): tensor for name, tensor in weights.items()}
    assert any(".proj_attn." in name for name in weights)
    save_file(weights, path, metadata={"format": "pt"})


def test_interop_saved_folders_open_without_us(tiny_vae, x, tmp_path: Path, plain_diffusers) -> None:
    torch.save(x, tmp_path / "x.pt")
    with ops.reference():  # what diffusers computes, bit for bit
        expected = numbers(tiny_vae, x)
    tiny_vae.save_pretrained(tmp_path / "plain")
    tiny_vae.save_pretrained(tmp_path / "variant", variant="fp16")
    tiny_vae.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    tiny_vae.to(memory_format=torch.channels_last).save_pretrained(tmp_path / "channels_last")

    printed = plain_diffusers(READ_ALL, tmp_path)

    assert (tmp_path / "sharded" / "diffusion_pytorch_model.safetensors.index.json").is_file()
    module = "diffusers.models.autoencoders.autoencoder_kl"
    assert printed.split() == ["channels_last", module, "plain", module, "sharded", module, "variant", module]
    for name in ("plain", "variant", "sharded", "channels_last"):
        theirs = torch.load(tmp_path / f"{name}.pt")
        assert all(torch.equal(mine, other) for mine, other in zip(expected, theirs, strict=True)), name


def test_interop_config_file_names_diffusers_class(tiny_vae, tmp_path: Path) -> None:
    tiny_vae.save_pretrained(tmp_path)

    config = json.loads((tmp_path / "config.json").read_text())
    theirs = json.loads(tiny_vae.to_diffusers().to_json_string())
    assert config == theirs
    assert config["_class_name"] == "AutoencoderKL"


def test_interop_saving_leaves_the_live_model_alone(tiny_vae, tmp_path: Path) -> None:
    tiny_vae.to(memory_format=torch.channels_last)
    pointers = [weight.data_ptr() for weight in tiny_vae.parameters()]

    tiny_vae.save_pretrained(tmp_path)

    assert [weight.data_ptr() for weight in tiny_vae.parameters()] == pointers
    assert tiny_vae.encoder.conv_in.weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_interop_half_precision_survives_saving(tiny_vae, tmp_path: Path, dtype) -> None:
    tiny_vae.to(dtype).save_pretrained(tmp_path)

    reloaded = AutoencoderKL.from_pretrained(tmp_path, torch_dtype=dtype)

    assert reloaded.dtype is dtype
    expected = tiny_vae.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in reloaded.state_dict().items())


def test_interop_from_pretrained_takes_variant_dtype_and_subfolder(tiny_vae, tmp_path: Path) -> None:
    tiny_vae.save_pretrained(tmp_path / "vae", variant="fp16")

    vae = AutoencoderKL.from_pretrained(tmp_path, subfolder="vae", variant="fp16", torch_dtype=torch.bfloat16)

    assert type(vae) is AutoencoderKL
    assert vae.dtype is torch.bfloat16
    assert not vae.training


def test_interop_from_pretrained_reads_what_diffusers_wrote(tiny_vae, x, tmp_path: Path) -> None:
    tiny_vae.to_diffusers().save_pretrained(tmp_path)

    vae = AutoencoderKL.from_pretrained(tmp_path)

    assert type(vae) is AutoencoderKL
    assert all(torch.equal(mine, other) for mine, other in zip(numbers(vae, x), numbers(tiny_vae, x), strict=True))


def test_interop_deprecated_attention_names_load(tiny_vae, x, tmp_path: Path) -> None:
    tiny_vae.save_pretrained(tmp_path)
    rename_as_in_old_diffusers(tmp_path)

    vae = AutoencoderKL.from_pretrained(tmp_path)

    assert all(torch.equal(mine, other) for mine, other in zip(numbers(vae, x), numbers(tiny_vae, x), strict=True))


def test_interop_unknown_config_keys_load_and_stay(tiny_vae, x, tmp_path: Path) -> None:
    tiny_vae.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"field_of_the_future": 3}))

    vae = AutoencoderKL.from_pretrained(tmp_path)

    assert vae.config.field_of_the_future == 3
    assert all(torch.equal(mine, other) for mine, other in zip(numbers(vae, x), numbers(tiny_vae, x), strict=True))
    assert type(vae.to_diffusers()) is DiffusersAutoencoderKL


def test_interop_config_files_without_newer_keys_load(tiny_vae, tmp_path: Path) -> None:
    tiny_vae.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    newer = ("scaling_factor", "shift_factor", "latents_mean", "latents_std", "force_upcast", "use_quant_conv")
    old = {key: value for key, value in config.items() if key not in newer}
    (tmp_path / "config.json").write_text(json.dumps(old))

    vae = AutoencoderKL.from_pretrained(tmp_path)

    assert vae.config.scaling_factor == 0.18215
    assert vae.quant_conv is not None


def test_interop_register_to_config_changes_the_scale_that_is_saved(tiny_vae, tmp_path: Path) -> None:
    tiny_vae.register_to_config(scaling_factor=0.5)

    tiny_vae.save_pretrained(tmp_path)

    assert tiny_vae.config.scaling_factor == 0.5
    assert DiffusersAutoencoderKL.from_pretrained(tmp_path).config.scaling_factor == 0.5
