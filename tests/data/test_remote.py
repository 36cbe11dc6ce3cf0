"""Tars behind a web server on this machine: read in parts, asked for again, never waited for without end."""

import itertools
import logging
import pickle
import socket
import time
import types

import pytest
import torch
from stream_cases import batches, grey_png, samples, write_tar
from tar_server import serve

from sd_vae.data import open_images, open_training_source, remote, training_loader
from sd_vae.data.config import DataConfig
from sd_vae.data.remote import RemoteFiles, without_secrets
from sd_vae.errors import UnreachableError, UserError


@pytest.fixture
def server(tars):
    with serve(tars) as running:
        yield running


def files(**changes):
    return RemoteFiles(**{"timeout_s": 0.5, "retries": 2, "pause_s": 0.0} | changes)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_remote_tars_give_what_the_same_tars_here_give(server, tars, num_workers):
    here = batches(str(tars / "{00..02}.tar"), 6)

    there = batches(server.url + "/{00..02}.tar", 6, num_workers=num_workers)

    assert samples(there) == samples(here)
    assert all(torch.equal(ours.x, theirs.x) for ours, theirs in zip(there, here, strict=True))
    assert sum(batch.num_retries for batch in there) == 0


def test_a_remote_picture_is_one_request(server):
    images = open_images(server.url + "/01.tar", files=files())
    server.counts.clear()

    images.load(2)

    assert server.counts == {"01.tar": 1}


def test_the_index_of_a_remote_tar_is_kept_until_it_changes(server, tars):
    url = server.url + "/02.tar"
    open_images(url, files=files())
    server.counts.clear()

    assert len(open_images(url, files=files())) == 2
    assert server.counts == {"02.tar": 1}  # has it changed?
    write_tar(tars / "02.tar", [(f"{n}.png", grey_png(n)) for n in range(5)])
    assert len(open_images(url, files=files())) == 5


@pytest.mark.parametrize("trouble", ["stall", "half", "cut", 503, 429])
def test_what_passes_is_asked_for_again_and_counted(server, caplog, trouble):
    reader = files()
    images = open_images(server.url + "/01.tar", files=reader)
    server.trouble = [trouble, trouble]
    begin = time.perf_counter()

    with caplog.at_level(logging.WARNING):
        image = images.load(0)

    assert image.getpixel((0, 0)) == (3, 3, 3)
    assert (images.num_retries, caplog.text.count("01.tar is asked for again: ")) == (2, 2)
    assert time.perf_counter() - begin < 20


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_stalled_network_ends_the_run_with_a_line_and_not_the_pictures(server, num_workers):
    source = server.url + "/{00..02}.tar"
    batches(source, 1)  # the index is kept
    server.trouble, server.troubled = ["stall"] * 1000, "01.tar"
    begin = time.perf_counter()

    with pytest.raises(UserError, match=r"01.tar was asked for 2 times in vain: no byte for 0.5 s; check the network"):
        batches(source, 6, num_workers=num_workers, timeout_s=2.0, retries=1)

    assert time.perf_counter() - begin < 40


def test_retries_of_workers_are_counted_in_their_batches(server):
    source = open_training_source(DataConfig(train=server.url + "/{00..02}.tar", size=16), 1)
    server.trouble = [503, 503, "cut"]
    config = DataConfig(train="tars", size=16, num_workers=1)

    found = list(itertools.islice(training_loader(source, config, batch_size=9, seed=1), 1))

    assert found[0].num_retries == 3
    assert found[0].unreadable == []


def test_a_remote_tar_that_is_missing_is_left_out_and_said(server, tars, caplog):
    (tars / "01.tar").unlink()

    with caplog.at_level(logging.WARNING):
        images = open_images(server.url + "/{00..02}.tar", files=files())

    assert len(images) == 5
    assert "01.tar: 404 Not Found; check the address" in caplog.text


def test_a_remote_tar_that_disappears_costs_its_own_pictures(server, tars):
    source = server.url + "/{00..02}.tar"
    images = open_images(source, files=files())
    (tars / "01.tar").unlink()

    with pytest.raises(UserError, match=r"cannot read .*01.tar: 404 Not Found; check the address"):
        images.load(3)
    assert images.load(0).size == (20, 18)


