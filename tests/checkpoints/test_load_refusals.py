"""Loading refuses, in one line, what is damaged, foreign, ambiguous or does not fit together; and the hub."""

import json
import re
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError, HFValidationError
from safetensors.torch import load_file, save_file
from vae_files import PREFIX, equal_weights, ldm_tensors

from sd_vae.checkpoints import load_vae
from sd_vae.checkpoints.formats import sniff
from sd_vae.errors import UserError

BAD_FILES = {
    "missing": (None, "there is nothing at"),
    "empty": (b"", "is not a checkpoint"),
    "text": (b"hello, this is text " * 10, "is not a checkpoint"),
    "random": (bytes(range(7, 256)) * 8, "is not a checkpoint"),
    "zeros": (bytes(4096), "is not a checkpoint"),
    "lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:1", "is a Git LFS pointer"),
    "half a zip": (b"PK\x03\x04" + bytes(500), "damaged PyTorch file"),
    "half a pickle": (b"\x80\x02}q\x00(X\x05", "damaged PyTorch file"),
    "torn header": ((500).to_bytes(8, "little") + b'{"a": {', "damaged safetensors file"),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_load_vae_refuses_in_one_line(tmp_path: Path, kind: str) -> None:
    content, message = BAD_FILES[kind]
    path = tmp_path / "x.ckpt"
    if content is not None:
        path.write_bytes(content)

    with pytest.raises(UserError, match=message) as caught:
        load_vae(path)

    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("kind", ["safetensors", "zip", "legacy"])
@pytest.mark.parametrize("kept", [0.05, 0.5, 0.99])
def test_load_vae_refuses_a_truncated_file(tmp_path: Path, vae, kind: str, kept: float) -> None:
    path = tmp_path / f"x.{'safetensors' if kind == 'safetensors' else 'ckpt'}"
    if kind == "safetensors":
        save_file(ldm_tensors(vae), path)
    else:
        torch.save(ldm_tensors(vae), path, _use_new_zipfile_serialization=kind == "zip")
    path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])

    with pytest.raises(UserError, match="is a damaged") as caught:
        load_vae(path)

    assert "\n" not in str(caught.value)


def test_load_vae_refuses_a_torch_file_called_safetensors(tmp_path: Path, vae) -> None:
    torch.save(ldm_tensors(vae), tmp_path / "x.safetensors")

    with pytest.raises(UserError, match=re.escape("rename it to end in .ckpt")):
        load_vae(tmp_path / "x.safetensors")


@pytest.mark.parametrize("value", [{}, [1, 2], {"state_dict": {"a": 1}}, 7])
def test_load_vae_refuses_a_file_without_tensors(tmp_path: Path, value: object) -> None:
    torch.save(value, tmp_path / "x.pt")

    with pytest.raises(UserError, match="holds no tensors"):
        load_vae(tmp_path / "x.pt")


def test_load_vae_refuses_a_file_without_vae(tmp_path: Path) -> None:
    save_file({"unet.weight": torch.ones(1)}, tmp_path / "x.safetensors")

    with pytest.raises(UserError, match=r"holds no KL autoencoder: none of its 1 tensors \(unet.weight, ...\)"):
        load_vae(tmp_path / "x.safetensors")


def test_load_vae_refuses_a_file_whose_architecture_is_hidden(tmp_path: Path) -> None:
    save_file({"encoder.conv_in.weight": torch.ones(8, 3, 3, 3)}, tmp_path / "x.safetensors")

    with pytest.raises(UserError, match="its tensors do not show the architecture of a VAE"):
        load_vae(tmp_path / "x.safetensors")


