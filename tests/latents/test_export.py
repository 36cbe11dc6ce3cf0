"""What is common to all exports: refusals, the note, repetition, replacement."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import export_stores as stores
import pytest
import torch

from sd_vae.config import VAEConfig
from sd_vae.errors import UserError
from sd_vae.latents.export import LAYOUTS, NOTE, export_store, find_layout, find_note

OPTIONS: dict[str, dict[str, Any]] = {"webdataset": {"values": "scaled"}, "parquet": {"values": "raw"}}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stores.make(tmp_path_factory.mktemp("stores") / "store")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_export_gives_the_same_bytes_again(store: Path, tmp_path: Path, layout: str) -> None:
    for name in ("one", "two"):
        export_store(store, tmp_path / name, layout, **OPTIONS.get(layout, {}))

    assert contents(tmp_path / "one") == contents(tmp_path / "two")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_export_returns_the_note_that_it_writes(store: Path, tmp_path: Path, layout: str) -> None:
    note = export_store(store, tmp_path / "out", layout, **OPTIONS.get(layout, {}))

    found = find_note(tmp_path / "out")
    assert found is not None
    assert replace(found, files=()) == note
    assert note.num_latents == stores.NUM_ITEMS
    assert note.num_mirrored_left_out == (0 if layout in ("kohya", "mar", "lightningdit") else stores.NUM_ITEMS)


def test_export_reports_progress(store: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []

    export_store(store, tmp_path / "out", "comfyui", progress=lambda done, total: seen.append((done, total)))

    assert seen == [(done + 1, stores.NUM_ITEMS) for done in range(stores.NUM_ITEMS)]


def test_export_numbers_named_classes_in_sorted_order(tmp_path: Path) -> None:
    names = ("dog", "cat", "owl")
    chosen = [replace(item, columns={"label": names[item.position % 3]}) for item in stores.items()]

    note = export_store(stores.make(tmp_path / "store", chosen), tmp_path / "out", "lightningdit")

    from safetensors.torch import load_file

    assert note.classes == ("cat", "dog", "owl")
    labels = load_file(tmp_path / "out" / "latents_rank00_shard000.safetensors")["labels"].tolist()
    assert labels == [("cat", "dog", "owl").index(names[item.position % 3]) for item in chosen if item.position < 4]


def test_export_replaces_an_earlier_one_only_when_told(store: Path, tmp_path: Path) -> None:
    export_store(store, tmp_path / "out", "comfyui")
    before = contents(tmp_path / "out")

    with pytest.raises(UserError, match="exists; choose another place or pass --overwrite"):
        export_store(store, tmp_path / "out", "dit")
    assert contents(tmp_path / "out") == before
    export_store(store, tmp_path / "out", "dit", overwrite=True)

    assert not list((tmp_path / "out").glob("*.latent"))


def test_export_never_replaces_what_it_did_not_write(store: Path, tmp_path: Path) -> None:
    export_store(store, tmp_path / "out", "comfyui")
    (tmp_path / "out" / "thesis.tex").write_text("old")

    with pytest.raises(UserError, match=r"is not an export of latents \(it holds thesis.tex\)"):
        export_store(store, tmp_path / "out", "dit", overwrite=True)


def test_a_refused_export_leaves_nothing_behind(store: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    chosen = [replace(item, id="same/one.png") for item in stores.items()]

    with pytest.raises(UserError, match=r"two pictures of .* would have their latent in same/one_0030x"):
        export_store(
            stores.make(tmp_path / "store", [replace(item, original_size=(40, 30)) for item in chosen]),
            tmp_path / "out" / "kohya",
            "kohya",
        )

    assert list((tmp_path / "out").iterdir()) == []


NO_LABEL: dict[str, Any] = {"chosen": stores.items(label=False)}
VIEWS: dict[str, Any] = {"chosen": [replace(item, view=item.position % 2) for item in stores.items()]}
MIXED: dict[str, Any] = {"chosen": [replace(item, columns={"label": -item.position}) for item in stores.items()]}
GAPS: dict[str, Any] = {
    "chosen": [replace(item, columns={"label": 2 * (item.position % 2)}) for item in stores.items()]
}
OUTSIDE: dict[str, Any] = {"chosen": [replace(item, id=f"../{item.id}") for item in stores.items()]}
OWN_NAME: dict[str, Any] = {"chosen": [replace(item, columns={"latent": 1}) for item in stores.items()]}
BYTES: dict[str, Any] = {"chosen": [replace(item, columns={"raw": b"1"}) for item in stores.items()]}
NO_TEXT: dict[str, Any] = {"chosen": [replace(item, columns={"caption": 1}) for item in stores.items()]}
WIDE: dict[str, Any] = {"vae": replace(VAEConfig.from_preset("sd1"), scaling_factor=0.5)}

REFUSALS: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
    ("repa", {"content": "mode"}, {}, "repa holds mean and std of each posterior, .* holds content mode; encode with"),
    ("mar", {"content": "mode"}, {}, "mar holds mean and logvar of each posterior, .* holds content mode"),
    ("edm2", {}, {"draw": "mode"}, "--draw is mode and edm2 holds mean and std, nothing is drawn; leave out --draw"),
    ("dit", {"content": "mode"}, {}, "dit is written with --draw sample, .* holds content mode; pass --draw mode"),
    ("dit", {"content": "sample", "seed": 1}, {"draw": "mode"}, "holds content sample; pass --draw sample"),
    ("parquet", {}, {}, "parquet has no convention for the scale of latents; pass --values scaled"),
    ("kohya", {}, {"values": "scaled"}, "--values is scaled and kohya holds raw latents by convention"),
    ("dit", NO_LABEL, {}, r"dit needs a class for each latent and .* no column 'label' \(its columns: caption\)"),
    ("edm2", NO_LABEL, {}, "encode pictures in folders of classes, or pass --unlabelled"),
    ("dit", {}, {"label": "kind"}, r"no column 'kind' \(its columns: caption, label\)"),
    ("dit", {}, {"unlabelled": True}, "dit cannot be read without a label; leave out --unlabelled"),
    ("dit", MIXED, {}, "column 'label' of .* holds -1, a class is a number from 0 or a name"),
    ("mar", {"flip": False}, {}, "mar needs the mirror image of each picture, .* holds none; encode with --flip"),
    ("mar", GAPS, {}, "has none of class 1 but some of 2, which would get another number; renumber column 'label'"),
    ("kohya", VIEWS, {}, "kohya keeps one latent a picture, .* holds several crops of some"),
    ("kohya", WIDE, {}, "this VAE has 4 channels and 0.5; export to another format"),
    ("kohya", OUTSIDE, {}, "the picture '../0/0.png' has no place in the output folder"),
    ("parquet", OWN_NAME, {"values": "raw"}, "has a column 'latent', as parquet's own is called"),
    ("webdataset", BYTES, {"values": "raw"}, "the columns of 0/0.png cannot be written as JSON"),
    ("mds", NO_TEXT, {}, "the caption of 0/0.png is 1, mds keeps text"),
    ("dit", {"chosen": []}, {}, "holds no latents; its rejects.jsonl says why"),
]


@pytest.mark.parametrize(("layout", "made", "options", "message"), REFUSALS)
def test_export_refuses(
    tmp_path: Path, layout: str, made: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    folder = stores.make(tmp_path / "store", **made)

    with pytest.raises(UserError, match=message):
        export_store(folder, tmp_path / "out", layout, **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("layout", "shape", "message"),
    [
        ("mar", (8, 4, 4), "mar takes latents of one size, .* holds 16 of 2x2, 2 of 4x4; encode with --size"),
        ("mds", (8, 2, 4), "mds takes square latents, .* holds some of 2x4"),
    ],
)
def test_export_refuses_sizes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str, shape: tuple[int, ...], message: str
) -> None:
    plain = stores.moments_of
    monkeypatch.setattr(stores, "moments_of", lambda item: plain(item) if item.position else torch.zeros(shape))

    with pytest.raises(UserError, match=message):
        export_store(stores.make(tmp_path / "store"), tmp_path / "out", layout)


def test_export_refuses_other_channels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "moments_of", lambda item: torch.zeros(32, 2, 2))

    with pytest.raises(UserError, match=r"mds is read as latents of 4 channels, .* holds some of 16"):
        export_store(stores.make(tmp_path / "store", vae=VAEConfig.from_preset("sd3")), tmp_path / "out", "mds")


def test_export_refuses_what_float16_cannot_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "moments_of", lambda item: torch.full((8, 2, 2), 1e6))

    with pytest.raises(UserError, match=r"the latent of 0/0.png reaches 1e.06, which float16 cannot hold"):
        export_store(stores.make(tmp_path / "store"), tmp_path / "out", "webdataset", values="raw", draw="mode")


def test_layouts_are_known_by_name() -> None:
    with pytest.raises(UserError, match="unknown export format 'dlt'; choose one of: kohya, dit"):
        find_layout("dlt")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "does not say that it is of the format 'sd-vae export'"),
        ('{"format": "sd-vae export", "version": 2}', "is of version 2, this program reads 1; update sd-vae"),
        ('{"format": "sd-vae export", "version": 1}', "layout is missing"),
    ],
)
def test_notes_are_checked(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / NOTE).write_text(text)

    with pytest.raises(UserError, match=re.compile(message)):
        find_note(tmp_path)
