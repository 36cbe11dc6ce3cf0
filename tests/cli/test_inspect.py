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


@pytest.fixture
def ranges(place: Path) -> Path:
    """The workplace, with a VAE in `loud` of which 10 convolutions overflow float16."""
    vae = AutoencoderKL.from_pretrained(place / "start")
    for name, module in vae.named_modules():
        if name.endswith(".conv1"):
            for weight in module.parameters():
                weight.data.mul_(2.0**19)
    vae.save_pretrained(place / "loud")
    return place


PROBE = "--probe photos --probe-pictures 2 --probe-size 16"


@pytest.mark.usefixtures("ranges")
def test_inspect_command_shows_what_overflows(capsys) -> None:
    assert main(f"inspect loud {PROBE}".split()) == 0

    output = capsys.readouterr()
    rows = [
        [cell.strip() for cell in line.split("│")[1:-1]] for line in output.out.splitlines() if line.startswith("│")
    ]
    over = [name for name, _, _, judgement in rows if judgement == "over"]
    assert len(over) == 10
    assert all(name.endswith(".conv1") for name in over)
    assert "float16 overflows in 10 layers; sd-vae convert SRC DST --fp16-safe --probe DATA" in output.out
    assert "(--json lists all)" in output.out
    assert "probing with 2 of 4 pictures in photos" in output.err


@pytest.mark.usefixtures("place")
def test_inspect_command_says_so_where_nothing_overflows(capsys) -> None:
    assert main(f"inspect start {PROBE}".split()) == 0

    assert "float16 holds all of it on these pictures, with a margin of" in capsys.readouterr().out


@pytest.mark.usefixtures("ranges")
def test_inspect_command_puts_the_ranges_into_its_json(capsys) -> None:
    main(f"inspect loud --json {PROBE}".split())

    report = json.loads(capsys.readouterr().out)["probe"]
    assert report["num_pictures"] == 2
    assert len(report["layers"]) > 80
    worst = report["layers"][0]
    assert worst["name"].endswith(".conv1")
    assert (worst["kind"], worst["overflows"]) == ("conv", True)
    assert worst["margin"] == pytest.approx(65504 / worst["peak"])


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("start --probe nowhere", "nowhere"),
        ("start --probe empty", "no pictures"),
        ("start --probe photos --probe-pictures 0", "at least 1 picture"),
        ("start --probe-size 64", "--probe DATA"),
        ("nan --probe photos", "not finite"),
    ],
)
def test_inspect_command_refuses_a_probe_in_one_line(capsys, arguments: str, message: str) -> None:
    assert main(["inspect", *arguments.split()]) == 2

    output = capsys.readouterr()
    assert message in output.err
    assert output.err.count("\n") == 1
    assert output.out == ""


@pytest.mark.usefixtures("ranges")
def test_inspect_command_fits_layer_names_in_80_columns(capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")

    main(f"inspect loud {PROBE}".split())

    assert "…" not in capsys.readouterr().out
