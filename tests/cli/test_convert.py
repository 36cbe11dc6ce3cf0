"""`sd-vae convert`: results on standard output, one line and exit code 2 for what the user can mend."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL as DiffusersAutoencoderKL
from safetensors.torch import save_file

from sd_vae.autoencoder import AutoencoderKL
from sd_vae.checkpoints import load_vae, save_vae
from sd_vae.cli import main


def test_convert_command_writes_a_file_that_diffusers_opens(tmp_path: Path, tiny_vae: AutoencoderKL, capsys) -> None:
    source, target = save_vae(tiny_vae, tmp_path / "a"), tmp_path / "b.safetensors"

    code = main(["convert", str(source), str(target), "--layout", "ldm"])

    assert code == 0
    output = capsys.readouterr()
    assert str(target) in output.out
    assert "weights unchanged, their scale is that of sd1" in output.out
    opened = DiffusersAutoencoderKL.from_single_file(str(target), config=str(tmp_path / "b_config"))
    assert torch.equal(opened.quant_conv.weight, tiny_vae.quant_conv.weight)


def test_convert_command_prints_one_json_object(tmp_path: Path, tiny_vae: AutoencoderKL, capsys) -> None:
    source = save_vae(tiny_vae, tmp_path / "a")

    main(["convert", str(source), str(tmp_path / "b"), "--layout", "diffusers", "--dtype", "bfloat16", "--json"])

    done = json.loads(capsys.readouterr().out)
    assert (done["layout"], done["dtype"], done["family"]) == ("diffusers", "bfloat16", "sd1")
    assert done["num_tensors"] == len(tiny_vae.state_dict())


def test_convert_command_folds_for_a_family(tmp_path: Path, tiny_vae: AutoencoderKL, capsys) -> None:
    tiny_vae.register_to_config(scaling_factor=0.9)
    source = save_vae(tiny_vae, tmp_path / "a")
    arguments = ["convert", str(source), str(tmp_path / "b.safetensors"), "--layout", "webui"]

    assert main(arguments) == 2
    assert "--for sd1" in capsys.readouterr().err
    assert main([*arguments, "--for", "sdxl"]) == 0
    assert "folded to the scale of sdxl" in capsys.readouterr().out
    assert load_vae(tmp_path / "b.safetensors").config.scaling_factor == 0.13025


def test_convert_command_says_unchanged_for_a_scale_of_its_own(tmp_path: Path, tiny_vae: AutoencoderKL, capsys) -> None:
    tiny_vae.register_to_config(scaling_factor=0.9)
    source = save_vae(tiny_vae, tmp_path / "a")

    main(["convert", str(source), str(tmp_path / "b"), "--layout", "diffusers"])

    assert "scale     0.9, shift 0 (weights unchanged)" in capsys.readouterr().out


@pytest.fixture
def loud(place: Path) -> Path:
    """The workplace, with a VAE in `loud` of which one convolution overflows float16."""
    vae = load_vae(place / "start")
    for weight in vae.decoder.mid_block.resnets[0].conv1.parameters():
        weight.data.mul_(2.0**18)
    vae.save_pretrained(place / "loud")
    return place


SAFE = "convert loud out --layout diffusers --fp16-safe --probe photos --probe-pictures 2 --probe-size 16"


@pytest.mark.usefixtures("loud")
def test_convert_command_writes_what_float16_holds(capsys) -> None:
    assert main(SAFE.split()) == 0

    output = capsys.readouterr()
    fields = {line.split("  ")[0]: line for line in output.out.splitlines()}
    assert "1 streams in 1 layers: decoder.mid_block.resnets.0.conv1 by 2^-" in fields["rescaled"]
    assert "1 layers overflowed, now none; the largest is" in fields["float16"]
    assert "predicted " in fields["change"]
    assert "measured " in fields["change"]
    assert "latents unchanged" in fields["scale"]
    assert (
        "probing with 2 of 4 pictures in photos, evenly spread; of each the middle, up to 16x16 pixels." in output.err
    )
    opened = DiffusersAutoencoderKL.from_pretrained("out", torch_dtype=torch.float16)
    assert opened.config.force_upcast is False
    assert bool(opened.decode(torch.ones(1, 4, 8, 8).half()).sample.isfinite().all())


@pytest.mark.usefixtures("loud")
def test_convert_command_puts_the_rescaling_into_its_json(capsys) -> None:
    main([*SAFE.split(), "--json"])

    rescaling = json.loads(capsys.readouterr().out)["rescaling"]
    assert list(rescaling["scales"]) == ["decoder.mid_block.resnets.0.conv1"]
    assert rescaling["measured_change"] <= 1e-4
    assert [layer["name"] for layer in rescaling["before"]["layers"] if layer["overflows"]] == list(rescaling["scales"])


def test_convert_command_says_so_where_nothing_overflows(place: Path, capsys) -> None:
    assert main(SAFE.replace("loud", "start").split()) == 0

    assert "nothing: no layer overflows float16 on these pictures" in capsys.readouterr().out


@pytest.mark.parametrize(("given", "lacking"), [("--fp16-safe", "--probe DATA"), ("--probe photos", "--fp16-safe")])
def test_convert_command_needs_fp16_safe_and_probe_together(capsys, given: str, lacking: str) -> None:
    assert main(f"convert a b --layout diffusers {given}".split()) == 2

    assert f"error: {given.split()[0]} needs {lacking}, which is not given" in capsys.readouterr().err


@pytest.mark.usefixtures("loud")
@pytest.mark.parametrize("arguments", [SAFE.replace("out", "note.txt/out"), SAFE.replace("diffusers", "ldm")])
def test_convert_command_refuses_the_target_before_it_probes(capsys, arguments: str) -> None:
    assert main(arguments.split()) == 2

    assert "probing" not in capsys.readouterr().err


def make_nan(folder: Path, vae: AutoencoderKL) -> None:
    vae.quant_conv.bias.data[0] = float("nan")
    vae.save_pretrained(folder / "a")


def make_misfit(folder: Path, vae: AutoencoderKL) -> None:
    vae.save_pretrained(folder / "a")
    AutoencoderKL.from_preset("mini", block_out_channels=(8,) * 4).save_config(folder / "a")


def make_unwritable(folder: Path, vae: AutoencoderKL) -> None:
    vae.save_pretrained(folder / "a")
    (folder / "b").write_text("a file where a folder should be")


BAD: dict[str, tuple[Callable[[Path, AutoencoderKL], object], str, str]] = {
    "missing source": (lambda folder, vae: None, "a b --layout diffusers", "nothing at"),
    "empty folder": (lambda folder, vae: (folder / "a").mkdir(), "a b --layout diffusers", "it is empty"),
    "text file": (lambda folder, vae: (folder / "a").write_text("hello"), "a b --layout diffusers", "not a checkpoint"),
    "NaN": (make_nan, "a b --layout diffusers", "not finite in 1 tensors: quant_conv.bias"),
    "other config": (make_misfit, "a b --layout diffusers", "do not fit the config"),
    "existing target": (lambda folder, vae: vae.save_pretrained(folder / "a"), "a a --layout diffusers", "--overwrite"),
    "unwritable target": (make_unwritable, "a b/c --layout diffusers", "cannot write"),
    "wrong ending": (lambda folder, vae: vae.save_pretrained(folder / "a"), "a b.ckpt --layout ldm", "add that"),
    "wrong layout": (lambda folder, vae: None, "a b --layout onnx", "onnx"),
    "wrong dtype": (lambda folder, vae: None, "a b --layout ldm --dtype int8", "int8"),
    "no layout": (lambda folder, vae: None, "a b", "layout"),
    "channels of another family": (
        lambda folder, vae: vae.save_pretrained(folder / "a"),
        "a b.safetensors --layout ldm --for flux",
        "take 16 latent channels, this VAE has 4",
    ),
    "hub out of reach": (lambda folder, vae: None, "nobody/nothing b --layout diffusers", "HF_HUB_OFFLINE"),
}


@pytest.mark.parametrize("case", BAD)
def test_convert_command_refuses_in_one_line(tmp_path: Path, tiny_vae, monkeypatch, capsys, case: str) -> None:
    prepare, arguments, message = BAD[case]
    monkeypatch.chdir(tmp_path)
    prepare(tmp_path, tiny_vae)
    before = sorted(tmp_path.rglob("*"))

    code = main(["convert", *arguments.split()])

    output = capsys.readouterr()
    assert code == 2
    assert message in output.err
    assert output.err.startswith("error: ")
    assert output.err.count("\n") == 1
    assert output.out == ""
    assert sorted(tmp_path.rglob("*")) == before


def test_convert_command_leaves_nothing_when_interrupted(tmp_path: Path, tiny_vae, monkeypatch) -> None:
    source = save_vae(tiny_vae, tmp_path / "a")

    def interrupt(tensors: object, file: Path, metadata: object) -> None:
        Path(file).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("safetensors.torch.save_file", interrupt)

    assert main(["convert", str(source), str(tmp_path / "b.safetensors"), "--layout", "ldm"]) == 130
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_convert_command_runs_as_a_process_and_warns_on_standard_error(tmp_path: Path) -> None:
    save_file({"encoder.conv_in.weight": torch.ones(8, 3, 3, 3)}, tmp_path / "a.safetensors")
    command = [sys.executable, "-m", "sd_vae", "convert", str(tmp_path / "a.safetensors"), "b", "--layout", "diffusers"]

    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)

    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("command", ["convert", "inspect"])
def test_help_needs_neither_torch_nor_diffusers(command: str) -> None:
    program = (
        "import sys\nfrom sd_vae.cli import main\n"
        f"try: main(['{command}', '--help'])\n"
        "except SystemExit as stop: assert not stop.code\n"
        "assert not {'torch', 'diffusers', 'safetensors'} & set(sys.modules), 'a heavy import'"
    )

    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr
    assert f"sd-vae {command}" in done.stdout
