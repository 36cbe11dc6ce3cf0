"""Saving: what other programs open, whole or not at all, the live model untouched."""

import json
import re
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL as DiffusersAutoencoderKL
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from vae_files import ATTENDING, NO_QUANT, equal_weights, ldm_tensors, listing

from sd_vae.autoencoder import AutoencoderKL
from sd_vae.checkpoints import load_vae, save_vae
from sd_vae.errors import UserError

TARGETS = {"diffusers": "vae", "ldm": "vae.safetensors", "webui": "vae.safetensors"}
EMBELLISHMENTS = {
    "diffusers": ["vae", "vae/config.json", "vae/diffusion_pytorch_model.safetensors"],
    "ldm": ["vae.safetensors", "vae_config", "vae_config/config.json"],
    "webui": ["vae.safetensors", "vae_config", "vae_config/config.json"],
}


@pytest.mark.parametrize("fields", [{}, ATTENDING, NO_QUANT], ids=["plain", "attention in levels", "no quant"])
@pytest.mark.parametrize("layout", TARGETS)
def test_save_vae_round_trips(tmp_path: Path, make_vae, layout: str, fields: dict) -> None:
    vae = make_vae(**fields)

    path = save_vae(vae, tmp_path / TARGETS[layout], layout)

    loaded = load_vae(path)
    assert equal_weights(loaded, vae)
    assert {k: v for k, v in loaded.config.items() if k[0] != "_"} == {
        k: v for k, v in vae.config.items() if k[0] != "_"
    }
    assert listing(tmp_path) == EMBELLISHMENTS[layout]


def test_save_vae_writes_the_names_of_a_webui_file(tmp_path: Path, vae) -> None:
    path = save_vae(vae, tmp_path / "x.safetensors", "webui")

    stored, expected = load_file(path), ldm_tensors(vae)
    assert stored.keys() == expected.keys()
    assert all(torch.equal(stored[name], expected[name]) for name in expected)
    assert stored["encoder.mid.attn_1.q.weight"].shape == (64, 64, 1, 1)


@torch.no_grad()
@pytest.mark.parametrize("layout", ["ldm", "webui"])
def test_saved_files_open_in_from_single_file(tmp_path: Path, make_vae, layout: str) -> None:
    vae = make_vae(norm_num_groups=8)
    path = save_vae(vae, tmp_path / "x.safetensors", layout)
    x = torch.rand(1, 3, 16, 16)

    opened = [
        cls.from_single_file(str(path), config=str(tmp_path / "x_config"))
        for cls in (DiffusersAutoencoderKL, AutoencoderKL)
    ]

    for theirs in opened:
        # worst seen 0 over 20 seeds on CPU; leaves room for another order of summation in attention
        torch.testing.assert_close(theirs(x).sample, vae(x).sample, rtol=0, atol=5e-6)
    assert isinstance(opened[1], AutoencoderKL)


@torch.no_grad()
def test_saved_folder_opens_in_diffusers(tmp_path: Path, vae) -> None:
    save_vae(vae, tmp_path / "x", variant="fp16", dtype="float16")
    x = torch.rand(1, 3, 16, 16)

    theirs, info = DiffusersAutoencoderKL.from_pretrained(tmp_path / "x", variant="fp16", output_loading_info=True)

    assert not any(info.values())
    torch.testing.assert_close(theirs(x).sample, load_vae(tmp_path / "x")(x).sample, rtol=0, atol=5e-6)
    assert listing(tmp_path / "x") == ["config.json", "diffusion_pytorch_model.fp16.safetensors"]


@pytest.mark.parametrize("layout", TARGETS)
def test_save_vae_leaves_the_model_alone(tmp_path: Path, vae, layout: str) -> None:
    vae.train().to(memory_format=torch.channels_last)
    vae.quant_conv.weight.grad = torch.ones_like(vae.quant_conv.weight)
    before = {name: (tensor.data_ptr(), tensor.clone(), tensor.stride()) for name, tensor in vae.state_dict().items()}

    path = save_vae(vae, tmp_path / TARGETS[layout], layout, dtype="bfloat16", family="sdxl")

    after = vae.state_dict()
    assert vae.training
    assert vae.config.scaling_factor == 0.18215
    assert all(p.requires_grad and p.dtype == torch.float32 for p in vae.parameters())
    for name, (pointer, value, stride) in before.items():
        assert (after[name].data_ptr(), after[name].stride()) == (pointer, stride)
        assert torch.equal(after[name], value)
    assert load_vae(path).config.scaling_factor == 0.13025


