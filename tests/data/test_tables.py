import datasets
import pyarrow
import pyarrow.parquet
import pytest

from sd_vae.data.records import open_records
from sd_vae.errors import UserError


def write_parquet(path, columns, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table(columns), path, **options)
    return path


@pytest.fixture
def tables(tmp_path, encoded):
    """Two files of three and two rows, in row groups of two."""
    captions = [f"number {i}" for i in range(5)]
    for name, rows in (("a.parquet", slice(0, 3)), ("below/b.parquet", slice(3, 5))):
        columns = {"image": encoded[rows], "caption": captions[rows], "mask": encoded[rows]}
        write_parquet(tmp_path / "tables" / name, columns, row_group_size=2)
    return tmp_path / "tables"


def test_parquet_gives_rows_in_the_order_of_paths(tables, encoded):
    records = open_records(str(tables))

    found = list(records.read())

    assert records.num_records == 5
    assert [record.id for record in found] == [
        "a.parquet/0",
        "a.parquet/1",
        "a.parquet/2",
        "below/b.parquet/0",
        "below/b.parquet/1",
    ]
    assert [record.data for record in found] == encoded
    assert found[4].source == f"{tables / 'below' / 'b.parquet'}::1"


@pytest.mark.parametrize(("start", "stop"), [(0, 1), (1, 3), (2, 4), (3, None), (4, 99), (5, None), (2, 2)])
def test_parquet_reads_a_range(tables, start, stop):
    records = open_records(str(tables))

    assert list(records.read(start, stop)) == list(records.read())[start:stop]


def test_parquet_does_not_read_row_groups_before_the_range(tables, monkeypatch):
    asked = []
    read = pyarrow.parquet.ParquetFile.iter_batches
    monkeypatch.setattr(
        pyarrow.parquet.ParquetFile,
        "iter_batches",
        lambda self, *args, **options: asked.append(options["row_groups"]) or read(self, *args, **options),
    )

    next(open_records(str(tables)).read(2, 3))

    assert asked == [[1]]


def test_parquet_reads_many_rows_in_small_batches(tmp_path, encoded):
    path = write_parquet(tmp_path / "a.parquet", {"image": encoded * 20, "number": list(range(100))})

    numbers = [record.columns["number"] for record in open_records(str(path)).read(13, 91)]

    assert numbers == list(range(13, 91))


def test_parquet_keeps_plain_columns(tables):
    assert next(open_records(str(tables)).read()).columns == {"caption": "number 0"}


def test_parquet_keeps_the_columns_asked_for(tables):
    assert next(open_records(str(tables), columns=[]).read()).columns == {}


@pytest.mark.parametrize("form", ["bytes", "struct", "path", "path struct"])
def test_parquet_takes_every_form_of_column(tmp_path, folder, encoded, form):
    paths = [str(folder / f"{i}.png") for i in (0, 1, 2, 4, 5)]
    column = {
        "bytes": encoded,
        "struct": [{"bytes": data, "path": None} for data in encoded],
        "path": paths,
        "path struct": [{"bytes": None, "path": path} for path in paths],
    }[form]
    if form == "path struct":
        kind = pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})
        column = pyarrow.array(column, kind)

    records = open_records(str(write_parquet(tmp_path / "a.parquet", {"jpg": column})), image_column="jpg")

    assert list(records.read())[1].data == encoded[1]


def test_parquet_row_without_a_picture_has_no_bytes(tmp_path, encoded):
    path = write_parquet(tmp_path / "a.parquet", {"image": [encoded[0], None, b""]})

    assert [record.data for record in open_records(str(path)).read()] == [encoded[0], b"", b""]


def test_parquet_skips_files_without_rows(tmp_path, encoded):
    write_parquet(tmp_path / "tables" / "a.parquet", {"image": pyarrow.array([], pyarrow.binary())})
    write_parquet(tmp_path / "tables" / "b.parquet", {"image": encoded})

    assert [record.id for record in open_records(str(tmp_path / "tables")).read(0, 1)] == ["b.parquet/0"]


@pytest.mark.parametrize(
    ("columns", "options", "complaint"),
    [
        ({"jpg": [b"a"], "n": [1]}, {}, r"a\.parquet has no column 'image'; name the image column, one of: jpg, n\."),
        ({"image": [1]}, {}, r"column 'image' of .*a\.parquet holds int64, not pictures; choose another image column"),
        ({"image": [b"a"], "n": [1]}, {"columns": ["m"]}, r"a\.parquet has no column 'm'; choose from: n\."),
        ({"image": pyarrow.array([], pyarrow.binary())}, {}, r"a\.parquet holds no rows; give parquet files that do"),
    ],
)
def test_parquet_names_what_is_not_usable(tmp_path, columns, options, complaint):
    path = write_parquet(tmp_path / "a.parquet", columns)

    with pytest.raises(UserError, match=complaint):
        open_records(str(path), **options)


def test_parquet_files_with_other_columns_are_named(tables, encoded):
    write_parquet(tables / "c.parquet", {"image": encoded})

    with pytest.raises(UserError, match=r"c\.parquet has no column 'caption'; it has none"):
        open_records(str(tables))


