"""Tars by index: what is missing, damaged, or changes; several sources together."""

import itertools
import logging
import os
from pathlib import Path

import pytest
import torch
from stream_cases import batches, grey_png, samples, source_of, write_tar

from sd_vae.data import open_images, open_training_source, stream_tars, training_loader
from sd_vae.data import stream as stream_module
from sd_vae.data.config import DataConfig
from sd_vae.data.stream import TrainingSource
from sd_vae.errors import UserError


def test_tars_give_every_picture_once_an_epoch(tars):
    found = batches(str(tars), 6)

    assert sorted(samples(found)) == [(epoch, index) for epoch in (0, 1) for index in range(9)]
    greys = torch.cat([batch.x for batch in found])[:, 0, 8, 8]
    numbers = torch.cat([batch.indices for batch in found])
    torch.testing.assert_close(greys, numbers / 127.5 - 1, rtol=0, atol=1e-6)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_tars_resume_as_the_tail_of_the_uninterrupted_run(tars, num_workers):
    whole = batches(str(tars), 8, num_workers=num_workers)

    tail = batches(str(tars), 5, num_workers=num_workers, position={"start": 9})

    assert samples(tail) == samples(whole)[9:]
    assert torch.equal(torch.cat([b.x for b in tail]), torch.cat([b.x for b in whole])[9:])


def test_another_number_of_processes_goes_on_without_loss_or_repetition(tars):
    # three processes for two steps of one picture, then two processes
    before = [batches(str(tars), 2, batch_size=1, position={"rank": r, "world_size": 3}) for r in range(3)]
    after = [batches(str(tars), 6, batch_size=1, position={"rank": r, "world_size": 2, "start": 6}) for r in range(2)]

    seen = [pair for ranks in (before, after) for rank in ranks for pair in samples(rank)]

    assert sorted(seen) == [(0, index) for index in range(9)] + [
        (1, index) for index in sorted(index for epoch, index in seen if epoch == 1)
    ]
    assert len(seen) == len(set(seen)) == 18


def test_tars_of_a_range_are_found(tars):
    assert len(open_images(str(tars / "{00..01}.tar"))) == 7
    assert len(open_images(str(tars / "02.tar"))) == 2


def test_image_column_names_the_ending_of_the_pictures(tars):
    write_tar(tars / "03.tar", [("a.png", grey_png(1)), ("a.mask.PNG", grey_png(2)), ("b.jpg", grey_png(3))])

    assert len(open_images(str(tars / "03.tar"))) == 3
    assert len(open_images(str(tars / "03.tar"), image_column="jpg")) == 1


def test_a_missing_tar_of_a_range_is_left_out_and_said(tars, caplog):
    (tars / "01.tar").unlink()

    with caplog.at_level(logging.WARNING):
        source = source_of(str(tars / "{00..02}.tar"))

    assert len(source) == 5
    assert "cannot read" in source.problems[0]
    assert "01.tar" in caplog.text


def test_a_tar_that_disappears_costs_its_own_pictures(tars):
    config = DataConfig(train=str(tars), size=16, num_workers=0)
    source = open_training_source(config, 1)
    (tars / "01.tar").unlink()

    found = list(itertools.islice(training_loader(source, config, batch_size=9, seed=1), 1))

    assert found[0].x.shape == (9, 3, 16, 16)
    assert any("01.tar" in line for line in found[0].unreadable)
    stand_ins = {
        round(float((x[0, 8, 8] + 1) * 127.5)) for x, n in zip(found[0].x, found[0].indices, strict=True) if 3 <= n < 7
    }
    assert stand_ins <= {0, 1, 2, 7, 8}


def test_what_stands_in_for_a_missing_tar_is_not_always_the_same(tmp_path):
    write_tar(tmp_path / "a.tar", [(f"{n}.png", grey_png(n)) for n in range(40)])
    write_tar(tmp_path / "b.tar", [(f"{n}.png", grey_png(100 + n)) for n in range(40)])
    source = source_of(str(tmp_path))
    (tmp_path / "a.tar").unlink()

    found = set()
    for index in range(30):
        for candidate in source.candidates(0, index):
            if candidate >= 40:
                found.add(candidate)
                break

    assert len(found) > 10


