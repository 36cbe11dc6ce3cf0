"""`sd-vae sample`, `interpolate`, `latents direction`, `augment`: what they write, what they refuse."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from sd_vae.autoencoder import AutoencoderKL
from sd_vae.cli import main

ENCODE = "encode start photos --out store --size 16 --workers 0"


@pytest.fixture
def store(place: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """The workplace, with its photos encoded by start in store."""
    assert _run(ENCODE) == 0
    capsys.readouterr()
    return place / "store"


@pytest.fixture
def way(store: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """The workplace, with a direction in way.safetensors."""
    assert _run("latents direction --positive store --negative store --out way.safetensors") == 0
    capsys.readouterr()
    return store.parent / "way.safetensors"


def _run(arguments: str) -> int:
    return main(arguments.split())


def _json(arguments: str, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert _run(f"{arguments} --json") == 0, capsys.readouterr().err
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def _frames(path: str) -> int:
    with Image.open(path) as film:
        return int(getattr(film, "n_frames", 1))


@pytest.mark.usefixtures("place")
def test_sample_writes_pictures_and_a_sheet(capsys: pytest.CaptureFixture[str]) -> None:
    found = _json("sample start --n 3 --size 16 24 --out o", capsys)

    assert found["prior"] == "normal"
    assert sorted(path.name for path in Path("o").iterdir()) == [
        "0000.png",
        "0001.png",
        "0002.png",
        "samples.json",
        "sheet.png",
    ]
    with Image.open("o/0000.png") as picture:
        assert picture.size == (24, 16)
    assert json.loads(Path("o/samples.json").read_text()) == found


@pytest.mark.usefixtures("store")
def test_sample_is_the_same_again_and_replaces_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    command = "sample start --data store --n 2 --size 16 --components 1"
    assert _run(f"{command} --out o") == 0
    first = Path("o/0001.png").read_bytes()
    assert "mean and std of z by channel, where N(0, I) has 0 and 1" in capsys.readouterr().out

    assert _run(f"{command} --out o --overwrite") == 0

    assert Path("o/0001.png").read_bytes() == first


@pytest.mark.usefixtures("store")
def test_sample_fits_the_prior_where_there_is_data(capsys: pytest.CaptureFixture[str]) -> None:
    found = _json("sample start --data store --n 1 --size 8 --components 1 --out o", capsys)

    assert found["prior"] == "fitted"
    assert [component["num_pictures"] for component in found["components"]] == [4]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("sample start --out o --prior fitted", "--prior is fitted and no --data says to what; give a latent store"),
        (
            "sample start --out o --prior normal --data store",
            "--prior is normal and --data is store, which it does not",
        ),
        ("sample start --out o --size 8 8 8", "--size has 3 values, give one side, or height and width"),
        ("sample start --out o --size 7", "size is 7x7 pixels, both sides must be multiples of 2"),
        ("sample start --out o --n 0 --components 0", "--n is 0, it must be at least 1; --components is 0, it must be"),
        ("sample start --out o --side 0", "--side is 0, it must be at least 1"),
        ("sample start --out photos --overwrite", "photos exists and is not a folder of samples (it holds 0.png)"),
        ("sample start --out o --data photos", "photos is not a latent store, it has no store.json"),
        ("sample start --out o --data store", "store holds 4 items, 4 components need at least 16"),
        ("sample other --out o --data store", "store was made by the encoder"),
        ("sample nope --out o", "there is nothing at nope"),
    ],
)
def test_sample_refuses(
    arguments: str, message: str, store: Path, tiny_vae: AutoencoderKL, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.nn.init.zeros_(tiny_vae.quant_conv.weight)
    torch.nn.init.zeros_(tiny_vae.quant_conv.bias)
    tiny_vae.save_pretrained("other")
    capsys.readouterr()

    assert _run(arguments) == 2

    output = capsys.readouterr()
    assert message in output.err
    assert output.out == ""
    assert not Path("o").exists()


@pytest.mark.usefixtures("place")
def test_interpolate_writes_a_sheet_of_a_row_for_each_leg(capsys: pytest.CaptureFixture[str]) -> None:
    found = _json("interpolate start photos/0.png photos/1.png photos/2.png --steps 3 --out o.png", capsys)

    assert found["positions"] == [0, 0.5, 1, 1.5, 2]
    assert found["distances"] is None  # the weights of LPIPS are not here
    with Image.open("o.png") as sheet:
        assert sheet.size == (3 * 40 + 2 * 4, 2 * 40 + 4)


@pytest.mark.usefixtures("place")
def test_interpolate_says_that_distances_are_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    assert _run("interpolate start photos/0.png photos/1.png --steps 2 --out o.jpg") == 0

    output = capsys.readouterr()
    assert "note: distances are left out. LPIPS alex needs torchvision's alexnet" in output.err
    assert "or point --weights to a copy of it" in output.err
    assert "position" in output.out


@pytest.mark.usefixtures("place")
def test_interpolate_measures_neighbours(capsys: pytest.CaptureFixture[str]) -> None:
    command = "interpolate start photos/0.png photos/1.png --size 48 --steps 4 --net ms_dssim"

    found = _json(f"{command} --path geodesic --out o.png", capsys)

    assert found["distance"] == "ms_dssim"
    assert len(found["distances"]) == 3
    assert _run(f"{command} --out o.gif") == 0
    assert "ms_dssim to the one before" in capsys.readouterr().out


@pytest.mark.parametrize(("out", "frames"), [("o.gif", 4), ("o.webp", 4)])
@pytest.mark.usefixtures("place")
def test_interpolate_writes_a_film(out: str, frames: int) -> None:
    assert _run(f"interpolate start photos/0.png photos/1.png --steps 3 --net none --out {out}") == 0

    assert _frames(out) == frames


@pytest.mark.usefixtures("place")
def test_interpolate_spans_a_grid(capsys: pytest.CaptureFixture[str]) -> None:
    photos = " ".join(f"photos/{number}.png" for number in range(4))

    found = _json(f"interpolate start {photos} --grid --steps 3 --net ms_dssim --size 48 --out o.png", capsys)

    assert (len(found["distances_right"]), len(found["distances_below"])) == (3, 2)
    with Image.open("o.png") as sheet:
        assert sheet.size == (152, 152)
    assert _run(f"interpolate start {photos} --grid --steps 2 --net ms_dssim --size 48 --out p.png") == 0
    assert "ms_dssim to the right" in capsys.readouterr().out


@pytest.mark.usefixtures("store")
def test_interpolate_takes_items_of_a_store(capsys: pytest.CaptureFixture[str]) -> None:
    found = _json("interpolate start store#0 photos/1.png store#3 --steps 2 --net none --out o.png", capsys)

    assert found["ends"] == ["store#0", "photos/1.png", "store#3"]
    with Image.open("o.png") as sheet:
        assert sheet.size == (2 * 16 + 4, 2 * 16 + 4)


@pytest.mark.usefixtures("way")
def test_interpolate_moves_one_picture_along_a_direction(capsys: pytest.CaptureFixture[str]) -> None:
    command = "interpolate start photos/0.png --size 16 --direction way.safetensors --strength 2 --steps 5 --net none"

    found = _json(f"{command} --out o.png", capsys)

    assert found["strengths"] == [-2, -1, 0, 1, 2]
    assert _run(f"{command} --out p.png") == 0
    assert "strength" in capsys.readouterr().out


@pytest.mark.usefixtures("way")
def test_tools_say_when_latents_are_of_another_encoder(
    tiny_vae: AutoencoderKL, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.nn.init.zeros_(tiny_vae.quant_conv.bias)
    tiny_vae.save_pretrained("other")
    common = "--steps 2 --net none --direction way.safetensors"

    assert _run(f"interpolate other store#0 {common} --out o.png") == 0

    said = capsys.readouterr().err
    assert "note: store#0 was made by the encoder" in said
    assert "note: way.safetensors was made by the encoder" in said
    assert _run(f"interpolate start store#0 {common} --out p.png") == 0
    assert "note:" not in capsys.readouterr().err
    assert _run("augment other photos --size 16 --workers 0 --per-image 1 --direction way.safetensors --out o") == 0
    assert "note: way.safetensors was made by the encoder" in capsys.readouterr().err


@pytest.mark.usefixtures("place")
def test_interpolate_keeps_sizes_where_asked(capsys: pytest.CaptureFixture[str]) -> None:
    assert _run("interpolate start photos/0.png photos/1.png --native --steps 2 --net none --out o.png") == 0

    with Image.open("o.png") as sheet:
        assert sheet.size == (2 * 48 + 4, 48)  # a cell is square, a picture in it 48x40


A_B = "photos/0.png photos/1.png"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (f"{A_B} --out o.txt", "--out is o.txt, which ends like none of: .png, .jpg, .jpeg, .gif, .webp, .mp4"),
        (f"{A_B} --out photos/0.png", "photos/0.png exists; choose another place or pass --overwrite"),
        (f"{A_B} --out o.png --steps 1", "--steps is 1, it must be at least 2"),
        (f"{A_B} --out o.png --steps 1 --fps 0", "--steps is 1, it must be at least 2; --fps is 0"),
        (f"{A_B} --out o.png --fps 51", "--fps is 51, it must be at most 50"),
        (
            "photos/0.png --direction way.safetensors --strength nan --out o.png",
            "--strength is nan, it must be a finite",
        ),
        (f"{A_B} --out o.png --size 17", "--size is 17, it must be a multiple of the VAE's factor 2"),
        (f"{A_B} --out o.png --size 16 --native", "--native keeps the pictures' size and --size is 16; leave one"),
        (f"{A_B} --out o.png --grid", "--grid has 4 corners and 2 pictures are given; give 4"),
        (f"{A_B} {A_B} --out o.png --grid --path geodesic", "--path is geodesic, which spaces the steps of a line"),
        (f"{A_B} --out o.png --grid --direction way.safetensors", "--grid goes between four pictures and --direction"),
        (f"{A_B} --out o.png --direction way.safetensors", "--direction moves one picture and 2 are given; give one"),
        ("photos/0.png --out o.png", "one picture is given, and a line has two ends; give another, or a --direction"),
        (
            f"{A_B} --out o.png --path geodesic",
            "HF_HUB_OFFLINE forbids to download it; copy it there, or point --weights",
        ),
        (f"{A_B} --out o.png --path geodesic --net none", "--path is geodesic and --net none, which measures nothing"),
        (f"{A_B} --out o.png --net ms_dssim --weights w", "--weights is w but --net is ms_dssim; say whose weights"),
        (f"{A_B} --out o.png --net ms_dssim", "ms_dssim needs images of at least 44x44 pixels, these are 40x40"),
        (f"{A_B} --out o.png --weights nope", "there is no LPIPS backbone nope; check --weights"),
        ("photos/0.png nope.png --out o.png", "there is no picture nope.png"),
        ("photos/0.png store#4 --out o.png", "store#4 names no item: store holds 4, the first is store#0"),
        ("photos/0.png store#x --out o.png", "store#x names no item"),
        ("photos/0.png --direction nope --out o.png", "there is no direction nope"),
        ("photos/0.png --direction way.safetensors --out o.png", "the direction is of latents of shape (4, 8, 8)"),
    ],
)
@pytest.mark.usefixtures("way")
def test_interpolate_refuses(arguments: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(f"interpolate start {arguments}") == 2

    output = capsys.readouterr()
    assert message in output.err
    assert output.out == ""
    assert not Path("o.png").exists()


@pytest.mark.usefixtures("store")
def test_direction_says_how_well_it_separates(capsys: pytest.CaptureFixture[str]) -> None:
    command = "latents direction --positive store --negative store --out d.safetensors"

    found = _json(f"{command} --pooled", capsys)

    assert found["shape"] == [4, 1, 1]
    assert found["separation"] == 0.5  # the same pictures on both sides
    assert _run(f"{command} --overwrite") == 0
    assert "separation  0.500 AUROC on the half" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--positive store --negative photos --out d", "photos is not a latent store"),
        ("--positive store --negative other --out d", "store was made by the encoder"),
        (
            "--positive store --negative store --out note.txt",
            "note.txt exists; choose another place or pass --overwrite",
        ),
    ],
)
def test_direction_refuses(
    arguments: str, message: str, store: Path, tiny_vae: AutoencoderKL, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.nn.init.zeros_(tiny_vae.quant_conv.weight)
    torch.nn.init.zeros_(tiny_vae.quant_conv.bias)
    tiny_vae.save_pretrained("blank")
    assert _run("encode blank photos --out other --size 16 --workers 0") == 0
    capsys.readouterr()

    assert main(["latents", "direction", *arguments.split()]) == 2

    assert message in capsys.readouterr().err
    assert not Path("d").exists()


def _labelled() -> None:
    """The photos as two classes of two, in folders of that name."""
    for number in range(4):
        folder = Path("classes", "ab"[number % 2])
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.png").write_bytes(Path(f"photos/{number}.png").read_bytes())


@pytest.mark.usefixtures("place")
def test_augment_makes_a_folder_that_datasets_loads(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    import datasets

    _labelled()

    found = _json("augment start classes --per-image 3 --workers 0 --out o --sheet s.png", capsys)

    assert (found["num_pictures"], found["num_originals"], found["num_mixed"]) == (12, 4, 12)
    loaded = datasets.load_dataset("imagefolder", data_dir="o", split="train", cache_dir=str(tmp_path / "cache"))
    assert len(loaded) == 12
    assert {"image", "label", "augmented_from", "variant", "mixed_with", "share"} <= set(loaded.column_names)
    assert sorted(loaded["label"]) == ["a"] * 6 + ["b"] * 6
    assert all(row["augmented_from"].split("/")[0] == row["label"] == row["mixed_with"].split("/")[0] for row in loaded)
    assert loaded[0]["image"].size == (48, 40)
    with Image.open("s.png") as sheet:
        assert sheet.size == (4 * 48 + 3 * 4, 4 * 48 + 3 * 4)


@pytest.mark.usefixtures("place")
def test_augment_leaves_nothing_beside_what_it_writes(capsys: pytest.CaptureFixture[str]) -> None:
    before = set(Path().iterdir())

    assert _run("augment start photos --per-image 1 --workers 0 --out o") == 0

    output = capsys.readouterr()
    assert set(Path().iterdir()) - before == {Path("o")}
    assert "note: photos has no column 'label', so any two pictures of one size are mixed" in output.err
    assert "what --temperature 1 can change" in output.out
    assert _run("augment start photos --per-image 1 --workers 0 --out o --overwrite") == 0


@pytest.mark.usefixtures("way")
def test_augment_takes_a_store_and_a_direction(capsys: pytest.CaptureFixture[str]) -> None:
    found = _json("augment start store --per-image 2 --direction way.safetensors --mix 0 --out o", capsys)

    assert (found["num_pictures"], found["num_mixed"]) == (8, 0)
    rows = [json.loads(line) for line in Path("o/metadata.jsonl").read_text().splitlines()]
    assert all(len(row["strengths"]) == 1 and row["mixed_with"] is None for row in rows)


@pytest.mark.usefixtures("place")
def test_augment_names_what_it_leaves_out(capsys: pytest.CaptureFixture[str]) -> None:
    Path("mixed/metadata.jsonl").unlink(missing_ok=True)

    assert _run("augment start mixed --per-image 1 --workers 0 --out o") == 0

    assert "note: 1 pictures are left out (" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("photos --out o --per-image 0", "cannot augment like this: per_image is 0, it must be at least 1"),
        ("photos --out o --workers -1", "--workers is -1, it must be at least 0"),
        ("photos --out photos --overwrite", "photos exists and is not a folder of variants (it holds 0.png)"),
        ("photos --out o --sheet note.txt", "note.txt exists; choose another place or pass --overwrite"),
        ("photos --out o --size 17", "size is 17, it must be a multiple of factor 2"),
        ("store --out o --size 16", "store is a latent store, whose pictures have their size; leave --size out"),
        ("nope --out o", "there is no data at nope"),
        ("photos --out o --direction nope", "there is no direction nope"),
        ("named --out o --workers 0", "the data has a column 'variant', which is what the metadata calls its own"),
    ],
)
@pytest.mark.usefixtures("store")
def test_augment_refuses(arguments: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("named").mkdir()
    Path("named/0.png").write_bytes(Path("photos/0.png").read_bytes())
    Path("named/metadata.jsonl").write_text('{"file_name": "0.png", "variant": 1}\n')

    assert _run(f"augment start {arguments}") == 2

    output = capsys.readouterr()
    assert message in output.err
    assert output.out == ""
    assert not Path("o").exists()
