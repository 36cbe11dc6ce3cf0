"""`sd-vae decode` and `sd-vae latents export`: a store and every export of it give the same pictures."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import synthetic_store as synthetic
import torch

from sd_vae.autoencoder import AutoencoderKL
from sd_vae.cli import main
from sd_vae.config import VAEConfig
from sd_vae.images import open_image, to_pil
from sd_vae.latents import Item, LatentStore, encoder_fingerprint
from sd_vae.latents.export import LAYOUTS, NOTE

OPTIONS = {"webdataset": ["--values", "scaled"], "parquet": ["--values", "raw"]}
DRAW = {name: ["--draw", "mode"] for name, layout in LAYOUTS.items() if layout.holds == "one latent"}
SIDE = 4


def moments_of(item: Item) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2 * item.position + item.flipped)
    return torch.randn(8, SIDE, SIDE, generator=generator)


@pytest.fixture
def vae(tiny_vae: AutoencoderKL, tmp_path: Path) -> AutoencoderKL:
    tiny_vae.register_to_config(scaling_factor=0.18215, shift_factor=0.25)
    tiny_vae.save_pretrained(tmp_path / "vae")
    return tiny_vae


@pytest.fixture
def store(vae: AutoencoderKL, tmp_path: Path) -> Path:
    """Four pictures and their mirror images."""
    config = VAEConfig.from_dict(dict(vae.config))
    values: dict[str, Any] = {"num_records": 4, "dtype": "float32", "encoder": encoder_fingerprint(vae), "vae": config}
    made = LatentStore.create(tmp_path / "store", synthetic.describe(**values))
    with made.writer(0) as writer:
        for position in range(4):
            for flipped in (False, True):
                item = synthetic.item(position, flipped=flipped, crop=(0, 0, 8, 8), id=f"c/{position}.png")
                writer.add(item, moments_of(item))
    made.finish(4)
    return made.folder


def run(*arguments: object) -> int:
    return main(list(map(str, arguments)))


def expected(vae: AutoencoderKL, position: int) -> bytes:
    with torch.inference_mode():
        return to_pil(vae.decode(moments_of(synthetic.item(position))[None, :4]).sample).tobytes()


def pictures(folder: Path) -> list[bytes]:
    return [open_image(path).tobytes() for path in sorted(folder.glob("*.png"))]


def test_decode_gives_the_pictures_of_a_store(vae, store, tmp_path, capsys) -> None:
    assert run("decode", tmp_path / "vae", store, "--out", tmp_path / "out", "--json", "--batch-size", 3) == 0

    result = json.loads(capsys.readouterr().out)
    assert pictures(tmp_path / "out") == [expected(vae, position) for position in range(4)]
    assert (result["num_pictures"], result["num_mirrored_left_out"], result["same_encoder"]) == (4, 4, True)
    lines = [json.loads(line) for line in (tmp_path / "out" / "decoded.jsonl").read_text().splitlines()]
    assert lines[1] == {"file": "000001_1.png", "latent": "c/1.png", "height": 8, "width": 8}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("has_note", [True, False])
def test_decode_gives_the_pictures_of_every_export(vae, store, tmp_path, capsys, layout, has_note) -> None:
    options = [*OPTIONS.get(layout, []), *DRAW.get(layout, [])]
    assert run("latents", "export", store, "--format", layout, "--out", tmp_path / "x", "--json", *options) == 0
    said = [] if has_note or layout not in ("dit", "mds") else ["--values", "scaled"]
    if not has_note:
        (tmp_path / "x" / NOTE).unlink()

    assert run("decode", tmp_path / "vae", tmp_path / "x", "--out", tmp_path / "out", *said) == 0

    # worst seen 1 of 255, where a value came through float16 or was scaled and back
    found = pictures(tmp_path / "out")
    assert len(found) == 4
    if layout == "mar":  # in the order of the class folders
        found = [found[index] for index in (0, 2, 3, 1)]
    for position, picture in enumerate(found):
        assert max(abs(a - b) for a, b in zip(picture, expected(vae, position), strict=True)) <= 1


def test_decode_takes_mirror_images_when_told(vae, store, tmp_path) -> None:
    assert run("decode", tmp_path / "vae", store, "--out", tmp_path / "out", "--mirrored") == 0

    assert len(pictures(tmp_path / "out")) == 8


def test_decode_stops_at_the_limit(vae, store, tmp_path) -> None:
    assert run("decode", tmp_path / "vae", store, "--out", tmp_path / "out", "--limit", 3) == 0

    assert len(pictures(tmp_path / "out")) == 3


def test_decode_says_that_another_encoder_made_the_latents(vae, store, tmp_path, capsys) -> None:
    torch.nn.init.zeros_(vae.encoder.conv_in.weight)
    vae.save_pretrained(tmp_path / "other")

    assert run("decode", tmp_path / "other", store, "--out", tmp_path / "out") == 0

    assert "the latents were made by the encoder" in capsys.readouterr().err


def _nothing(folder: Path) -> list[object]:
    return [folder / "nowhere"]


def _dit_without_note(folder: Path) -> list[object]:
    run("latents", "export", folder / "store", "--format", "dit", "--out", folder / "x")
    (folder / "x" / NOTE).unlink()
    return [folder / "x"]


def _note_denied(folder: Path) -> list[object]:
    run("latents", "export", folder / "store", "--format", "dit", "--out", folder / "x")
    return [folder / "x", "--values", "raw"]


def _other_format(folder: Path) -> list[object]:
    run("latents", "export", folder / "store", "--format", "dit", "--out", folder / "x")
    return [folder / "x", "--format", "mar"]


def _unknown_files(folder: Path) -> list[object]:
    (folder / "x").mkdir()
    return [folder / "x"]


def _empty(folder: Path) -> list[object]:
    (folder / "x").mkdir()
    return [folder / "x", "--format", "comfyui"]


def _channels(folder: Path) -> list[object]:
    run("latents", "export", folder / "store", "--format", "edm2", "--out", folder / "x")
    shutil.copy(folder / "x" / "00000" / "img-mean-std-00000000.npy", folder / "0.npy")
    return [folder / "0.npy", "--format", "dit", "--values", "raw"]


def _cut_off(folder: Path) -> list[object]:
    run("latents", "export", folder / "store", "--format", "mar", "--out", folder / "x")
    path = folder / "x" / "0" / "00000000.npz"
    path.write_bytes(path.read_bytes()[:100])
    return [folder / "x"]


def _store_is_scaled(folder: Path) -> list[object]:
    return [folder / "store", "--values", "scaled"]


def _store_is_dit(folder: Path) -> list[object]:
    return [folder / "store", "--format", "dit"]


def _mds(folder: Path, **changes: object) -> list[object]:
    """An MDS folder whose index says something else."""
    run("latents", "export", folder / "store", "--format", "mds", "--out", folder / "x")
    path = folder / "x" / "index.json"
    index = json.loads(path.read_text())
    index["shards"][0] |= changes
    path.write_text(json.dumps(index))
    return [folder / "x"]


def _mds_compressed(folder: Path) -> list[object]:
    return _mds(folder, compression="zstd")


def _mds_of_texts(folder: Path) -> list[object]:
    return _mds(folder, column_names=["caption", "key"])


def _mds_longer_samples(folder: Path) -> list[object]:
    run("latents", "export", folder / "store", "--format", "mds", "--out", folder / "x")
    path = folder / "x" / "shard.00000.mds"
    content = bytearray(path.read_bytes())
    content[8] += 1  # where the second sample begins
    path.write_bytes(content)
    return [folder / "x"]


def _parquet_of_texts(folder: Path) -> list[object]:
    (folder / "x").mkdir()
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"]}), folder / "x" / "0.parquet")
    return [folder / "x", "--values", "raw"]


def _not_finite(folder: Path) -> list[object]:
    np.save(folder / "0.npy", np.full((4, 4, 4), np.nan, np.float32))
    return [folder / "0.npy", "--format", "dit", "--values", "raw"]


def _no_limit(folder: Path) -> list[object]:
    return [folder / "store", "--limit", 0]


@pytest.mark.parametrize(
    ("arrange", "message"),
    [
        (_nothing, "there are no latents at"),
        (_dit_without_note, "does not say whether its latents are scaled; pass --values scaled"),
        (_note_denied, "--values is raw and"),
        (_other_format, "says that it is of dit; leave out --format"),
        (_unknown_files, "does not tell what it is; pass --format, one of: kohya, dit"),
        (_empty, "holds no latents of the format comfyui"),
        (_channels, "has 8 channels, dit of this VAE has 4"),
        (_cut_off, "check that the file is whole"),
        (_store_is_scaled, "is a latent store, which holds raw z; leave out --values"),
        (_store_is_dit, "is a latent store; leave out --format"),
        (_mds_compressed, "shard.00000.mds is compressed by zstd; unpack it with streaming first"),
        (_mds_of_texts, "has the columns caption, key, none latents_PIXELS"),
        (_mds_longer_samples, "ends at byte"),
        (_parquet_of_texts, "has the columns text, none 'latent'"),
        (_not_finite, "holds values that are not finite; make it anew, or stop before it with --limit"),
        (_no_limit, "--limit is 0, it must be at least 1"),
    ],
)
def test_decode_refuses(vae, store, tmp_path, capsys, arrange, message) -> None:
    arguments = arrange(tmp_path)
    capsys.readouterr()

    assert run("decode", tmp_path / "vae", *arguments, "--out", tmp_path / "out") == 2

    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_decode_replaces_only_what_it_decoded(vae, store, tmp_path, capsys) -> None:
    assert run("decode", tmp_path / "vae", store, "--out", tmp_path / "out") == 0
    assert run("decode", tmp_path / "vae", store, "--out", tmp_path / "out", "--limit", 1, "--overwrite") == 0
    assert len(pictures(tmp_path / "out")) == 1
    (tmp_path / "out" / "thesis.tex").write_text("old")

    assert run("decode", tmp_path / "vae", store, "--out", tmp_path / "out", "--overwrite") == 2

    assert "is not a folder of decoded latents (it holds thesis.tex)" in capsys.readouterr().err
