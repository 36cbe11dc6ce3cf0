"""`sd-vae encode`: one process or two, stopped and gone on with, and what it says."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from sd_vae.cli import main

ENCODE = "encode start photos --size 16 --shard-items 1 --workers 0"

# What torchrun starts: the command, then the number of processes as each of them saw it.
WORKER = """
import os, sys
from pathlib import Path
import torch.distributed
from sd_vae.cli import main
from sd_vae.latents import share
plain = share.encode_share
def counted(encoder, mine, *arguments, **options):
    rank, count = torch.distributed.get_rank(), torch.distributed.get_world_size()
    Path(f"rank-{rank}").write_text(f"{count} {mine.num_records}")
    return plain(encoder, mine, *arguments, **options)
import sd_vae.latents.encode
sd_vae.latents.encode.encode_share = counted
sys.exit(main(sys.argv[1:]))
"""


def contents(folder: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}


@pytest.mark.usefixtures("place")
def test_encode_command_prints_what_is_in_the_store(capsys) -> None:
    assert main(f"{ENCODE} --out store --flip".split()) == 0

    output = capsys.readouterr()
    assert output.err.startswith("encoding photos in 1 process on cpu, 1 pictures at once in each.\n")
    assert "latents   8 (8 of 8x8)" in output.out
    assert "rejected  0\n" in output.out


def test_encode_command_prints_one_json_object_with_rejects(place: Path, capsys) -> None:
    (place / "photos" / "9.png").write_text("no picture")

    assert main(f"{ENCODE} --out store --content sample --seed 7 --dtype bfloat16 --json".split()) == 0

    done = json.loads(capsys.readouterr().out)
    assert (done["num_records"], done["num_latents"], done["num_rejects"]) == (5, 4, 1)
    assert (done["rejects"], done["content"], done["dtype"]) == ({"not-a-picture": 1}, "sample", "bfloat16")
    assert json.loads((place / "store" / "store.json").read_text())["seed"] == 7


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("encode start photos", "missing: --out PATH"),
        ("encode start photos --out o", "size is missing, give the side of the crops in pixels, or choose native"),
        ("encode start photos --out o --native --size 8", "native keeps every size"),
        ("encode start photos --out o --size 15", "size is 15, it must be a multiple of factor 2"),
        ("encode start photos --out o --size 16 --parallel 0", "num_parallel is 0, it must be at least 1"),
        ("encode start photos --out o --size 16 --shard-items 0", "shard_items is 0, it must be at least 1"),
        ("encode start photos --out o --size 16 --dtype int8", "--dtype is 'int8', it must be one of: float16"),
        ("encode start photos --out o --size 16 --engine spark", "--engine is 'spark', it must be one of: local"),
        ("encode start photos --out o --size 16 --columns caption", "photos has no column 'caption'"),
        ("encode start photos --out o --size 16 --streaming", "photos lies on this machine and is never downloaded"),
        ("encode start empty --out o --size 16", "empty holds no pictures"),
        ("encode start unreadable --out o --size 16", "none of the 1 records of unreadable could be encoded"),
        ("encode start mixed --out o --size 16 --strict", "mixed/0.png is not-a-picture"),
        ("encode nan photos --out o --size 16", "not finite"),
        ("encode start photos --out photos --size 16", "photos is not a latent store"),
    ],
)
def test_encode_command_names_what_is_wrong(arguments: str, message: str, capsys) -> None:
    assert main(arguments.split()) == 2

    assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.usefixtures("place")
def test_encode_command_refuses_other_arguments_on_a_store(capsys) -> None:
    main(f"{ENCODE} --out store".split())

    assert main(f"{ENCODE} --out store --size 8 --dtype float32".split()) == 2

    error = capsys.readouterr().err
    assert "dtype is 'float32', there 'float16'" in error
    assert "transform.size is 8, there 16" in error


@pytest.mark.slow  # 30 s: three processes start
def test_encode_command_shares_the_work_between_processes(place: Path) -> None:
    (place / "photos" / "1b.png").write_text("no picture")
    (place / "worker.py").write_text(WORKER)
    assert main(f"{ENCODE} --out one".split()) == 0
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "worker.py"]

    done = subprocess.run(
        [*launch, *ENCODE.split(), "--out", "two"], capture_output=True, text=True, check=False, timeout=300
    )

    assert done.returncode == 0, done.stderr
    assert [Path(f"rank-{rank}").read_text() for rank in (0, 1)] == ["2 2", "2 3"]
    first = next(line for line in done.stderr.splitlines() if line.startswith("encoding"))
    assert first == "encoding photos in 2 processes on cpu, 1 pictures at once in each."
    assert contents("two") == contents("one")


def add_photos(place: Path, count: int) -> None:
    for number in range(count):
        (place / "photos" / f"more-{number}.png").write_bytes((place / "photos" / "0.png").read_bytes())


def wait_for_a_shard(place: Path) -> None:
    deadline = time.monotonic() + 120
    while not list(place.glob("store/shard-*.json")) and time.monotonic() < deadline:
        time.sleep(0.005)


def test_encode_command_stops_at_ctrl_c_and_goes_on(place: Path, capsys) -> None:
    def press() -> None:
        wait_for_a_shard(place)
        os.kill(os.getpid(), signal.SIGINT)

    add_photos(place, 40)
    arguments = f"{ENCODE} --workers 1 --out store".split()
    finger = threading.Thread(target=press, daemon=True)
    finger.start()

    stopped = main(arguments)
    finger.join()
    error = capsys.readouterr().err
    left_behind = multiprocessing.active_children()
    done = main([*arguments, "--json"])

    assert (stopped, left_behind, done) == (130, [], 0)
    assert error.splitlines()[-1].startswith("stopped; the finished shards stay in store, and the same command goes on")
    summary = json.loads(capsys.readouterr().out)
    assert 0 < summary["num_done"] < summary["num_records"] == 44


@pytest.mark.slow  # 20 s: a process of its own starts
def test_encode_command_goes_on_after_kill_9(place: Path, capsys) -> None:
    add_photos(place, 200)
    arguments = f"{ENCODE} --workers 1 --out store".split()
    command = [sys.executable, "-m", "sd_vae", *arguments]

    with subprocess.Popen(command, stderr=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"}) as running:
        wait_for_a_shard(place)
        running.kill()
        running.wait(timeout=60)
    num_finished = len(list(place.glob("store/shard-*.json")))
    assert main([*arguments, "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    main(f"{ENCODE} --out whole".split())

    assert running.returncode == -signal.SIGKILL
    assert 0 < num_finished < 204
    assert summary["num_done"] == 204 - num_finished
    assert contents("store") == contents("whole")
