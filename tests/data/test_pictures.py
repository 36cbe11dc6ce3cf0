import multiprocessing
import resource
import threading
from pathlib import Path

import pytest
import torch

from sd_vae.data.decoding import Reject, decode_picture
from sd_vae.data.geometry import PictureTransform, views
from sd_vae.data.pictures import Picture, picture_loader, prepare
from sd_vae.data.records import Record, open_records
from sd_vae.errors import UserError

TRANSFORM = PictureTransform(size=24, random_crops=2, flip=True)


def same(ours, theirs):
    if isinstance(ours, Reject) or isinstance(theirs, Reject):
        return ours == theirs
    return (
        (ours.position, ours.id, ours.sha256, ours.columns)
        == (theirs.position, theirs.id, theirs.sha256, theirs.columns)
        and [view.crop for view in ours.views] == [view.crop for view in theirs.views]
        and all(torch.equal(a.x, b.x) for a, b in zip(ours.views, theirs.views, strict=True))
    )


@pytest.fixture
def damaged(folder):
    """Seven files, of which the second is empty and the fifth is text."""
    (folder / "1.png").write_bytes(b"")
    (folder / "5.png").write_text("not a picture")
    return folder


def test_prepare_gives_the_views_of_a_record(encoded):
    record = Record(3, "a", "table::3", encoded[0], {"caption": "noise"})

    picture = prepare(record, TRANSFORM)

    decoded = decode_picture(encoded[0])
    assert (picture.position, picture.id, picture.source) == (3, "a", "table::3")
    assert (picture.sha256, picture.original_size) == (decoded.sha256, (32, 40))
    assert picture.columns == {"caption": "noise"}
    for ours, direct in zip(picture.views, views(decoded, TRANSFORM), strict=True):
        assert torch.equal(ours.x, direct.x)


@pytest.mark.parametrize(
    ("data", "transform", "reason"),
    [(b"", TRANSFORM, "empty"), (None, PictureTransform(size=64), "too-small")],
)
def test_prepare_rejects_with_the_address(encoded, data, transform, reason):
    record = Record(3, "a", "table::3", encoded[0] if data is None else data)

    reject = prepare(record, transform)

    assert (reject.reason, reject.position, reject.id, reject.source) == (reason, 3, "a", "table::3")


@pytest.mark.parametrize("is_picture", [True, False])
def test_prepare_makes_names_and_texts_unicode(encoded, is_picture):
    data = encoded[0] if is_picture else b""
    record = Record(0, "caf\udce9.png", "photos/caf\udce9.png", data, {"caption": "smile \ud83d", "label": 1})

    found = prepare(record, TRANSFORM)

    assert (found.id, found.source) == (r"caf\udce9.png", r"photos/caf\udce9.png")
    assert not is_picture or found.columns == {"caption": r"smile \ud83d", "label": 1}


def test_prepare_passes_the_options_of_decoding(encoded):
    reject = prepare(Record(0, "a", "a", encoded[0]), PictureTransform(size=24, max_pixels=1000))

    assert reject.reason == "too-large"


@pytest.mark.parametrize("draft", [False, True])
def test_prepare_decodes_reduced_only_on_request(folder, draft, monkeypatch):
    from PIL import JpegImagePlugin

    from sd_vae.images import open_image

    open_image(folder / "0.png").resize((800, 640)).save(folder / "large.jpg")
    asked = []
    monkeypatch.setattr(JpegImagePlugin.JpegImageFile, "draft", lambda self, mode, size: asked.append(size))

    picture = prepare(Record(0, "a", "a", (folder / "large.jpg").read_bytes()), PictureTransform(size=64, draft=draft))

    assert asked == ([(160, 128)] if draft else [])
    assert picture.views[0].resized_size == (64, 80)


def test_loader_gives_pictures_and_rejects_in_order(damaged):
    records = open_records(str(damaged))

    found = list(picture_loader(records, TRANSFORM, num_workers=0))

    assert [item.position for item in found] == list(range(7))
    assert [item.id for item in found if isinstance(item, Reject)] == ["1.png", "5.png"]
    assert all(same(item, prepare(record, TRANSFORM)) for item, record in zip(found, records.read(), strict=True))