def test_save_vae_writes_channels_last_weights(tmp_path: Path, vae) -> None:
    reference = {name: tensor.clone() for name, tensor in vae.state_dict().items()}
    vae.to(memory_format=torch.channels_last)

    loaded = load_vae(save_vae(vae, tmp_path / "x"))

    assert all(torch.equal(tensor, reference[name]) for name, tensor in loaded.state_dict().items())


def test_save_vae_writes_weights_that_share_one_buffer(tmp_path: Path, vae) -> None:
    flat = torch.cat([parameter.detach().flatten() for parameter in vae.parameters()])
    reference = {name: tensor.clone() for name, tensor in vae.state_dict().items()}
    offset = 0
    for parameter in vae.parameters():
        parameter.data = flat[offset : offset + parameter.numel()].view(parameter.shape)
        offset += parameter.numel()

    path = save_vae(vae, tmp_path / "x")

    assert all(torch.equal(tensor, reference[name]) for name, tensor in load_vae(path).state_dict().items())


def test_save_vae_takes_a_plain_diffusers_model(tmp_path: Path, vae) -> None:
    path = save_vae(vae.to_diffusers(), tmp_path / "x.safetensors", "ldm")

    assert equal_weights(load_vae(path), vae)


def test_save_vae_splits_fused_projections(tmp_path: Path, vae) -> None:
    vae.fuse_qkv_projections()

    path = save_vae(vae, tmp_path / "x")

    assert not any("to_qkv" in name for name in load_file(path / "diffusion_pytorch_model.safetensors"))
    assert load_vae(path).config.scaling_factor == vae.config.scaling_factor


def test_save_vae_refuses_projections_trained_while_fused(tmp_path: Path, vae) -> None:
    vae.fuse_qkv_projections()
    vae.encoder.mid_block.attentions[0].to_qkv.weight.data.add_(1)

    with pytest.raises(UserError, match="were trained while fused"):
        save_vae(vae, tmp_path / "x")


@pytest.mark.parametrize("layout", TARGETS)
def test_save_vae_writes_metadata(tmp_path: Path, vae, layout: str) -> None:
    path = save_vae(vae, tmp_path / TARGETS[layout], layout, metadata={"sd_vae.step": "12"})

    file = path / "diffusion_pytorch_model.safetensors" if layout == "diffusers" else path
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    assert metadata["sd_vae.step"] == "12"
    assert metadata["format"] == "pt"


def test_save_vae_keeps_the_config_inside_a_single_file(tmp_path: Path, tiny_vae) -> None:
    path = save_vae(tiny_vae, tmp_path / "x.safetensors", "webui")
    (tmp_path / "x_config" / "config.json").unlink()

    assert equal_weights(load_vae(path), tiny_vae)


def test_save_vae_folds_for_a_family(tmp_path: Path, make_vae) -> None:
    vae = make_vae(scaling_factor=0.9, shift_factor=0.3)

    path = save_vae(vae, tmp_path / "x.safetensors", "ldm", family="sdxl")

    config = json.loads((tmp_path / "x_config" / "config.json").read_text())
    assert (config["scaling_factor"], config["shift_factor"]) == (0.13025, None)
    assert not equal_weights(load_vae(path), vae)


def test_save_vae_announces_what_ldm_programs_do_not_know(tmp_path: Path, tiny_vae, caplog) -> None:
    save_vae(tiny_vae, tmp_path / "x.safetensors", "ldm")

    assert "programs around ldm files fix 32 norm groups and SiLU, this VAE has 4 and silu" in caplog.text


@pytest.mark.parametrize("layout", TARGETS)
def test_save_vae_refuses_to_overwrite(tmp_path: Path, vae, layout: str) -> None:
    path = save_vae(vae, tmp_path / TARGETS[layout], layout)
    vae.quant_conv.bias.data.add_(1)

    with pytest.raises(UserError, match="exists; choose another place or pass --overwrite"):
        save_vae(vae, path, layout)

    assert not equal_weights(load_vae(path), vae)
    assert equal_weights(load_vae(save_vae(vae, path, layout, overwrite=True)), vae)
    assert listing(tmp_path) == EMBELLISHMENTS[layout]


def test_save_vae_refuses_to_overwrite_the_config_of_another_file(tmp_path: Path, vae) -> None:
    save_vae(vae, tmp_path / "x.safetensors", "ldm").unlink()

    with pytest.raises(UserError, match="x_config exists"):
        save_vae(vae, tmp_path / "x.safetensors", "ldm")

    assert listing(tmp_path) == ["x_config", "x_config/config.json"]