def test_load_vae_lists_what_does_not_fit(tmp_path: Path, vae) -> None:
    vae.save_pretrained(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    for name in list(tensors)[:9]:
        tensors[f"{name}.new"] = tensors.pop(name)
    tensors["quant_conv.bias"] = torch.ones(5)
    tensors["post_quant_conv.bias"] = torch.ones(4, dtype=torch.int64)
    save_file(tensors, path, {"format": "pt"})

    with pytest.raises(UserError) as caught:
        load_vae(tmp_path)

    message = str(caught.value)
    assert re.search(r"9 missing: .*and 4 more; 9 unexpected: .*\.new.* and 4 more; 2 misshapen: ", message)
    assert "quant_conv.bias is (5,), not (8,)" in message
    assert re.search(r"post_quant_conv.bias is \w+, not a float type", message)
    assert str(path) in message


def test_load_vae_refuses_a_config_for_another_model(tmp_path: Path, vae) -> None:
    vae.save_pretrained(tmp_path)

    with pytest.raises(UserError, match="do not fit the config from the caller"):
        load_vae(tmp_path, "sd1")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_load_vae_refuses_weights_that_are_not_finite(tmp_path: Path, vae, value: float) -> None:
    tensors = ldm_tensors(vae, PREFIX)
    tensors[f"{PREFIX}decoder.mid.attn_1.k.weight"][3, 2] = value
    save_file(tensors, tmp_path / "x.safetensors")

    with pytest.raises(UserError, match=r"not finite in 1 tensors: first_stage_model.decoder.mid.attn_1.k.weight;"):
        load_vae(tmp_path / "x.safetensors")


def test_load_vae_refuses_weights_that_overflow(tmp_path: Path, vae) -> None:
    tensors = ldm_tensors(vae)
    tensors["quant_conv.bias"][0] = 1e6
    save_file(tensors, tmp_path / "x.safetensors")

    with pytest.raises(UserError, match=r"quant_conv\.bias; the weights are damaged, or overflow"):
        load_vae(tmp_path / "x.safetensors", dtype="float16")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "it is empty"),
        ({"a.txt": "x", "b.txt": "x"}, r"holds neither config.json nor a vae folder \(it holds a.txt, b.txt\)"),
        ({"config.json": "{}"}, "has no diffusion_pytorch_model.safetensors or .bin"),
        ({"config.json": "{", "diffusion_pytorch_model.bin": "x"}, "is not a checkpoint"),
        (
            {"config.json": "{}", **{f"diffusion_pytorch_model.{v}.safetensors": "x" for v in ("ema", "fp16")}},
            "holds the variants diffusion_pytorch_model.ema.safetensors, diffusion_pytorch_model.fp16.safetensors",
        ),
    ],
)
def test_load_vae_refuses_a_folder(tmp_path: Path, files: dict[str, str], message: str) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)

    with pytest.raises(UserError, match=message):
        load_vae(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[1]", "holds a list, not a config"),
        (json.dumps({"_class_name": "UNet2DConditionModel"}), "describes a UNet2DConditionModel"),
        (json.dumps({"_class_name": "AutoencoderKL", "latent_chanels": 4}), "did you mean 'latent_channels'"),
    ],
)
def test_load_vae_refuses_a_config_file(tmp_path: Path, vae, text: str, message: str) -> None:
    vae.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(text)

    with pytest.raises(UserError, match=message):
        load_vae(tmp_path)


def test_load_vae_refuses_damaged_config_metadata(tmp_path: Path, vae) -> None:
    save_file(ldm_tensors(vae), tmp_path / "x.safetensors", {"sd_vae.config": "{"})

    with pytest.raises(UserError, match="holds a damaged config"):
        load_vae(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"config": "sd9"}, "there is no VAE config at sd9"),
        ({"config": 3}, "config is a int; give a VAEConfig"),
        ({"dtype": "int8"}, "dtype 'int8' is not one that weights are kept in"),
        ({"dtype": torch.int64}, "dtype 'int64' is not"),
        ({"device": "quantum"}, "device 'quantum' cannot be used"),
        ({"path": None}, "path is a NoneType"),
    ],
)
def test_load_vae_refuses_wrong_arguments(tmp_path: Path, vae, arguments: dict, message: str) -> None:
    vae.save_pretrained(tmp_path)

    with pytest.raises(UserError, match=message):
        load_vae(**({"path": tmp_path} | arguments))


def test_load_vae_says_that_the_hub_is_out_of_reach() -> None:
    with pytest.raises(UserError, match="there is no nobody/nothing-here on this disk") as caught:
        load_vae("nobody/nothing-here")

    assert "\n" not in str(caught.value)
    assert "HF_HUB_OFFLINE" in str(caught.value)


@pytest.mark.parametrize("subfolder", ["", "vae"])
@pytest.mark.parametrize("suffix", [".safetensors", ".fp16.safetensors", ".bin"])
def test_load_vae_reads_a_hub_repository(tmp_path: Path, vae, monkeypatch, subfolder: str, suffix: str) -> None:
    vae.save_pretrained(tmp_path / subfolder, safe_serialization=suffix != ".bin")
    plain = "diffusion_pytorch_model.bin" if suffix == ".bin" else "diffusion_pytorch_model.safetensors"
    (tmp_path / subfolder / plain).rename(tmp_path / subfolder / f"diffusion_pytorch_model{suffix}")

    def download(repository: str, name: str, subfolder: str | None = None) -> str:
        path = tmp_path / (subfolder or "") / name
        if repository != "someone/vae" or not path.is_file():
            raise EntryNotFoundError(f"404 {name}")
        return str(path)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)

    assert equal_weights(load_vae("someone/vae"), vae)


def test_load_vae_passes_on_what_the_hub_says(monkeypatch) -> None:
    def download(*_: object, **__: object) -> str:
        raise HFValidationError("no such repository\nsecond line")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)

    with pytest.raises(UserError, match=r"came from the hub \(no such repository\); check the name"):
        load_vae("someone/vae")


def test_load_vae_names_a_path_that_cannot_be_read(tmp_path: Path, monkeypatch) -> None:
    def deny(self: Path, *_: object) -> object:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "iterdir", deny)

    with pytest.raises(UserError, match=r"cannot read .*: Permission denied; check the path"):
        load_vae(tmp_path)


@pytest.mark.parametrize("length", [0x0280, 0x0380, 0x0480, 0x0580])
def test_sniff_tells_a_short_safetensors_header_from_a_pickle(tmp_path: Path, length: int) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + b"{}".ljust(length))

    assert sniff(path) == "safetensors"