@pytest.mark.parametrize(
    ("num_workers", "chunk_size", "prefetch_factor"), [(0, 1, 2), (1, 8, 2), (2, 1, 1), (2, 2, 4), (2, 3, 2)]
)
def test_loader_does_not_depend_on_its_workers(damaged, num_workers, chunk_size, prefetch_factor):
    records = open_records(str(damaged))
    expected = [prepare(record, TRANSFORM) for record in records.read()]

    found = picture_loader(
        records, TRANSFORM, num_workers=num_workers, chunk_size=chunk_size, prefetch_factor=prefetch_factor
    )

    assert all(same(ours, theirs) for ours, theirs in zip(found, expected, strict=True))


def test_loader_works_with_spawned_workers(damaged):
    records = open_records(str(damaged))

    found = list(picture_loader(records, TRANSFORM, num_workers=1, multiprocessing_context="spawn"))

    assert all(same(item, prepare(record, TRANSFORM)) for item, record in zip(found, records.read(), strict=True))


@pytest.mark.parametrize(("start", "stop"), [(2, 5), (3, None), (0, 0), (7, None), (5, 99)])
def test_loader_reads_a_range(damaged, start, stop):
    records = open_records(str(damaged))

    found = list(picture_loader(records, TRANSFORM, start=start, stop=stop, num_workers=1, chunk_size=2))

    assert [item.position for item in found] == list(range(7))[start:stop]


def test_loader_gives_views_of_many_sizes(folder):
    from sd_vae.images import open_image

    open_image(folder / "0.png").resize((70, 20)).save(folder / "0.png")

    first, second, *_ = picture_loader(open_records(str(folder)), PictureTransform(native=True), num_workers=1)

    assert first.views[0].x.shape == (3, 16, 64)
    assert second.views[0].x.shape == (3, 32, 40)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_loader_gives_what_comes_before_a_file_that_vanished(folder, num_workers):
    records = open_records(str(folder))
    (folder / "4.png").unlink()
    found = []

    with pytest.raises(UserError, match=r"cannot read .*4\.png: No such file or directory; check the path") as caught:
        for picture in picture_loader(records, TRANSFORM, num_workers=num_workers, chunk_size=2):
            found.append(picture.position)

    assert "\n" not in str(caught.value)
    assert found == [0, 1, 2]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_loader_passes_on_what_the_records_complain_of(folder, num_workers):
    class Broken:
        def read(self, start, stop):
            yield from open_records(str(folder)).read(0, 2)
            raise UserError("the tar is damaged; write it anew.")

    with pytest.raises(UserError, match=r"^the tar is damaged; write it anew\.$"):
        list(picture_loader(Broken(), TRANSFORM, num_workers=num_workers, chunk_size=1))


def test_loader_that_is_left_early_leaves_nothing_behind(folder):
    found = picture_loader(open_records(str(folder)), TRANSFORM, num_workers=2, chunk_size=1)
    next(found)

    found.close()

    assert not multiprocessing.active_children()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("read-ahead")]


def test_loader_does_not_touch_the_global_generator(folder):
    before = torch.get_rng_state()

    list(picture_loader(open_records(str(folder)), TRANSFORM, num_workers=2))

    assert torch.equal(torch.get_rng_state(), before)


def test_loader_reads_no_further_ahead_than_it_says(folder):
    reached = []

    class Watched:
        def read(self, start, stop):
            data = (folder / "0.png").read_bytes()
            for position in range(1000):
                reached.append(position)
                yield Record(position, str(position), "", data)

    next(picture_loader(Watched(), TRANSFORM, num_workers=2, chunk_size=4, prefetch_factor=2))

    # 2 workers x 2 chunks under way, 1 taken, 4 chunks and one in hand read ahead
    assert len(reached) <= (2 * 2 + 1 + 4 + 1) * 4


@pytest.mark.gpu
def test_loader_pins_pixels_for_a_gpu(folder):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device: page-locked memory is made by its driver")

    picture = next(picture_loader(open_records(str(folder)), TRANSFORM, num_workers=1, pin_memory=True))

    assert all(view.x.is_pinned() for view in picture.views)


def resident_mib():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc: memory is read from it")
@pytest.mark.parametrize("num_workers", [0, 2])
def test_loader_memory_stays_flat_over_10_000_pictures(encoded, num_workers):
    class Many:
        def read(self, start, stop):
            yield from (Record(position, str(position), "", encoded[position % 5]) for position in range(10_000))

    found = picture_loader(Many(), PictureTransform(size=32), num_workers=num_workers, chunk_size=50)
    for picture in found:
        assert isinstance(picture, Picture)
        if picture.position == 1999:
            early = resident_mib()
    late = resident_mib()

    # 8,000 pictures are 24 MB of pixels and 31 MB of files; 0.1 MiB was the most that was seen
    assert late - early < 8
