import json
import os
import shutil
import subprocess
import sys

import pytest
import skimage.data
import torch
from PIL import Image

import sd_vae
from eval.metrics import psnr_db
from sd_vae.cli import main
from sd_vae.cli.reconstruct import output_stems
from sd_vae.images import open_image


@pytest.fixture
def vae_folder(tiny_vae, tmp_path):
    tiny_vae.save_pretrained(tmp_path / "vae")
    return tmp_path / "vae"


@pytest.fixture
def pictures(tmp_path):
    """Two pictures of odd sizes in a folder, one further below."""
    folder = tmp_path / "pictures"
    (folder / "more").mkdir(parents=True)
    Image.fromarray(skimage.data.chelsea()).resize((37, 25)).save(folder / "cat.png")
    Image.fromarray(skimage.data.coffee()).resize((30, 21)).save(folder / "more" / "cat.jpg")
    return folder


def reconstruct(*arguments):
    return main(["reconstruct", *map(str, arguments)])


def test_reconstruct_writes_pictures_and_report(vae_folder, pictures, tmp_path, capsys):
    code = reconstruct(vae_folder, pictures, "--out", tmp_path / "out", "--device", "cpu")

    assert code == 0
    assert sorted(os.listdir(tmp_path / "out")) == [
        "cat-2.png",
        "cat-2_compare.png",
        "cat.png",
        "cat_compare.png",
        "per_image.csv",
        "report.html",
        "report.json",
    ]
    assert open_image(tmp_path / "out" / "cat.png").size == (37, 25)
    assert open_image(tmp_path / "out" / "cat-2_compare.png").size == (3 * 30 + 2 * 8, 21)
    assert "report.html" in capsys.readouterr().err


def test_reconstruct_measures_the_picture_that_it_writes(vae_folder, pictures, tmp_path, capsys):
    reconstruct(vae_folder, pictures / "cat.png", "--out", tmp_path / "out", "--json", "--device", "cpu")

    report = json.loads(capsys.readouterr().out)
    recon, x = open_image(tmp_path / "out" / "cat.png"), open_image(pictures / "cat.png")
    assert report == json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["evaluation"]["rows"][0]["photos"][0]["metrics"]["psnr_db"] == psnr_db(recon, x)


def test_reconstruct_prints_every_picture_and_the_mean(vae_folder, pictures, tmp_path, capsys):
    shutil.copy(pictures / "cat.png", pictures / "[red]a[bold].png")

    reconstruct(vae_folder, pictures, "--out", tmp_path / "out", "--perceptual-net", "none", "--size", 16)

    out = capsys.readouterr().out
    assert all(word in out for word in ("[red]a[bold].png", "cat.jpg", "mean", "PSNR (dB) ↑", "SSIM ↑"))


def test_reconstruct_measures_a_perceptual_term_by_its_name(vae_folder, pictures, tmp_path, capsys):
    options = ["--perceptual-net", "ms_dssim", "--size", 64, "--json"]

    reconstruct(vae_folder, pictures, "--out", tmp_path / "out", *options)

    assert "ms_dssim" in json.loads(capsys.readouterr().out)["evaluation"]["rows"][0]["means"]


def test_reconstruct_replaces_an_earlier_one_only_when_told(vae_folder, pictures, tmp_path):
    out = tmp_path / "out"
    assert reconstruct(vae_folder, pictures, "--out", out) == 0
    (out / "report.json").write_text("old")

    assert reconstruct(vae_folder, pictures, "--out", out) == 2
    assert (out / "report.json").read_text() == "old"
    assert reconstruct(vae_folder, pictures, "--out", out, "--overwrite") == 0
    assert (out / "report.json").read_text() != "old"


