"""Loading: every layout that people have, strictly, and one line for everything else."""

import os
import re
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL as DiffusersAutoencoderKL
from safetensors.torch import save_file
from vae_files import ATTENDING, NO_QUANT, PREFIX, equal_weights, ldm_tensors

from sd_vae.checkpoints import load, load_vae, save_vae
from sd_vae.checkpoints.keymap import key_table
from sd_vae.config import VAEConfig
from sd_vae.errors import UserError


def deprecated_tensors(vae) -> dict[str, torch.Tensor]:
    state = vae.state_dict()
    keys = key_table(VAEConfig.from_dict(dict(vae.config)))
    return {key.deprecated: state[key.diffusers].clone() for key in keys}


@pytest.mark.parametrize("fields", [{}, ATTENDING, NO_QUANT], ids=["plain", "attention in levels", "no quant"])
@pytest.mark.parametrize("prefix", [PREFIX, "vae.", ""])
def test_load_vae_reads_a_safetensors_file_without_config(tmp_path: Path, make_vae, caplog, prefix, fields) -> None:
    vae = make_vae(**fields)
    save_file(ldm_tensors(vae, prefix), tmp_path / "x.safetensors")

    loaded = load_vae(tmp_path / "x.safetensors")

    assert equal_weights(loaded, vae)
    assert dict(loaded.config)["down_block_types"] == tuple(vae.config.down_block_types)
    assert "has no config: architecture taken from its shapes, scale 0.18215 assumed" in caplog.text


@pytest.mark.parametrize(
    "wrap", [lambda t: t, lambda t: {"state_dict": t}, lambda t: {"state_dict": {"state_dict": t}}]
)
@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("prefix", [PREFIX, ""])
def test_load_vae_reads_torch_files(tmp_path: Path, vae, wrap, is_zip: bool, prefix: str) -> None:
    torch.save(wrap(ldm_tensors(vae, prefix)), tmp_path / "x.ckpt", _use_new_zipfile_serialization=is_zip)

    loaded = load_vae(tmp_path / "x.ckpt")

    assert equal_weights(loaded, vae)


def test_load_vae_goes_by_content_and_not_by_ending(tmp_path: Path, vae) -> None:
    save_file(ldm_tensors(vae), tmp_path / "x.ckpt")

    assert equal_weights(load_vae(tmp_path / "x.ckpt"), vae)


def test_load_vae_reads_a_folder_that_diffusers_saved(tmp_path: Path, vae) -> None:
    vae.to_diffusers().save_pretrained(tmp_path / "vae", variant="fp16")

    assert equal_weights(load_vae(tmp_path / "vae"), vae)
    assert equal_weights(load_vae(tmp_path), vae), "the folder of the pipeline around it"
    assert equal_weights(load_vae(tmp_path / "vae" / "diffusion_pytorch_model.fp16.safetensors"), vae)


def test_load_vae_reads_a_legacy_bin(tmp_path: Path, vae) -> None:
    vae.to_diffusers().save_pretrained(tmp_path, safe_serialization=False)

    assert [path.name for path in tmp_path.glob("*.bin")] == ["diffusion_pytorch_model.bin"]
    assert equal_weights(load_vae(tmp_path), vae)


@pytest.mark.parametrize("num_ones", [0, 1, 2])
def test_load_vae_reads_deprecated_attention_names_and_shapes(tmp_path: Path, vae, num_ones: int) -> None:
    vae.save_pretrained(tmp_path)
    tensors = deprecated_tensors(vae)
    for name in [name for name in tensors if name.endswith(("query.weight", "key.weight", "proj_attn.weight"))]:
        tensors[name] = tensors[name][(...,) + (None,) * num_ones].contiguous()
    save_file(tensors, tmp_path / "diffusion_pytorch_model.safetensors", {"format": "pt"})

    assert any("proj_attn" in name for name in tensors)
    assert equal_weights(load_vae(tmp_path), vae)


def test_load_vae_is_in_eval_mode_and_trains_afterwards(tmp_path: Path, vae) -> None:
    vae.save_pretrained(tmp_path)

    loaded = load_vae(tmp_path)

    assert not loaded.training
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    assert not any(parameter.is_meta for parameter in loaded.parameters())


def test_load_vae_survives_the_loss_of_its_file(tmp_path: Path, vae) -> None:
    path = save_vae(vae, tmp_path / "x.safetensors", "webui")

    loaded = load_vae(path)
    with path.open("r+b") as file:
        file.seek(-(4 * 1000), os.SEEK_END)
        file.write(b"\0" * 4000)

    assert equal_weights(loaded, vae)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_load_vae_reads_half_precision_as_float32_or_as_asked(tmp_path: Path, vae, dtype: torch.dtype) -> None:
    save_file({name: tensor.to(dtype) for name, tensor in ldm_tensors(vae).items()}, tmp_path / "x.safetensors")

    assert load_vae(tmp_path / "x.safetensors").dtype == torch.float32
    assert equal_weights(load_vae(tmp_path / "x.safetensors", dtype=dtype), vae.to(dtype))


def test_load_vae_ignores_leftovers_of_training(tmp_path: Path, vae) -> None:
    one = torch.ones(1)
    leftovers = {"model_ema.decay": one, "loss.discriminator.main.0.weight": one, "encoder_ema.conv_in.weight": one}
    others = {"model.diffusion_model.out.2.bias": one, "model_ema.num_updates": one, "cond_stage_model.x": one}
    full = ldm_tensors(vae, PREFIX) | {PREFIX + name: tensor for name, tensor in leftovers.items()} | others
    save_file(
        {name: tensor.clone() for name, tensor in (ldm_tensors(vae) | leftovers).items()}, tmp_path / "a.safetensors"
    )
    save_file({name: tensor.clone() for name, tensor in full.items()}, tmp_path / "b.safetensors")

    assert equal_weights(load_vae(tmp_path / "a.safetensors"), vae)
    assert equal_weights(load_vae(tmp_path / "b.safetensors"), vae)


