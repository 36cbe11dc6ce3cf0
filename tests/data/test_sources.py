import pickle

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from sd_vae.data.sources import open_source
from sd_vae.errors import UserError
from sd_vae.images import open_image


def write_parquet(path, columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


def same(image, other):
    return image.mode == other.mode == "RGB" and image.tobytes() == other.tobytes()


def test_folder_is_read_below_in_the_order_of_paths(folder):
    source = open_source(str(folder))

    names = [source.name(i).removeprefix(f"{folder}/") for i in range(len(source))]

    assert names == ["0.png", "1.png", "2.png", "4.png", "5.png", "6.png", "below/3.png"]
    assert same(source.load(6), open_image(folder / "below" / "3.png"))


def test_folder_is_read_anew_every_time(folder, tmp_path):
    open_source(str(folder))
    (folder / "0.png").unlink()

    assert len(open_source(str(folder))) == 6
    assert not (tmp_path / "datasets-cache").exists()


def test_source_survives_pickling(folder):
    source = open_source(str(folder))

    copy = pickle.loads(pickle.dumps(source))  # noqa: S301

    assert same(copy.load(0), source.load(0))


@pytest.mark.parametrize("form", ["bytes", "struct", "path"])
def test_parquet_takes_every_form_of_column(tmp_path, folder, encoded, form):
    column = {
        "bytes": encoded,
        "struct": [{"bytes": data, "path": None} for data in encoded],
        "path": [str(folder / f"{i}.png") for i in (0, 1, 2, 4, 5)],
    }[form]
    path = write_parquet(tmp_path / "table.parquet", {"image": column, "caption": ["x"] * 5})

    source = open_source(str(path))

    assert len(source) == 5
    assert same(source.load(1), open_image(folder / "1.png"))


def test_parquet_folder_is_one_source(tmp_path, folder, encoded):
    write_parquet(tmp_path / "tables" / "a.parquet", {"image": encoded[:2]})
    write_parquet(tmp_path / "tables" / "below" / "b.parquet", {"image": encoded[2:]})

    source = open_source(str(tmp_path / "tables"))

    assert len(source) == 5
    assert same(source.load(2), open_image(folder / "2.png"))
    assert source.name(2) == f"{tmp_path / 'tables'} row 2"


def test_parquet_that_changed_is_read_anew(tmp_path, folder, encoded):
    path = write_parquet(tmp_path / "table.parquet", {"image": encoded[:2]})
    open_source(str(path))
    write_parquet(path, {"image": encoded[2:]})

    source = open_source(str(path))

    assert len(source) == 3
    assert same(source.load(0), open_image(folder / "2.png"))


def test_parquet_column_may_have_another_name(tmp_path, encoded):
    path = write_parquet(tmp_path / "table.parquet", {"jpg": encoded})

    assert len(open_source(str(path), image_column="jpg")) == 5


def test_parquet_source_survives_pickling(tmp_path, encoded):
    source = open_source(str(write_parquet(tmp_path / "table.parquet", {"image": encoded})))

    copy = pickle.loads(pickle.dumps(source))  # noqa: S301

    assert same(copy.load(4), source.load(4))


def test_parquet_without_the_column_names_those_it_has(tmp_path, encoded):
    path = write_parquet(tmp_path / "table.parquet", {"jpg": encoded, "caption": ["x"] * 5})

    with pytest.raises(UserError, match=r"has no column 'image'; set data\.image_column to one of: jpg, caption\."):
        open_source(str(path))


def test_parquet_with_a_column_of_numbers_is_rejected(tmp_path):
    path = write_parquet(tmp_path / "table.parquet", {"image": [1, 2]})

    with pytest.raises(UserError, match=r"column 'image' of .*table\.parquet holds .*int64.*, not pictures"):
        open_source(str(path))


def test_parquet_without_rows_is_rejected(tmp_path):
    path = write_parquet(tmp_path / "table.parquet", {"image": pyarrow.array([], pyarrow.binary())})

    with pytest.raises(UserError, match=r"table\.parquet holds no rows"):
        open_source(str(path))


def test_parquet_folder_skips_files_without_rows(tmp_path, encoded):
    write_parquet(tmp_path / "tables" / "a.parquet", {"image": encoded})
    write_parquet(tmp_path / "tables" / "b.parquet", {"image": pyarrow.array([], pyarrow.binary())})

    assert len(open_source(str(tmp_path / "tables"))) == 5


def test_parquet_that_is_damaged_is_named(tmp_path):
    (tmp_path / "table.parquet").write_bytes(b"PAR1 and then nothing")

    with pytest.raises(UserError, match=r"cannot read the parquet file .*table\.parquet: .*; write it anew\."):
        open_source(str(tmp_path / "table.parquet"))


def test_parquet_files_with_different_columns_are_named(tmp_path, encoded):
    write_parquet(tmp_path / "tables" / "a.parquet", {"image": encoded})
    write_parquet(tmp_path / "tables" / "b.parquet", {"image": [1, 2]})

    with pytest.raises(UserError, match=r"cannot read the parquet data .*tables: .*; write the files anew"):
        open_source(str(tmp_path / "tables"))


def test_parquet_row_without_a_picture_is_named(tmp_path, encoded):
    source = open_source(str(write_parquet(tmp_path / "table.parquet", {"image": [encoded[0], None]})))

    with pytest.raises(UserError, match=r"table\.parquet row 1 holds no picture in column 'image'"):
        source.load(1)


def test_parquet_row_that_is_no_picture_is_named(tmp_path, encoded):
    source = open_source(str(write_parquet(tmp_path / "table.parquet", {"image": [encoded[0], b"text"]})))

    with pytest.raises(UserError, match=r"cannot read the picture .*table\.parquet row 1: cannot identify"):
        source.load(1)


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda path: None, r"there is no data at .*here; give a folder of pictures, a parquet file"),
        (lambda path: path.mkdir(), r"here holds no pictures"),
        (lambda path: (path.mkdir(), (path / "a.txt").write_text("a")), r"here holds no pictures"),
        (lambda path: path.write_text("a"), r"here is no folder and no parquet file; give a folder"),
    ],
)
def test_open_source_names_what_is_no_source(tmp_path, make, complaint):
    make(tmp_path / "here")

    with pytest.raises(UserError, match=complaint):
        open_source(str(tmp_path / "here"))