def test_a_remote_source_that_disappears_ends_the_run_after_some_requests(server, tars):
    write_tar(tars / "03.tar", [(f"{n}.png", grey_png(1)) for n in range(200)])
    config = DataConfig(train=server.url + "/03.tar", size=16, num_workers=0)
    source = open_training_source(config, 1)
    server.counts.clear()
    (tars / "03.tar").unlink()

    with pytest.raises(UserError, match=r"none of the .* pictures can be read; the first: cannot read .*03.tar: 404"):
        next(iter(training_loader(source, config, batch_size=1, seed=1)))

    assert server.counts["03.tar"] == 40


def test_a_server_without_parts_is_refused(server):
    server.gives_parts = False

    with pytest.raises(UserError, match=r"gives whole files and no parts of them \(range requests\); download it"):
        open_images(server.url + "/01.tar", files=files())


def test_an_address_that_may_not_be_read_is_not_asked_for_again(server):
    server.trouble = [403]

    with pytest.raises(UnreachableError, match=r"01.tar was asked for 1 times in vain: 403 Forbidden"):
        open_images(server.url + "/01.tar", files=files())


def test_a_host_that_is_not_there_is_one_line():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    with pytest.raises(UnreachableError, match=r"was asked for 3 times in vain: \[Errno 111\] Connection refused"):
        open_images(f"http://127.0.0.1:{port}/a.tar", files=files())


def test_a_remote_file_that_is_cut_off_is_one_line(server):
    with pytest.raises(UserError, match=r"01.tar ends 90 bytes early; it is cut off or was changed"):
        files().read(server.url + "/01.tar", files().state(server.url + "/01.tar").size - 10, 100)


def test_a_remote_tar_that_is_cut_off_gives_what_comes_before(server, tars):
    whole = (tars / "01.tar").read_bytes()
    (tars / "01.tar").write_bytes(whole[: len(whole) // 3])

    images = open_images(server.url + "/01.tar", files=files())

    assert 0 < len(images) < 4
    assert "01.tar ends" in images.problems[0]
    assert images.load(0).size == (20, 18)


def test_a_part_beyond_the_end_is_one_line(server):
    with pytest.raises(UserError, match=r"01.tar ends before byte 1000000; it is cut off or was changed"):
        files().read(server.url + "/01.tar", 1_000_000, 1)


def test_a_file_of_unknown_size_is_refused(server, monkeypatch):
    answer = types.SimpleNamespace(headers={"Content-Range": "bytes 0-0/*"})
    monkeypatch.setattr(RemoteFiles, "_ask", lambda *_: answer)

    with pytest.raises(UserError, match=r"01.tar has no known size; download it and name the folder"):
        files().state(server.url + "/01.tar")


def test_an_address_of_something_else_is_refused():
    with pytest.raises(UserError, match=r"https://host/a.zip is no tar; of the web, name tars, or download it"):
        open_images("https://me:secret@host/a.zip?signature=secret")


def test_messages_hold_no_secrets():
    assert without_secrets("https://me:word@host:8/a/{0..3}.tar?sig=x#y") == "https://host:8/a/{0..3}.tar"


def test_a_signed_address_is_read_whole_and_named_without_its_signature(server):
    images = open_images(server.url + "/01.tar?signature=secret", files=files())

    assert images.load(0).size == (20, 18)
    assert images.name(0) == f"{server.url}/01.tar::003.png"


def test_a_reader_goes_to_workers(server):
    reader = files()
    reader.state(server.url + "/01.tar")

    again = pickle.loads(pickle.dumps(reader))  # noqa: S301

    assert again.state(server.url + "/01.tar") == reader.state(server.url + "/01.tar")


def test_pauses_grow_and_stay_bounded(monkeypatch):
    slept = []
    monkeypatch.setattr(remote.time, "sleep", slept.append)

    for tries in (1, 2, 3, 6, 1000):
        remote.pause(1.0, tries)

    assert slept == [1.0, 2.0, 4.0, 30.0, 30.0]
