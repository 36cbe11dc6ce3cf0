import itertools
import signal
import subprocess

import pytest
import torch

from sd_vae.data.config import DataConfig
from sd_vae.data.loader import training_loader
from sd_vae.data.sources import open_source
from sd_vae.errors import UserError


def take(folder, num_batches, *, num_workers=0, batch_size=3, start_method=None, size=16, **position):
    """The first batches of a fresh loader."""
    config = DataConfig(train=str(folder), size=size, num_workers=num_workers)
    loader = training_loader(open_source(str(folder)), config, batch_size=batch_size, seed=1, **position)
    loader.batches.multiprocessing_context = start_method
    return list(itertools.islice(loader, num_batches))


def joined(batches):
    """The stream of samples that some batches hold."""
    return [torch.cat([getattr(batch, name) for batch in batches]) for name in ("x", "epochs", "indices")]


def assert_equal_streams(ours, theirs):
    for a, b in zip(joined(ours), joined(theirs), strict=True):
        assert torch.equal(a, b)


def test_loader_yields_crops_with_addresses(folder):
    batch = take(folder, 1)[0]

    assert batch.x.shape == (3, 3, 16, 16)
    assert (batch.x.dtype, batch.epochs.dtype, batch.indices.dtype) == (torch.float32, torch.int64, torch.int64)
    assert batch.unreadable == []


def test_loader_gives_every_picture_once_an_epoch(folder):
    _, epochs, indices = joined(take(folder, 7))

    assert epochs.tolist() == [0] * 7 + [1] * 7 + [2] * 7
    assert [sorted(part) for part in indices.view(3, 7).tolist()] == [list(range(7))] * 3


def test_loader_crops_anew_in_every_epoch(folder):
    x, _, indices = joined(take(folder, 7))

    first, second = (x[p][indices[p] == 0] for p in (slice(0, 7), slice(7, 14)))

    assert not torch.equal(first, second)


@pytest.mark.parametrize("start", [1, 7, 20])
def test_loader_resumes_as_the_tail_of_the_uninterrupted_stream(folder, start):
    whole = take(folder, 10)

    tail = take(folder, 3, start=start)

    for a, b in zip(joined(tail), joined(whole), strict=True):
        assert torch.equal(a, b[start : start + 9])


@pytest.mark.parametrize("num_workers", [1, 2])
def test_loader_gives_the_same_bits_for_every_number_of_workers(folder, num_workers):
    assert_equal_streams(take(folder, 6, num_workers=num_workers), take(folder, 6))


def test_loader_works_with_spawned_workers(folder):
    assert_equal_streams(take(folder, 2, num_workers=1, start_method="spawn"), take(folder, 2))


@pytest.mark.parametrize("start", [0, 5])
def test_loader_deals_processes_what_one_would_see(folder, start):
    ranks = [take(folder, 4, batch_size=2, rank=rank, world_size=2, start=start) for rank in (0, 1)]
    alone = take(folder, 4, batch_size=4, start=start)

    dealt = [batch for step in zip(*ranks, strict=True) for batch in step]

    assert_equal_streams(dealt, alone)


def test_loader_does_not_depend_on_batch_size(folder):
    assert_equal_streams(take(folder, 6, batch_size=1), take(folder, 1, batch_size=6))


def test_loader_leaves_the_global_generator_alone(folder):
    state = torch.get_rng_state()

    take(folder, 2)

    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_loader_replaces_and_lists_unreadable_pictures(folder, num_workers):
    whole = take(folder, 3)
    (folder / "1.png").write_bytes((folder / "1.png").read_bytes()[:200])

    batches = take(folder, 3, num_workers=num_workers)

    assert_same_addresses(batches, whole)
    lines = [line for batch in batches for line in batch.unreadable]
    assert len(lines) == (joined(batches)[2] == 1).sum() >= 1
    assert all(f"cannot read the picture {folder}/1.png" in line for line in lines)
    untouched = joined(whole)[2] != 1
    assert torch.equal(joined(batches)[0][untouched], joined(whole)[0][untouched])


def assert_same_addresses(ours, theirs):
    for a, b in zip(joined(ours)[1:], joined(theirs)[1:], strict=True):
        assert torch.equal(a, b)


def test_loader_replaces_an_unreadable_picture_by_the_next(folder):
    (folder / "1.png").write_bytes(b"")
    (folder / "2.png").write_bytes(b"")
    blank = open_source(str(folder)).load(3)
    white = blank.point(lambda _: 255)
    white.save(folder / "4.png")  # the next in the order of paths

    x, _, indices = joined(take(folder, 7))

    for index in (1, 2, 3):
        assert (x[indices == index] == 1).all()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_loader_without_a_readable_picture_is_one_line(folder, num_workers):
    for path in folder.rglob("*.png"):
        path.write_bytes(b"text")

    with pytest.raises(UserError, match=r"none of the 7 pictures can be read; the first: cannot read .*") as caught:
        take(folder, 1, num_workers=num_workers)

    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_loader_workers_leave_interrupts_to_the_training_process(folder, number):
    config = DataConfig(train=str(folder), size=16, num_workers=1)
    loader = training_loader(open_source(str(folder)), config, batch_size=2, seed=1)
    batches = iter(loader.batches)
    next(batches)

    for worker in batches._workers:  # from another process, as clusters and torchrun do
        subprocess.run(["kill", f"-{int(number)}", str(worker.pid)], check=True)

    assert len([next(batches) for _ in range(8)]) == 8


def test_loader_workers_end_when_the_training_process_ends_them(folder):
    config = DataConfig(train=str(folder), size=16, num_workers=1)
    loader = training_loader(open_source(str(folder)), config, batch_size=2, seed=1)
    batches = iter(loader.batches)
    next(batches)

    batches._workers[0].terminate()
    batches._workers[0].join(60)

    assert batches._workers[0].exitcode == 0


def test_loader_works_with_fewer_pictures_than_a_batch(folder):
    batch = take(folder, 1, batch_size=20)[0]

    assert batch.epochs.tolist() == [0] * 7 + [1] * 7 + [2] * 6