def test_a_damaged_tar_gives_what_comes_before(tars):
    whole = (tars / "01.tar").read_bytes()
    (tars / "01.tar").write_bytes(whole[: len(whole) // 3])

    source = source_of(str(tars))

    assert 5 < len(source) < 9
    assert "01.tar" in source.problems[0]


def test_an_overwritten_header_is_damage_and_not_the_end(tars):
    index = stream_tars.index_tar(str(tars / "01.tar"))
    with (tars / "01.tar").open("r+b") as file:
        file.seek(int(index.offsets[2]) - 512)
        file.write(b"\xff" * 512)

    found = stream_tars.index_tar(str(tars / "01.tar"))

    assert len(found.offsets) == 2
    assert "is damaged at byte" in found.problem


def test_a_name_is_that_of_the_member(tars):
    images = open_images(str(tars))

    assert images.name(3) == f"{tars / '01.tar'}::003.png"
    (tars / "01.tar").unlink()
    assert images.name(3).endswith(f"byte {images._offsets[3]}")


def test_tars_without_pictures_are_refused(tmp_path):
    write_tar(tmp_path / "a.tar", [("a.txt", b"text")])
    (tmp_path / "b.tar").write_bytes(b"no tar")

    with pytest.raises(UserError, match=r"the 1 tars of .*a.tar hold no pictures; give tars that do"):
        open_images(str(tmp_path / "a.tar"))
    with pytest.raises(UserError, match=r"hold no pictures; the first: cannot read all of .*b.tar"):
        open_images(str(tmp_path / "b.tar"))
    with pytest.raises(UserError, match=r"hold no members that end in .gif"):
        open_images(str(tmp_path / "a.tar"), image_column="gif")


def test_a_folder_of_tars_and_pictures_is_a_guess(tars):
    (tars / "a.png").write_bytes(grey_png(1))

    with pytest.raises(UserError, match="holds 3 tars and 1 pictures or parquet files, and which to use is a guess"):
        open_images(str(tars))


def test_a_range_that_counts_down_is_refused(tars):
    with pytest.raises(UserError, match=r"counts from 9 to 0; write the smaller number first"):
        open_images(str(tars / "{9..0}.tar"))


def test_the_index_is_kept_until_the_tar_changes(tars, monkeypatch):
    scanned = []
    scan = stream_tars.index_tar
    monkeypatch.setattr(
        stream_tars, "index_tar", lambda tar, *others: scanned.append(Path(tar).name) or scan(tar, *others)
    )

    for _ in range(2):
        assert len(open_images(str(tars))) == 9
    write_tar(tars / "02.tar", [("a.png", grey_png(1))])
    os.utime(tars / "02.tar", ns=(1, 1))

    assert len(open_images(str(tars))) == 8
    assert scanned == ["00.tar", "01.tar", "02.tar", "02.tar"]


def test_a_damaged_index_is_made_anew(tars):
    import datasets

    open_images(str(tars))
    for path in (datasets.config.HF_DATASETS_CACHE / "sd-vae-tar-index").iterdir():
        path.write_bytes(path.read_bytes()[:50])

    assert len(open_images(str(tars))) == 9


def test_an_index_that_cannot_be_kept_is_a_warning(tars, tmp_path, monkeypatch, caplog):
    import datasets

    (tmp_path / "file").write_text("")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "file")

    with caplog.at_level(logging.WARNING):
        assert len(open_images(str(tars))) == 9

    assert "is not kept" in caplog.text


def test_sources_are_mixed_by_weight(tars, folder):
    found = samples(batches((str(tars), str(folder)), 100, batch_size=4, weights=(3.0, 1.0)))

    assert sum(index >= stream_module.NUMBERS for _, index in found) == pytest.approx(100, abs=30)
    assert {index - stream_module.NUMBERS for _, index in found if index >= stream_module.NUMBERS} == set(range(7))


def test_sources_without_weights_are_mixed_by_size(tars, folder):
    source = source_of((str(tars), str(folder)))

    found = [source.address(sample)[1] for sample in range(1600)]

    assert sum(index < stream_module.NUMBERS for index in found) == pytest.approx(900, abs=40)


def test_weights_must_fit_the_sources(tars):
    with pytest.raises(UserError, match=r"data.train names 1 sources and data.weights 2; give one each"):
        TrainingSource([open_images(str(tars))], [], [1.0, 2.0], 0, 0)