@pytest.mark.parametrize(("mark", "scale"), [("conditioner.embedders.0.x", 0.13025), ("cond_stage_model.x", 0.18215)])
def test_load_vae_takes_the_scale_of_a_full_checkpoint_from_its_other_models(
    tmp_path, mark, scale, monkeypatch
) -> None:
    config = VAEConfig.from_preset("sdxl")
    monkeypatch.setattr(load, "open_weights", lambda path: fake_weights(path, config, {mark: (1,)}))
    (tmp_path / "x.safetensors").touch()

    checkpoint = load.open_checkpoint(tmp_path / "x.safetensors")

    assert checkpoint.config.scaling_factor == scale


def fake_weights(path: Path, config: VAEConfig, others: dict[str, tuple[int, ...]] | None = None):
    """Names and shapes of a file too large for a test."""
    shapes = {PREFIX + key.ldm: key.ldm_shape for key in key_table(config)} | (others or {})
    dtypes = dict.fromkeys(shapes, "float16")
    return load.WeightFile(
        path=path, format="safetensors", shapes=shapes, dtypes=dtypes, metadata={}, dropped=(), read={}.__getitem__
    )


@pytest.mark.parametrize("name", ["sd1", "mini"])
def test_load_vae_recognises_presets_by_their_shapes(tmp_path: Path, monkeypatch, name: str) -> None:
    preset = VAEConfig.from_preset(name)
    monkeypatch.setattr(load, "open_weights", lambda path: fake_weights(path, preset))
    (tmp_path / "x.safetensors").touch()

    config = load.open_checkpoint(tmp_path / "x.safetensors").config

    assert (config.norm_num_groups, config.block_out_channels) == (preset.norm_num_groups, preset.block_out_channels)


def test_load_vae_refuses_to_choose_between_sd3_and_flux(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(load, "open_weights", lambda path: fake_weights(path, VAEConfig.from_preset("flux")))
    (tmp_path / "x.safetensors").touch()

    with pytest.raises(UserError, match='pass config="sd3" or config="flux"'):
        load_vae(tmp_path / "x.safetensors")

    assert load.open_checkpoint(tmp_path / "x.safetensors", "flux").config.scaling_factor == 0.3611


def test_load_vae_refuses_to_guess_the_number_of_groups(tmp_path: Path, tiny_vae) -> None:
    save_file(ldm_tensors(tiny_vae), tmp_path / "x.safetensors")

    with pytest.raises(UserError, match=r"widths \[8, 16\], which 32 groups do not divide"):
        load_vae(tmp_path / "x.safetensors")


@pytest.mark.parametrize("kind", ["object", "folder", "file", "beside", "own folder", "pipeline"])
def test_load_vae_takes_the_config_from(tmp_path: Path, tiny_vae, kind: str) -> None:
    save_file(ldm_tensors(tiny_vae), tmp_path / "x.safetensors")
    place = {"beside": tmp_path, "own folder": tmp_path / "x_config", "pipeline": tmp_path / "pipe" / "vae"}
    folder = place.get(kind, tmp_path / "elsewhere")
    tiny_vae.save_config(folder)
    given = {
        "object": VAEConfig.from_dict(dict(tiny_vae.config)),
        "folder": folder,
        "file": str(folder / "config.json"),
        "pipeline": tmp_path / "pipe",
    }

    assert equal_weights(load_vae(tmp_path / "x.safetensors", given.get(kind)), tiny_vae)


def test_load_vae_prefers_the_given_config(tmp_path: Path, vae) -> None:
    vae.save_pretrained(tmp_path)
    config = VAEConfig.from_dict(dict(vae.config) | {"scaling_factor": 0.7})

    assert load_vae(tmp_path, config).config.scaling_factor == 0.7


def test_load_vae_equals_from_pretrained(tmp_path: Path, make_vae, assert_close) -> None:
    vae = make_vae(scaling_factor=0.5, shift_factor=0.25)
    vae.save_pretrained(tmp_path)
    theirs = DiffusersAutoencoderKL.from_pretrained(tmp_path)
    x = torch.randn(1, 3, 16, 16)

    ours = load_vae(tmp_path)

    assert ours.config.shift_factor == theirs.config.shift_factor == 0.25
    # worst seen 3.1e-6, 20 seeds: the fast convolutions' rounding
    assert_close(ours(x).sample, theirs(x).sample)


def peak_mib(*, reset: bool = False) -> float:
    """The most memory that this process has held since the last reset."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text()).group(1)) / 1024


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="counts memory as Linux does")
@pytest.mark.parametrize("kind", ["safetensors", "zip"])
def test_load_vae_reads_only_the_vae_of_a_full_checkpoint(tmp_path: Path, vae, kind: str) -> None:
    full = ldm_tensors(vae, PREFIX) | {"model.diffusion_model.w": torch.zeros(200 * 2**18)}
    path = tmp_path / "x.ckpt"
    save_file(full, path) if kind == "safetensors" else torch.save({"state_dict": full}, path)
    del full
    load_vae(path)
    before = peak_mib(reset=True)

    load_vae(path)

    # worst seen 3 MiB; reading the file whole adds 200
    assert peak_mib() - before < 50