@pytest.mark.parametrize("layout", TARGETS)
def test_save_vae_never_replaces_a_folder_of_other_things(tmp_path: Path, vae, layout: str) -> None:
    folder = tmp_path / ("vae" if layout == "diffusers" else "vae_config")
    folder.mkdir()
    (folder / "thesis.tex").write_text("years of work")

    with pytest.raises(UserError, match=r"holds other files \(thesis.tex\), which would be lost"):
        save_vae(vae, tmp_path / TARGETS[layout], layout, overwrite=True)

    assert (folder / "thesis.tex").read_text() == "years of work"


class Interrupted(BaseException):
    """Stands for a kill or Ctrl-C in the middle of writing."""


@pytest.mark.parametrize(
    "failure", [OSError(28, "No space left on device"), SafetensorError("I/O error"), Interrupted()]
)
@pytest.mark.parametrize("layout", TARGETS)
@pytest.mark.parametrize("has_old", [False, True])
def test_save_vae_leaves_nothing_half_written(tmp_path: Path, vae, monkeypatch, layout, failure, has_old) -> None:
    path = tmp_path / TARGETS[layout]
    if has_old:
        save_vae(vae, path, layout)
    before = listing(tmp_path)

    def write_half(tensors: object, file: Path, metadata: object) -> None:
        Path(file).write_bytes(b"half")
        raise failure

    monkeypatch.setattr("safetensors.torch.save_file", write_half)

    with pytest.raises((UserError, Interrupted), match=r"^$|cannot write .*(No space left|I/O error)"):
        save_vae(vae, path, layout, overwrite=True)

    assert listing(tmp_path) == before
    assert not has_old or equal_weights(load_vae(path), vae)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layout": "onnx"}, "unknown layout 'onnx'; choose one of: diffusers, ldm, webui"),
        ({"path": "x.safetensors"}, "layout diffusers is a folder, and .* names a file"),
        ({"layout": "ldm", "path": "x.ckpt"}, r"does not end in \.safetensors"),
        ({"layout": "webui", "path": "x.safetensors", "variant": "fp16"}, "variant 'fp16' belongs to layout diffusers"),
        ({"dtype": "int8"}, "dtype 'int8' is not"),
        ({"family": "sd9"}, "unknown model family 'sd9'"),
        ({"metadata": {"step": 12}}, "metadata must map text to text, not 'step': 12"),
    ],
)
def test_save_vae_refuses_wrong_arguments(tmp_path: Path, vae, arguments: dict, message: str) -> None:
    path = tmp_path / arguments.pop("path", "x")

    with pytest.raises(UserError, match=message):
        save_vae(vae, path, **arguments)

    assert listing(tmp_path) == []


@pytest.mark.parametrize("layout", ["ldm", "webui"])
@pytest.mark.parametrize("scale", [{"scaling_factor": 0.9}, {"shift_factor": 0.5}])
def test_save_vae_needs_a_family_for_a_scale_of_its_own(tmp_path: Path, make_vae, layout: str, scale: dict) -> None:
    with pytest.raises(UserError, match=re.escape('name the family it is for, family="sd1" or --for sd1')):
        save_vae(make_vae(**scale), tmp_path / "x.safetensors", layout)

    assert listing(tmp_path) == []


def test_save_vae_refuses_weights_that_are_not_finite(tmp_path: Path, vae) -> None:
    vae.quant_conv.bias.data[0] = 1e6

    with pytest.raises(UserError, match=r"not finite in torch.float16: quant_conv\.bias; .*bfloat16"):
        save_vae(vae, tmp_path / "x", dtype="float16")

    assert listing(tmp_path) == []


def test_save_vae_refuses_what_is_no_vae(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="vae is a Linear, not an AutoencoderKL"):
        save_vae(torch.nn.Linear(1, 1), tmp_path / "x")


def test_save_vae_refuses_a_model_with_adapters(tmp_path: Path, vae) -> None:
    vae.lora_A = torch.nn.Linear(2, 2)

    with pytest.raises(UserError, match=r"not those of its config: lora_A.bias, lora_A.weight; merge"):
        save_vae(vae, tmp_path / "x")


def test_save_vae_refuses_a_model_without_values(tmp_path: Path, vae) -> None:
    with pytest.raises(UserError, match="tensors are on the meta device and have no values"):
        save_vae(vae.to("meta"), tmp_path / "x")


def test_save_vae_names_a_place_that_cannot_be_written(tmp_path: Path, vae) -> None:
    (tmp_path / "file").write_text("")

    with pytest.raises(UserError, match=r"cannot write .*file"):
        save_vae(vae, tmp_path / "file" / "x")
