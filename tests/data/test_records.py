import pickle

import fsspec
import pytest

from sd_vae.data.records import FileSpan, Record, open_records
from sd_vae.errors import UserError


def everything(records, start=0, stop=None):
    return list(records.read(start, stop))


@pytest.fixture
def metadata(folder):
    """A folder of pictures of which three have a caption, from two files."""
    (folder / "metadata.jsonl").write_text(
        '{"file_name": "0.png", "caption": "zero", "score": 0.5}\n\n{"file_name": "below/3.png", "caption": "drei"}\n'
    )
    (folder / "below" / "metadata.csv").write_text("file_name,label\n")
    return folder


def test_folder_gives_files_in_the_order_of_their_paths(folder):
    records = open_records(str(folder))

    found = everything(records)

    assert records.num_records == 7
    assert [record.id for record in found] == ["0.png", "1.png", "2.png", "4.png", "5.png", "6.png", "below/3.png"]
    assert [record.position for record in found] == list(range(7))
    assert found[6].source == str(folder / "below" / "3.png")
    assert found[6].data == (folder / "below" / "3.png").read_bytes()


@pytest.mark.parametrize(("start", "stop"), [(0, 3), (2, None), (5, 99), (7, None), (3, 3), (4, 2)])
def test_folder_reads_a_range(folder, start, stop):
    records = open_records(str(folder))

    assert everything(records, start, stop) == everything(records)[start:stop]


def test_folder_without_metadata_or_classes_has_no_columns(folder):
    assert {len(record.columns) for record in everything(open_records(str(folder)))} == {0}


def test_folder_of_class_folders_gives_labels(folder):
    (folder / "above").mkdir()
    for path in folder.glob("*.png"):
        path.rename(folder / "above" / path.name)

    labels = [record.columns for record in everything(open_records(str(folder)))]

    assert labels == [{"label": "above"}] * 6 + [{"label": "below"}]


def test_folder_reads_metadata(metadata):
    found = {record.id: record.columns for record in everything(open_records(str(metadata)))}

    assert found["0.png"] == {"caption": "zero", "score": 0.5}
    assert found["below/3.png"] == {"caption": "drei", "score": None}
    assert found["1.png"] == {"caption": None, "score": None}


def test_folder_reads_csv_beside_the_pictures(folder):
    (folder / "below" / "metadata.csv").write_text('file_name,label,caption\n3.png,7,"three, or so"\n')

    (record,) = everything(open_records(str(folder)), 6)

    assert record.columns == {"label": 7, "caption": "three, or so"}


def test_folder_reads_captions_with_line_separators(folder):
    (folder / "metadata.jsonl").write_text('{"file_name": "0.png", "caption": "one\u2028two\x85three"}\r\n')

    (record,) = everything(open_records(str(folder)), 0, 1)

    assert record.columns == {"caption": "one\u2028two\x85three"}


def test_folder_keeps_the_columns_asked_for(metadata):
    (record,) = everything(open_records(str(metadata), columns=["caption"]), 0, 1)

    assert record.columns == {"caption": "zero"}


@pytest.mark.parametrize(
    ("name", "text", "complaint"),
    [
        ("metadata.jsonl", '{"caption": "a"}\n', r"metadata\.jsonl line 1 has no 'file_name'; give each row the path"),
        ("metadata.jsonl", '\n{"file_name": ', r"metadata\.jsonl line 2 is not JSON \(.*\); mend the line\."),
        ("metadata.jsonl", '["0.png"]', r"metadata\.jsonl line 1 is \[\"0\.png\"\], it must be an object with"),
        ("metadata.jsonl", '{"file_name": "9.png"}', r"line 1 names 9\.png, which is not among the pictures"),
        (
            "metadata.jsonl",
            '{"file_name": "0.png"}\n{"file_name": "./0.png"}',
            r"line 2 names \./0\.png and so does .*metadata\.jsonl line 1; keep one row",
        ),
        ("metadata.csv", "caption\nzero\n", r"metadata\.csv row 1 has no 'file_name'"),
        ("metadata.csv", "file_name,a\n0.png,1,2\n", r"cannot read .*metadata\.csv: .*; mend it\."),
    ],
)
def test_folder_names_metadata_that_is_not_usable(folder, name, text, complaint):
    (folder / name).write_text(text)

    with pytest.raises(UserError, match=complaint):
        open_records(str(folder))


def test_folder_names_a_column_that_is_not_there(metadata):
    with pytest.raises(UserError, match=r"photos has no column 'text'; choose from: caption, score\."):
        open_records(str(metadata), columns=["text"])


def test_folder_says_that_it_has_no_columns(folder):
    with pytest.raises(UserError, match=r"photos has no column 'text'; it has none\."):
        open_records(str(folder), columns=["text"])


def test_record_of_a_file_stays_small_until_it_is_read(folder):
    (record,) = everything(open_records(str(folder)), 0, 1)

    copy = pickle.loads(pickle.dumps(record))  # noqa: S301

    assert len(pickle.dumps(record)) < 1000
    assert copy.data == (folder / "0.png").read_bytes()


def test_record_of_a_url_is_read_where_it_lies(encoded):
    fsspec.filesystem("memory").pipe("/photos/a.png", encoded[0])

    assert Record(0, "a", "a", FileSpan("memory://photos/a.png")).data == encoded[0]


def test_record_names_a_url_that_vanished():
    with pytest.raises(UserError, match=r"cannot read memory:/.*gone\.png: .*; check the path"):
        Record(0, "a", "a", FileSpan("memory://photos/gone.png")).data  # noqa: B018


def test_record_names_a_file_that_vanished(folder):
    (record,) = everything(open_records(str(folder)), 0, 1)
    (folder / "0.png").unlink()

    with pytest.raises(UserError, match=r"cannot read .*0\.png: No such file or directory; check the path"):
        record.data  # noqa: B018


def test_record_names_a_file_that_became_shorter(tmp_path):
    (tmp_path / "a").write_bytes(b"12345")
    record = Record(0, "a", "a", FileSpan(str(tmp_path / "a"), 3, 4))

    with pytest.raises(UserError, match=r"a ends 2 bytes early; it is cut off or was changed, restore it\."):
        record.data  # noqa: B018


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (
            lambda path: None,
            r"there is no data at .*here; give a folder of pictures, a parquet file or folder, WebData",
        ),
        (lambda path: path.mkdir(), r"here holds no pictures"),
        (lambda path: path.write_text("a"), r"here is neither a folder nor a parquet file nor a tar; give a folder"),
    ],
)
def test_open_records_names_what_is_no_data(tmp_path, make, complaint):
    make(tmp_path / "here")

    with pytest.raises(UserError, match=complaint):
        open_records(str(tmp_path / "here"))


def test_open_records_does_not_guess_between_kinds(folder):
    (folder / "a.tar").touch()
    (folder / "a.parquet").touch()

    with pytest.raises(UserError, match=r"photos holds 7 pictures and 1 parquet files and 1 tars, and which to use"):
        open_records(str(folder))


def test_open_records_streams_the_hub_only(folder):
    with pytest.raises(UserError, match=r"photos lies on this machine and is never downloaded; leave streaming to hf"):
        open_records(str(folder), streaming=True)