def test_open_source_does_not_guess_between_pictures_and_parquet(folder, encoded):
    write_parquet(folder / "table.parquet", {"image": encoded})

    with pytest.raises(UserError, match=r"photos holds 7 pictures and 1 parquet files, .* move one kind elsewhere"):
        open_source(str(folder))


def test_hub_dataset_is_loaded_by_name_and_split(monkeypatch, folder, encoded):
    calls = []

    def load_dataset(name, split):
        calls.append((name, split))
        return datasets.Dataset.from_dict({"jpg": encoded, "label": [0] * 5})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)

    sources = [open_source(spec, image_column="jpg") for spec in ("hf://user/photos", "hf://user/photos:test")]

    assert calls == [("user/photos", "train"), ("user/photos", "test")]
    assert same(sources[0].load(1), open_image(folder / "1.png"))
    assert sources[1].name(1) == "hf://user/photos:test row 1"


def test_hub_dataset_without_the_column_names_those_it_has(monkeypatch, encoded):
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_dict({"jpg": encoded}))

    with pytest.raises(UserError, match=r"hf://user/photos has no column 'image'; .* one of: jpg"):
        open_source("hf://user/photos")


def test_hub_dataset_without_rows_is_rejected(monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_dict({"image": []}))

    with pytest.raises(UserError, match=r"hf://user/photos holds no rows; choose another split"):
        open_source("hf://user/photos")


def test_hub_that_cannot_be_reached_is_one_line():
    with pytest.raises(UserError, match=r"cannot load hf://user/no-such-photos: .*; check its name") as caught:
        open_source("hf://user/no-such-photos")

    assert "\n" not in str(caught.value)


def test_hub_needs_a_name():
    with pytest.raises(UserError, match=r"hf:// names no data set; write hf://DATASET\[:SPLIT\]"):
        open_source("hf://")