def test_parquet_that_is_damaged_is_named(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and then nothing")

    with pytest.raises(UserError, match=r"cannot read the parquet file .*a\.parquet: .*; write it anew"):
        open_records(str(tmp_path / "a.parquet"))


def test_parquet_that_changed_after_opening_is_named(tables, encoded):
    records = open_records(str(tables))
    (tables / "a.parquet").write_bytes(b"PAR1 and then nothing")

    with pytest.raises(UserError, match=r"cannot read the parquet file .*a\.parquet: .*; it is damaged or was changed"):
        list(records.read())


def test_parquet_that_lost_rows_after_opening_is_named(tables, encoded):
    records = open_records(str(tables))
    write_parquet(tables / "a.parquet", {"image": encoded[:2], "caption": ["a", "b"]})

    with pytest.raises(UserError, match=r"cannot read the parquet file .*a\.parquet: .*; it is damaged or was changed"):
        list(records.read())


@pytest.fixture
def dataset(encoded):
    """Pictures with labels, as `datasets` holds them."""
    rows = {"image": [{"bytes": data, "path": None} for data in encoded], "label": list(range(5))}
    return datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())


def test_saved_data_set_is_read(tmp_path, dataset, encoded):
    dataset.save_to_disk(tmp_path / "saved")

    records = open_records(str(tmp_path / "saved"))
    found = list(records.read(1, 4))

    assert records.num_records == 5
    assert [(record.position, record.id) for record in found] == [(1, "1"), (2, "2"), (3, "3")]
    assert [record.data for record in found] == encoded[1:4]
    assert found[0].columns == {"label": 1}
    assert found[0].source == f"{tmp_path / 'saved'}::1"


def test_saved_splits_are_named(tmp_path, dataset):
    datasets.DatasetDict(train=dataset, test=dataset).save_to_disk(tmp_path / "saved")

    with pytest.raises(UserError, match=r"saved holds the splits train, test; name the folder of one, below it"):
        open_records(str(tmp_path / "saved"))


def test_saved_data_set_that_is_damaged_is_named(tmp_path, dataset):
    dataset.save_to_disk(tmp_path / "saved")
    (tmp_path / "saved" / "state.json").write_text("{")

    with pytest.raises(UserError, match=r"cannot load the data set .*saved: .*; save it anew"):
        open_records(str(tmp_path / "saved"))


@pytest.fixture
def hub(monkeypatch, dataset):
    """A hub that holds one data set; gives what it was asked for."""
    calls = []

    def load_dataset(name, split, streaming=False):
        calls.append((name, split, streaming))
        return dataset.to_iterable_dataset() if streaming else dataset

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


@pytest.mark.parametrize("streaming", [False, True])
def test_hub_data_set_is_read(hub, encoded, streaming):
    records = open_records("hf://user/photos:test", streaming=streaming)

    found = list(records.read(2))

    assert hub == [("user/photos", "test", streaming)]
    assert records.num_records == (None if streaming else 5)
    assert [record.position for record in found] == [2, 3, 4]
    assert [record.data for record in found] == encoded[2:]
    assert found[0].columns == {"label": 2}
    assert found[0].source == "hf://user/photos:test::2"


@pytest.mark.parametrize(("start", "stop"), [(0, 2), (2, 4), (3, 99), (9, None), (3, 2)])
def test_stream_reads_a_range(hub, start, stop):
    records = open_records("hf://user/photos", streaming=True)

    assert list(records.read(start, stop)) == list(records.read())[start:stop]


def test_stream_that_says_nothing_of_its_columns_is_rejected(monkeypatch, dataset):
    stream = dataset.to_iterable_dataset().map(lambda row: row)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: stream)

    with pytest.raises(UserError, match=r"hf://user/photos does not say what its columns are; download it instead"):
        open_records("hf://user/photos", streaming=True)


def test_stream_that_breaks_off_is_one_line(hub, monkeypatch):
    records = open_records("hf://user/photos", streaming=True)

    def broken(self):
        yield from ()
        raise ConnectionError("the line is dead")

    monkeypatch.setattr(datasets.IterableDataset, "__iter__", broken)

    with pytest.raises(UserError, match=r"cannot read hf://user/photos: the line is dead; check the network"):
        list(records.read())


@pytest.mark.parametrize(
    ("rows", "options", "complaint"),
    [
        ({"jpg": [b"a"]}, {}, r"hf://user/photos has no column 'image'; name the image column, one of: jpg\."),
        ({"image": [1]}, {}, r"column 'image' of hf://user/photos holds .*int64.*, not pictures"),
        ({"image": [b"a"], "n": [1]}, {"columns": ["m"]}, r"hf://user/photos has no column 'm'; choose from: n\."),
        ({"image": []}, {}, r"hf://user/photos holds no rows; choose another split"),
    ],
)
def test_hub_data_set_names_what_is_not_usable(monkeypatch, rows, options, complaint):
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_dict(rows))

    with pytest.raises(UserError, match=complaint):
        open_records("hf://user/photos", **options)


def test_hub_stream_of_numbers_is_rejected(monkeypatch):
    stream = datasets.Dataset.from_dict({"image": [1]}).to_iterable_dataset()
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: stream)

    with pytest.raises(UserError, match=r"column 'image' of hf://user/photos holds .*int64.*, not pictures"):
        list(open_records("hf://user/photos", streaming=True).read())
