import gzip
import io
import json
import tarfile

import pytest

from sd_vae.data.records import open_records
from sd_vae.errors import UserError


def write_tar(path, members, form=tarfile.PAX_FORMAT):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as archive:
        for name, data in members:
            data = data if isinstance(data, bytes) else data.encode()
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture
def tars(tmp_path, encoded):
    """Two tars with three and two samples."""
    fields = [json.dumps({"caption": f"number {i}", "width": 40}) for i in range(5)]
    samples = [
        [(f"{i:04d}.json", fields[i]), (f"{i:04d}.png", encoded[i]), (f"{i:04d}.cls", str(i)), (f"{i:04d}.txt", "text")]
        for i in range(5)
    ]
    write_tar(tmp_path / "tars" / "b" / "00.tar", [member for sample in samples[3:] for member in sample])
    write_tar(tmp_path / "tars" / "a.tar", [member for sample in samples[:3] for member in sample])
    return tmp_path / "tars"


def test_tars_give_samples_in_the_order_of_paths_and_members(tars, encoded):
    records = open_records(str(tars))

    found = list(records.read())

    assert records.num_records == 5
    assert [record.id for record in found] == [
        "a.tar/0000",
        "a.tar/0001",
        "a.tar/0002",
        "b/00.tar/0003",
        "b/00.tar/0004",
    ]
    assert [record.data for record in found] == encoded
    assert found[3].source == f"{tars / 'b' / '00.tar'}::0003.png"
    assert [record.position for record in found] == list(range(5))


@pytest.mark.parametrize(("start", "stop"), [(0, 2), (2, 4), (3, None), (4, 99), (5, None), (3, 3)])
def test_tars_read_a_range(tars, start, stop):
    records = open_records(str(tars))

    assert list(records.read(start, stop)) == list(records.read())[start:stop]


def test_tars_give_texts_classes_and_fields(tars):
    first = next(open_records(str(tars)).read())

    assert first.columns == {"caption": "number 0", "width": 40, "txt": "text", "cls": 0}


def test_tars_keep_the_columns_asked_for(tars):
    first = next(open_records(str(tars), columns=["cls", "caption"]).read())

    assert first.columns == {"cls": 0, "caption": "number 0"}


def test_tars_name_a_column_that_the_first_sample_lacks(tars):
    with pytest.raises(UserError, match=r"a\.tar::0000\.png has no column 'label'; choose from: caption, width, txt"):
        open_records(str(tars), columns=["label"])


def test_tar_alone_is_a_data_set(tars, encoded):
    records = open_records(str(tars / "a.tar"))

    assert [record.id for record in records.read()] == ["a.tar/0000", "a.tar/0001", "a.tar/0002"]


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_tar_with_folders_and_long_names_is_read(tmp_path, encoded, form):
    name = "deep/" * 30 + "x" * 120
    path = write_tar(tmp_path / "a.tar", [(f"./{name}.seg.PNG", encoded[0]), (f"./{name}.txt", "long")], form)

    (record,) = open_records(str(path)).read()

    assert record.id == f"a.tar/{name}"
    assert (record.data, record.columns) == (encoded[0], {"txt": "long"})


def test_tar_sample_without_a_picture_has_no_bytes(tmp_path, encoded):
    path = write_tar(tmp_path / "a.tar", [("0.png", encoded[0]), ("1.json", '{"status": "gone"}')])

    record = list(open_records(str(path)).read())[1]

    assert (record.id, record.data, record.source) == ("a.tar/1", b"", f"{path}::1")


def test_tar_leaves_out_what_belongs_to_no_sample(tmp_path, encoded):
    path = write_tar(tmp_path / "a.tar", [("README", "text"), ("._0.png", "x"), ("0.png", encoded[0])])

    assert [record.id for record in open_records(str(path)).read()] == ["a.tar/0"]


def test_tar_takes_the_kind_of_picture_asked_for(tmp_path, encoded):
    path = write_tar(tmp_path / "a.tar", [("0.input.png", encoded[0]), ("0.output.png", encoded[1])])

    (record,) = open_records(str(path), image_column="output.png").read()

    assert record.data == encoded[1]


