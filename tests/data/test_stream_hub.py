"""Streams without an index, and data that stalls."""

import logging
import time

import pytest
from stream_cases import batches, grey_png, samples

from sd_vae.data import open_images, training_loader
from sd_vae.data import stream as stream_module
from sd_vae.data.config import DataConfig
from sd_vae.data.records import Record
from sd_vae.data.stream import TrainingSource
from sd_vae.data.stream_hub import StreamImages
from sd_vae.errors import UserError


class Stream:
    """Records that fail as they are told to, each time once."""

    spec = "hf://stream"
    num_records = None

    def __init__(self, size, breaks=(), stalls=()):
        self.size, self.breaks, self.stalls = size, set(breaks), set(stalls)
        self.opened = []

    def read(self, start=0, stop=None):
        self.opened.append(start)
        for n in range(start, self.size):
            if n in self.breaks:
                self.breaks.remove(n)
                raise UserError("cannot read hf://stream: 503; check the network.")
            if n in self.stalls:
                self.stalls.remove(n)
                time.sleep(3)
            yield Record(n, str(n), f"hf://stream::{n}", grey_png(n) if n != 5 else b"broken")


def stream(records, **changes):
    settings = {"seed": 1, "number": 0, "window": 4, "timeout_s": 0.5, "retries": 2, "pause_s": 0.0}
    return StreamImages(records, **settings | changes)


def test_a_stream_gives_every_record_once_an_epoch_in_windows():
    images = stream(Stream(10))

    found = [(epoch, record.position) for epoch, record in map(images.at, range(20))]

    assert sorted(found) == [(epoch, n) for epoch in (0, 1) for n in range(10)]
    assert sorted(n for _, n in found[4:8]) == [4, 5, 6, 7]
    assert [n for _, n in found[:10]] != list(range(10))


@pytest.mark.parametrize("start", [1, 4, 9, 10, 13, 37])
def test_a_stream_goes_on_where_it_was(start):
    images = stream(Stream(10))
    whole = [(epoch, record.position) for epoch, record in map(images.at, range(45))]
    again = stream(Stream(10))

    assert [(epoch, record.position) for epoch, record in map(again.at, range(start, 45))] == whole[start:]


def test_a_stream_that_breaks_off_is_opened_again_where_it_stood(caplog):
    records = Stream(10, breaks=(0, 6))
    images = stream(records)

    with caplog.at_level(logging.WARNING):
        found = sorted(images.at(position)[1].position for position in range(10))

    assert found == list(range(10))
    assert (records.opened[:3], images.num_reopened) == ([0, 0, 6], 2)
    assert "is opened again at picture 6: cannot read hf://stream: 503" in caplog.text


def test_a_stream_that_stalls_is_opened_again():
    records = Stream(10, stalls=(3,))
    images = stream(records)
    begin = time.perf_counter()

    assert sorted(images.at(position)[1].position for position in range(10)) == list(range(10))
    assert time.perf_counter() - begin < 2.5


def test_a_stream_that_stays_away_ends_the_run():
    class Away(Stream):
        def read(self, start=0, stop=None):
            raise UserError("cannot read hf://stream: no route; check the network.")
            yield

    with pytest.raises(UserError, match=r"opened 3 times in vain at picture 0: .*no route.*--resume"):
        stream(Away(1)).at(0)


def test_a_defect_in_a_stream_is_not_retried():
    class Defect(Stream):
        def read(self, start=0, stop=None):
            raise ZeroDivisionError
            yield

    with pytest.raises(ZeroDivisionError):
        stream(Defect(1)).at(0)


def test_an_empty_stream_is_refused():
    with pytest.raises(UserError, match="hf://stream holds no records"):
        stream(Stream(0)).at(0)


def test_a_stream_that_shrank_is_refused():
    records = Stream(10)
    images = stream(records)
    images.at(9)
    records.size = 0

    with pytest.raises(UserError, match="held 10 records before and has fewer now"):
        images.at(10)


def test_a_stream_without_a_weight_among_others_is_refused(tars):
    with pytest.raises(UserError, match="a stream has no known size; say what share of the samples"):
        TrainingSource([open_images(str(tars))], [stream(Stream(5))], [], 0, 0)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_streamed_source_trains_and_replaces_what_is_unreadable(monkeypatch, num_workers):
    monkeypatch.setattr(stream_module, "open_records", lambda *_, **__: Stream(8))

    found = batches("hf://stream", 4, batch_size=4, streaming=True, num_workers=num_workers)

    assert sorted(samples(found)) == [(epoch, n) for epoch in (0, 1) for n in range(8)]
    lines = [line for batch in found for line in batch.unreadable]
    assert len(lines) == 2
    assert all("hf://stream::5" in line for line in lines)


def test_processes_share_a_stream(monkeypatch):
    monkeypatch.setattr(stream_module, "open_records", lambda *_, **__: Stream(40))
    alone = batches("hf://stream", 5, batch_size=8, streaming=True)

    ranks = [
        batches("hf://stream", 5, batch_size=4, streaming=True, position={"rank": r, "world_size": 2}) for r in (0, 1)
    ]

    assert samples([batch for step in zip(*ranks, strict=True) for batch in step]) == samples(alone)


class Slow:
    spec = "slow"

    def __len__(self):
        return 4

    def name(self, index):
        return str(index)

    def load(self, index):
        time.sleep(30)


def test_workers_that_stall_end_the_run_with_a_line():
    config = DataConfig(train="slow", size=16, num_workers=1, timeout_s=1.0)
    loader = training_loader(Slow(), config, batch_size=2, seed=1)
    begin = time.perf_counter()

    with pytest.raises(UserError, match=r"the workers gave no batch for 1 s; check the disk or the network"):
        next(iter(loader))

    assert time.perf_counter() - begin < 20


def test_a_defect_in_the_loader_is_not_taken_for_a_stall(folder, monkeypatch):
    config = DataConfig(train=str(folder), size=16, num_workers=0)
    loader = training_loader(open_images(str(folder)), config, batch_size=2, seed=1)
    monkeypatch.setattr(loader, "batches", iter_of(RuntimeError("out of sorts")))

    with pytest.raises(RuntimeError, match="out of sorts"):
        next(iter(loader))


def iter_of(error):
    def fail():
        raise error
        yield

    return fail()