def test_reconstruct_never_replaces_what_it_did_not_write(vae_folder, pictures, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("old")

    assert reconstruct(vae_folder, pictures, "--out", tmp_path / "out", "--overwrite") == 2
    assert "is not a reconstruction (it holds thesis.tex)" in capsys.readouterr().err
    assert (tmp_path / "out" / "thesis.tex").read_text() == "old"


def test_reconstruct_gives_the_same_report_again(vae_folder, pictures, tmp_path):
    for name in ("one", "two"):
        reconstruct(vae_folder, pictures, "--out", tmp_path / name)

    for file in ("report.json", "report.html", "per_image.csv", "cat.png"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def _nothing(tmp_path, vae, pictures):
    return [vae]


def _missing_vae(tmp_path, vae, pictures):
    return [tmp_path / "no_vae", pictures]


def _other_config(tmp_path, vae, pictures):
    return [vae, pictures, "--config", "sd1"]


def _nan_weights(tmp_path, vae, pictures):
    model = sd_vae.AutoencoderKL.from_pretrained(vae)
    torch.nn.init.constant_(model.decoder.conv_out.weight, float("nan"))
    model.save_pretrained(vae)
    return [vae, pictures]


def _missing_picture(tmp_path, vae, pictures):
    return [vae, pictures / "dog.png"]


def _text_as_picture(tmp_path, vae, pictures):
    (pictures / "dog.png").write_text("woof")
    return [vae, pictures]


def _cut_off_picture(tmp_path, vae, pictures):
    whole = (pictures / "cat.png").read_bytes()
    (pictures / "dog.png").write_bytes(whole[: len(whole) // 2])
    return [vae, pictures]


def _folder_of_texts(tmp_path, vae, pictures):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("a")
    return [vae, tmp_path / "texts"]


def _picture_twice(tmp_path, vae, pictures):
    return [vae, pictures / "cat.png", pictures / "cat.png"]


def _speck(tmp_path, vae, pictures):
    Image.new("RGB", (8, 8)).save(pictures / "speck.png")
    return [vae, pictures]


def _size_zero(tmp_path, vae, pictures):
    return [vae, pictures, "--size", 0]


def _unknown_option(tmp_path, vae, pictures):
    return [vae, pictures, "--sizes", 3]


def _backbone_without_net(tmp_path, vae, pictures):
    return [vae, pictures, "--perceptual-backbone", "alex.pth"]


def _missing_backbone(tmp_path, vae, pictures):
    return [vae, pictures, "--perceptual-net", "alex", "--perceptual-backbone", tmp_path / "alex.pth"]


def _unknown_device(tmp_path, vae, pictures):
    return [vae, pictures, "--device", "abacus"]


@pytest.mark.parametrize(
    ("prepare", "words"),
    [
        (_nothing, "no photos"),
        (_missing_vae, "no_vae"),
        (_other_config, "do not fit the config"),
        (_nan_weights, "not finite"),
        (_missing_picture, "dog.png"),
        (_text_as_picture, "dog.png"),
        (_cut_off_picture, "dog.png"),
        (_folder_of_texts, "holds no pictures"),
        (_picture_twice, "given 2 times"),
        (_speck, "at least 11x11"),
        (_size_zero, "size is 0 pixels"),
        (_unknown_option, "--sizes"),
        (_backbone_without_net, "--perceptual-net is none"),
        (_missing_backbone, "alex.pth"),
        (_unknown_device, "abacus"),
    ],
)
def test_reconstruct_refuses_in_one_line_and_writes_nothing(prepare, words, vae_folder, pictures, tmp_path, capsys):
    arguments = prepare(tmp_path, vae_folder, pictures)
    before = sorted(tmp_path.rglob("*"))

    code = reconstruct(*arguments, "--out", tmp_path / "out")

    captured = capsys.readouterr()
    errors = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert code == 2
    assert captured.out == ""
    assert len(errors) == 1
    assert words in errors[0]
    assert errors[0].endswith((".", ")"))
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("out", ["pictures", ".", "vae"])
def test_reconstruct_never_replaces_what_it_reads(out, vae_folder, pictures, tmp_path, capsys):
    code = reconstruct(vae_folder, pictures, "--out", tmp_path / out, "--overwrite")

    assert code == 2
    assert "is inside the output folder" in capsys.readouterr().err
    assert (pictures / "cat.png").exists()
    assert (vae_folder / "config.json").exists()


def test_reconstruct_refuses_a_file_as_output(vae_folder, pictures, tmp_path, capsys):
    (tmp_path / "file").write_text("precious")

    code = reconstruct(vae_folder, pictures, "--out", tmp_path / "file")

    assert code == 2
    assert "exists; choose another place" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "precious"


def test_reconstruct_refuses_an_output_that_cannot_be_made(vae_folder, pictures, tmp_path, capsys):
    (tmp_path / "file").write_text("precious")

    code = reconstruct(vae_folder, pictures, "--out", tmp_path / "file" / "out")

    assert code == 2
    assert "cannot write" in capsys.readouterr().err


def test_reconstruct_interrupted_leaves_nothing(vae_folder, pictures, tmp_path, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("eval.routes.decode_picture", interrupt)

    assert reconstruct(vae_folder, pictures, "--out", tmp_path / "out") == 130
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pictures", "vae"]


def test_reconstruct_out_of_memory_says_what_to_do(vae_folder, pictures, tmp_path, monkeypatch, capsys):
    def exhaust(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.\nmore")

    monkeypatch.setattr("eval.routes.decode_picture", exhaust)

    assert reconstruct(vae_folder, pictures, "--out", tmp_path / "out") == 2
    assert "--size" in capsys.readouterr().err


def test_output_stems_never_fall_on_one_another():
    stems = output_stems(["a/x.png", "b/x.jpg", "X.webp", "x_compare.png", "y_compare.png", "y.png", "x-2.png"])

    files = [name.casefold() for stem in stems.values() for name in (stem, f"{stem}_compare")]
    assert len(set(files)) == len(files) == 14
    assert stems["a/x.png"] == "x"
    assert stems["b/x.jpg"] == "x-2"


def test_reconstruct_names_few_of_many_unreadable_pictures(vae_folder, tmp_path, capsys):
    for index in range(5):
        (tmp_path / f"{index}.png").write_text("no picture")

    code = reconstruct(vae_folder, tmp_path, "--out", tmp_path / "out")

    error = capsys.readouterr().err
    assert code == 2
    assert "2.png" in error
    assert "3.png" not in error
    assert "and 2 more." in error


def test_reconstruct_runs_in_a_process_of_its_own(vae_folder, pictures, tmp_path):
    command = [sys.executable, "-m", "sd_vae", "reconstruct", vae_folder, pictures, "--out", tmp_path / "out"]

    done = subprocess.run(command, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr
    assert "mean" in done.stdout
    assert (tmp_path / "out" / "report.html").exists()


def test_reconstruct_help_imports_neither_torch_nor_diffusers():
    code = (
        "import sys, contextlib; from sd_vae.cli import main\n"
        "with contextlib.suppress(SystemExit): main(['reconstruct', '--help'])\n"
        "sys.exit(bool({'torch', 'diffusers', 'matplotlib', 'skimage'} & set(sys.modules)))"
    )

    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


def test_reconstruct_help_names_its_arguments(capsys):
    with pytest.raises(SystemExit) as stop:
        reconstruct("--help")

    assert stop.value.code == 0
    assert "VAE IMAGE..." in capsys.readouterr().out
