"""The few threads of the compiled kernels: errors, interruptions, counts."""

import threading
import time
from collections.abc import Iterator

import pytest
import torch

from sd_vae.ops import threads


@pytest.fixture(autouse=True)
def _two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_run_together_runs_each_part_once() -> None:
    seen: list[int] = []

    threads.run_together(seen.append)

    assert sorted(seen) == [0, 1]


@pytest.mark.parametrize("guilty", [0, 1])
def test_run_together_raises_after_everyone_is_done(guilty: int) -> None:
    done: list[int] = []

    def work(index: int) -> None:
        if index == guilty:
            raise ArithmeticError("half-way")
        time.sleep(0.1)
        done.append(index)

    with pytest.raises(ArithmeticError, match="half-way"):
        threads.run_together(work)

    assert done == [1 - guilty]


def test_run_together_waits_for_helpers_when_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    done, wait = threading.Event(), threads.wait
    interruptions = [KeyboardInterrupt, KeyboardInterrupt]

    def interrupted(pending: list[object]) -> None:
        if interruptions:
            raise interruptions.pop()
        wait(pending)  # type: ignore[arg-type]

    def work(index: int) -> None:
        if index == 1:
            time.sleep(0.1)
            done.set()

    monkeypatch.setattr(threads, "wait", interrupted)

    with pytest.raises(KeyboardInterrupt):
        threads.run_together(work)

    assert done.is_set()


def test_run_together_grows_with_the_number_of_threads() -> None:
    seen: list[int] = []
    threads.run_together(lambda _: None)
    torch.set_num_threads(4)

    threads.run_together(seen.append)

    assert sorted(seen) == [0, 1, 2, 3]
