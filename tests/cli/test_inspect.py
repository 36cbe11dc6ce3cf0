"""`sd-vae inspect`: what is in a checkpoint, and what is wrong with it."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sd_vae.autoencoder import AutoencoderKL
from sd_vae.checkpoints import inspect_checkpoint, save_vae
from sd_vae.cli import main


def test_inspect_command_tells_the_main_things(tmp_path: Path, tiny_vae: AutoencoderKL, capsys) -> None:
    path = save_vae(tiny_vae, tmp_path / "x.safetensors", "ldm", "float16", metadata={"step": "12"})

    assert main(["inspect", str(path)]) == 0

    lines = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    fields = {name.strip(): text.strip() for name, text in lines.items()}
    num_parameters = sum(parameter.numel() for parameter in tiny_vae.parameters())
    assert fields["layout"] == "ldm"
    assert fields["parameters"] == f"{num_parameters:,}"
    assert fields["dtype"] == f"float16 ({len(tiny_vae.state_dict())} tensors)"
    assert fields["scale"] == "0.18215, shift 0, family sd1"
    assert fields["metadata step"] == "12"
    assert fields["config from"] == str(tmp_path / "x_config" / "config.json")
    assert fields["verdict"] == "sound"


def test_inspect_command_prints_one_json_object(tmp_path: Path, tiny_vae: AutoencoderKL, capsys) -> None:
    path = save_vae(tiny_vae, tmp_path / "x")

    main(["inspect", str(path), "--json"])

    found = json.loads(capsys.readouterr().out)
    assert found["layout"] == "diffusers"
    assert found["path"] == str(path / "diffusion_pytorch_model.safetensors")
    assert found["file_bytes"] == (path / "diffusion_pytorch_model.safetensors").stat().st_size
    assert found["num_parameters"] == sum(parameter.numel() for parameter in tiny_vae.parameters())
    assert found["config"]["block_out_channels"] == [8, 16]
    assert (found["factor"], found["scaling_factor"], found["family"]) == (2, 0.18215, "sd1")
    assert found["missing"] == found["unexpected"] == found["misshapen"] == found["damaged"] == []


def test_inspect_command_lists_every_problem(tmp_path: Path, tiny_vae: AutoencoderKL, capsys) -> None:
    path = save_vae(tiny_vae, tmp_path / "x") / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    for index in range(10):
        tensors[f"extra.{index}"] = torch.ones(1)
    del tensors["decoder.conv_out.bias"]
    tensors["quant_conv.bias"] = torch.ones(5)
    tensors["quant_conv.weight"][0] = float("inf")
    save_file(tensors, path, {"format": "pt"})

    assert main(["inspect", str(path.parent)]) == 0

    text = capsys.readouterr().out
    assert "1: decoder.conv_out.bias" in text
    assert "10: extra.0" in text
    assert "and 2 more (--json lists all)" in text
    assert "1: quant_conv.bias is (5,), not (8,)" in text
    assert "1: quant_conv.weight" in text
    assert "load_vae refuses it" in text


def test_inspect_checkpoint_tells_what_is_beside_the_vae(tmp_path: Path, tiny_vae: AutoencoderKL) -> None:
    path = save_vae(tiny_vae, tmp_path / "x.safetensors", "ldm")
    one = torch.ones(1)
    others = {"model.diffusion_model.w": one, "first_stage_model.loss.logvar": one.clone(), "model_ema.w": one.clone()}
    save_file(load_file(path) | others, path)

    found = inspect_checkpoint(path)

    assert found.is_sound
    assert (found.num_others, found.ignored) == (2, ("loss.logvar",))


def test_inspect_command_shows_mean_and_std(tmp_path: Path, tiny_vae: AutoencoderKL, capsys) -> None:
    tiny_vae.register_to_config(latents_mean=[0.0] * 4, latents_std=[2.0] * 4)
    save_vae(tiny_vae, tmp_path / "x")

    main(["inspect", str(tmp_path / "x")])

    assert "family none, latents_mean (0.0, 0.0, 0.0, 0.0), latents_std (2.0, 2.0, 2.0, 2.0)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "message"), [(None, "nothing at"), (b"hello", "not a checkpoint"), (b"PK\x03\x04", "damaged")]
)
def test_inspect_command_refuses_in_one_line(tmp_path: Path, capsys, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / "x.ckpt").write_bytes(content)

    assert main(["inspect", str(tmp_path / "x.ckpt")]) == 2

    output = capsys.readouterr()
    assert output.out == ""
    assert message in output.err
    assert output.err.count("\n") == 1


def test_inspect_command_takes_a_config(tmp_path: Path, tiny_vae: AutoencoderKL, capsys) -> None:
    path = save_vae(tiny_vae, tmp_path / "x")

    main(["inspect", str(path), "--config", "sd1", "--json"])

    assert json.loads(capsys.readouterr().out)["missing"]