def test_tar_with_several_pictures_a_sample_needs_a_kind(tmp_path, encoded):
    path = write_tar(tmp_path / "a.tar", [("0.input.png", encoded[0]), ("0.output.png", encoded[1])])

    with pytest.raises(UserError, match=r"sample 0 of .*a\.tar holds several pictures \(input\.png, output\.png\)"):
        open_records(str(path))


def test_tar_names_a_kind_that_is_not_there(tars):
    with pytest.raises(UserError, match=r"a\.tar::0000 has no 'webp'; name the kind of file that is the picture"):
        open_records(str(tars), image_column="webp")


@pytest.mark.parametrize(
    "members",
    [
        [("0.png", b"a"), ("1.png", b"b"), ("0.png", b"c")],
        [("0.png", b"a"), ("1.png", b"b"), ("0.txt", b"c")],
        [("0.png", b"a"), ("0.png", b"b")],
    ],
)
def test_tar_with_two_samples_of_one_name_is_rejected(tmp_path, members):
    path = write_tar(tmp_path / "a.tar", members)

    with pytest.raises(UserError, match=r"a\.tar holds two samples named 0, the second with 0\.(png|txt); rename one"):
        open_records(str(path))


@pytest.mark.parametrize("text", ["{", "[1]", "5", '"a"'])
def test_tar_names_fields_that_cannot_be_read(tmp_path, encoded, text):
    path = write_tar(tmp_path / "a.tar", [("0.png", encoded[0]), ("0.json", text)])

    with pytest.raises(UserError, match=r"json of sample 0 in .*a\.tar cannot be read: .*; mend it or leave it out"):
        open_records(str(path))


def test_tar_names_a_class_that_is_no_number(tmp_path, encoded):
    path = write_tar(tmp_path / "a.tar", [("0.png", encoded[0]), ("0.cls", "dog")])

    with pytest.raises(UserError, match=r"cls of sample 0 in .*a\.tar cannot be read: invalid literal"):
        open_records(str(path))


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda whole: b"no tar at all" * 100, r"cannot read the tar .*a\.tar: .*; write it anew, not compressed"),
        (lambda whole: gzip.compress(whole), r"cannot read the tar .*a\.tar: .*; write it anew, not compressed"),
        (lambda whole: whole[:3000], r"cannot read the tar .*a\.tar: unexpected end of data; write it anew"),
        (lambda whole: whole[:1024], r"a\.tar ends 512 bytes early; it is cut off or was changed"),
        (
            lambda whole: whole[:1024] + b"x" * 512 + whole[1536:],
            r"a\.tar is damaged at byte 1024, where it should end",
        ),
    ],
)
def test_tar_that_is_damaged_is_named(tars, damage, complaint):
    (tars / "a.tar").write_bytes(damage((tars / "a.tar").read_bytes()))

    with pytest.raises(UserError, match=complaint):
        open_records(str(tars))


def test_tars_without_samples_are_rejected(tmp_path):
    path = write_tar(tmp_path / "a.tar", [("README", "text")])

    with pytest.raises(UserError, match=r"a\.tar holds no samples; give tars with pictures in them"):
        open_records(str(path))


def test_tar_headers_are_not_read_again_for_the_next_range(tars, monkeypatch):
    opened = []
    monkeypatch.setattr(tarfile, "open", lambda *args, real=tarfile.open: opened.append(args) or real(*args))
    records = open_records(str(tars / "a.tar"))

    for start in range(3):
        list(records.read(start, start + 1))

    assert len(opened) == 1


def test_tar_that_vanished_after_opening_is_named(tars):
    records = open_records(str(tars))
    (tars / "a.tar").unlink()

    with pytest.raises(UserError, match=r"cannot read .*a\.tar: No such file or directory; check the path"):
        list(records.read())


def test_tar_that_changed_after_opening_is_named(tars, encoded):
    records = open_records(str(tars))
    write_tar(tars / "a.tar", [("0.png", encoded[0])])

    with pytest.raises(UserError, match=r"a\.tar was changed while it was read; run again"):
        list(records.read())
