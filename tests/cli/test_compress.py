"""`sd-vae compress` and `sd-vae decompress`: pictures of a folder to files and back."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sd_vae import load_vae
from sd_vae.cli import main


@pytest.fixture
def files(place: Path, capsys) -> Path:
    """The photos of the workplace, compressed."""
    assert main(["compress", "start", "photos", "--out", "small"]) == 0
    capsys.readouterr()
    return place / "small"


def test_compress_and_decompress_give_pictures_of_the_same_size(files, capsys) -> None:
    assert main(["decompress", "start", "small", "--out", "back"]) == 0

    out = capsys.readouterr().out
    assert sorted(path.name for path in files.iterdir()) == [f"{index}.svae" for index in range(4)]
    for index in range(4):
        with Image.open(f"back/{index}.png") as picture:
            assert picture.size == (48, 40)
        assert f"{index}.png  48x40" in out


def test_compress_tells_sizes_and_what_quantisation_costs(place, capsys) -> None:
    assert main(["compress", "start", "photos/0.png", "--out", "small", "--measure", "--json"]) == 0

    (told,) = json.loads(capsys.readouterr().out)["pictures"]
    size = Path("small/0.svae").stat().st_size
    assert told["bytes"] == size
    assert told["bits_per_pixel"] == pytest.approx(8 * size / (40 * 48))
    assert told["cost_db"] == pytest.approx(told["unquantised_psnr_db"] - told["psnr_db"])
    assert abs(told["cost_db"]) < 0.3


def test_compress_prints_a_table_and_notes(place, capsys) -> None:
    Image.fromarray(np.full((8, 9, 4), 77, np.uint8)).save("clear.png")

    assert main(["compress", "start", "clear.png", "--out", "small", "--measure"]) == 0

    captured = capsys.readouterr()
    assert "clear.svae" in captured.out
    assert "cost dB" in captured.out
    assert "clear.png: transparency laid over white." in captured.err


def test_decompressed_png_carries_the_note(place, capsys) -> None:
    Image.fromarray(np.full((8, 9, 4), 77, np.uint8)).save("clear.png")
    main(["compress", "start", "clear.png", "--out", "small"])
    capsys.readouterr()

    assert main(["decompress", "start", "small/clear.svae", "--out", "back", "--json"]) == 0

    (line,) = json.loads(capsys.readouterr().out)["pictures"]
    assert line["note"] == "transparency laid over white"
    with Image.open("back/clear.png") as picture:
        assert picture.info["Comment"] == "transparency laid over white"


def test_overwrite_replaces_only_what_the_command_wrote(files, capsys) -> None:
    main(["decompress", "start", "small", "--out", "back"])

    assert main(["compress", "start", "photos", "--out", "small"]) == 2
    assert main(["compress", "start", "photos/1.png", "--out", "small", "--overwrite"]) == 0
    assert main(["decompress", "start", "small", "--out", "back", "--overwrite"]) == 0
    assert [path.name for path in Path("back").glob("*.png")] == ["1.png"]
    assert main(["compress", "start", "photos", "--out", "back", "--overwrite"]) == 2
    assert main(["decompress", "start", "small", "--out", "photos", "--overwrite"]) == 2
    assert len(list(Path("photos").iterdir())) == 4


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["compress", "start", "nowhere.png", "--out", "o"], "there is no picture or folder nowhere.png"),
        (["compress", "start", "note.txt", "--out", "o"], "cannot read the picture note.txt"),
        (["compress", "start", "photos", "--out", "o", "--quality", "101"], "photos/0.png: quality is 101"),
        (["compress", "start", "photos", "--out", "o", "--max-bytes", "9"], "bytes, more than 9; allow more"),
        (["decompress", "start", "photos", "--out", "o"], "photos holds no compressed pictures"),
        (["decompress", "start", "nowhere.svae", "--out", "o"], "cannot read nowhere.svae"),
        (["decompress", "start", "note.txt", "--out", "o"], "note.txt is not a compressed picture of sd-vae"),
        (["decompress", "start", "--out", "o"], "no files are given"),
        (["decompress", "start", "note.txt", "--out", "o", "--max-pixels", "0"], "--max-pixels is 0"),
    ],
)
def test_wrong_arguments_are_one_line_and_nothing_is_left(place, capsys, arguments, words) -> None:
    assert main(arguments) == 2

    assert words in capsys.readouterr().err
    assert not Path("o").exists()


def test_decompress_names_the_other_vae(files, capsys) -> None:
    vae = load_vae("start")
    vae.decoder.conv_out.bias.data += 1
    vae.save_pretrained("other")

    assert main(["decompress", "other", "small", "--out", "back"]) == 2
    assert "was compressed for the decoder" in capsys.readouterr().err
    assert main(["decompress", "other", "small", "--out", "back", "--allow-other-vae"]) == 0
