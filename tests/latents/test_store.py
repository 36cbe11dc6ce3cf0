"""A store in the making: begun, gone on with, killed, made by many processes, refused."""

import errno
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import synthetic_store as synthetic
from synthetic_store import NUM_RECORDS, contents, describe, fill, item, moments_of, reject

from sd_vae.errors import UserError
from sd_vae.latents import LatentStore, Numerics

SCRIPT = synthetic.__file__
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def test_store_has_these_files(store_folder: Path) -> None:
    shards = [f"shard-0000{k}.{suffix}" for k in range(3) for suffix in ("arrow", "json", "safetensors")]

    assert sorted(contents(store_folder)) == ["manifest.json", "rejects.jsonl", *shards, "store.json"]


def test_store_counts(store_folder: Path) -> None:
    manifest = LatentStore.open(store_folder).manifest()

    assert (manifest.num_records, manifest.num_items, manifest.num_rejects) == (10, 9, 1)
    assert manifest.sizes == {"2x2": 7, "2x4": 2}
    assert manifest.columns == ("caption", "label")
    assert manifest.rounding["mean"].count == 4 * (7 * 4 + 2 * 8)
    assert manifest.rounding["mean"].max == max(record.rounding["mean"].max for record in manifest.shards)


def test_store_is_made_twice_with_the_same_bytes(store_folder: Path, tmp_path: Path) -> None:
    synthetic.make(tmp_path / "again")

    assert contents(tmp_path / "again") == contents(store_folder)


def test_store_does_not_depend_on_the_order_of_its_shards(store_folder: Path, tmp_path: Path) -> None:
    store = LatentStore.create(tmp_path / "backwards", describe())

    fill(store, store.unfinished(NUM_RECORDS)[::-1])
    store.finish(NUM_RECORDS)

    assert contents(store.folder) == contents(store_folder)


def test_store_of_two_processes_is_that_of_one(store_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "merged"
    processes = [subprocess.Popen([sys.executable, SCRIPT, folder, str(rank), "2"], env=ENVIRONMENT) for rank in (0, 1)]

    codes = [process.wait(timeout=60) for process in processes]
    LatentStore.open(folder).finish(NUM_RECORDS)

    assert codes == [0, 0]
    assert contents(folder) == contents(store_folder)


@pytest.fixture(scope="session")
def _killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not hasattr(os, "fork"):
        pytest.skip("needs os.fork to kill a process many times")
    root = tmp_path_factory.mktemp("killed")
    subprocess.run([sys.executable, SCRIPT, root, "kill"], check=True, env=ENVIRONMENT, timeout=120)
    return root


@pytest.fixture
def killed(_killed: Path, tmp_path: Path) -> list[Path]:
    """Stores as processes left them that were killed with SIGKILL, each one step later than the one before."""
    shutil.copytree(_killed, tmp_path / "killed")
    return sorted((tmp_path / "killed").iterdir(), key=lambda folder: int(folder.name))


def test_store_resumes_to_the_same_bytes_wherever_it_was_killed(killed: list[Path], store_folder: Path) -> None:
    undisturbed = contents(store_folder)
    assert len(killed) > 50  # 12 files, each with a chmod, two fsyncs and a rename at least, and the unlinks

    for folder in killed:
        store = LatentStore.create(folder, describe())
        left = store.unfinished(NUM_RECORDS)
        fill(store, left)
        store.finish(NUM_RECORDS)

        assert contents(folder) == undisturbed, f"killed at step {folder.name} with {left} to do"


def test_store_repeats_at_most_one_shard_after_a_kill(killed: list[Path]) -> None:
    num_repeated = []
    for folder in killed:
        begun = {path.name.strip(".").split(".")[0] for path in folder.iterdir() if "shard-" in path.name}
        unfinished = LatentStore.create(folder, describe()).unfinished(NUM_RECORDS)
        num_repeated.append(len(begun & {f"shard-{shard:05d}" for shard in unfinished}))

    assert max(num_repeated) == 1


def test_create_goes_on_where_it_was(tmp_path: Path) -> None:
    fill(LatentStore.create(tmp_path / "store", describe()), [1])

    store = LatentStore.create(tmp_path / "store", describe())

    assert store.unfinished(NUM_RECORDS) == [0, 2]


def test_create_leaves_a_finished_store_alone(store_folder: Path) -> None:
    before = contents(store_folder)

    store = LatentStore.create(store_folder, describe())
    left = store.unfinished(NUM_RECORDS)

    assert left == []
    assert contents(store_folder) == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder": "f" * 64}, "encoder is 'ffff.*', there '0123"),
        ({"dtype": "float32"}, "dtype is 'float32', there 'float16'"),
        ({"content": "mode"}, "content is 'mode', there 'moments'"),
        ({"transform": {"size": 32, "crop": "centre"}}, r"transform\.size is 32, there 16; use the same arguments"),
        ({"data": "other"}, "data is 'other', there 'photos'"),
        ({"num_records": 11}, "num_records is 11, there 10"),
        ({"shard_items": 5}, "shard_items is 5, there 4"),
    ],
)
def test_create_refuses_another_store(changes: dict[str, Any], message: str, store_folder: Path) -> None:
    before = contents(store_folder)

    with pytest.raises(UserError, match=f"holds latents of another make: {message}"):
        LatentStore.create(store_folder, describe(**changes), allow_numeric_drift=True)

    assert contents(store_folder) == before


OTHER_MACHINE = Numerics(device="cpu", cpu="slide rule", threads_per_picture=1, versions={"torch": "2.0"})


def test_create_refuses_another_machine(store_folder: Path) -> None:
    with pytest.raises(UserError, match=r"numerics\.cpu is 'slide rule', there 'abacus'; pass --allow-numeric-drift"):
        LatentStore.create(store_folder, describe(numerics=OTHER_MACHINE))


def test_create_allows_another_machine_and_writes_it_down(tmp_path: Path) -> None:
    fill(LatentStore.create(tmp_path / "store", describe()), [0, 1])

    store = LatentStore.create(tmp_path / "store", describe(numerics=OTHER_MACHINE), allow_numeric_drift=True)
    fill(store, store.unfinished(NUM_RECORDS))
    manifest = store.finish(NUM_RECORDS)

    assert manifest.description == describe()
    assert [record.numerics.cpu for record in manifest.shards] == ["abacus", "abacus", "slide rule"]


def test_create_refuses_a_folder_of_other_things(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()

    with pytest.raises(UserError, match=r"is not a latent store \(it holds thesis\.tex, no store\.json\)"):
        LatentStore.create(tmp_path, describe())


def test_create_refuses_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    with pytest.raises(UserError, match="file is a file, a latent store is a folder"):
        LatentStore.create(tmp_path / "file", describe())


def test_open_refuses_a_folder_without_store(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is not a latent store, it has no store\.json; make one with sd-vae encode"):
        LatentStore.open(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "does not say that it is of the format 'sd-vae latents'"),
        ("[]", "does not say that it is of the format"),
        ("{", "is not JSON"),
        ('{"format": "sd-vae latents", "version": 2}', "is of version 2, this program reads 1; update sd-vae"),
        ('{"format": "sd-vae latents", "version": 1}', "encoder is missing"),
    ],
)
def test_open_refuses_another_format(text: str, message: str, store_folder: Path) -> None:
    (store_folder / "store.json").write_text(text)

    with pytest.raises(UserError, match=rf"store\.json:? .*{message}"):
        LatentStore.open(store_folder)


def test_manifest_of_an_unfinished_store_is_refused(tmp_path: Path) -> None:
    store = LatentStore.create(tmp_path / "store", describe())
    fill(store, [0])

    with pytest.raises(UserError, match=r"is not finished, it has 1 shards and no manifest\.json; run sd-vae encode"):
        store.manifest()


def test_finish_refuses_missing_shards(tmp_path: Path) -> None:
    store = LatentStore.create(tmp_path / "store", describe())
    fill(store, [0])

    with pytest.raises(UserError, match="lacks 2 of 3 shards, the first is 1; run sd-vae encode again"):
        store.finish(NUM_RECORDS)


def test_finish_refuses_a_source_that_has_grown(tmp_path: Path) -> None:
    store = LatentStore.create(tmp_path / "store", describe(num_records=None))
    fill(store, store.unfinished(NUM_RECORDS))

    with pytest.raises(UserError, match=r"00002\.json covers the records 8 to 10, the source of 12 has 8 to 12 there"):
        store.finish(12)


def test_finish_lists_the_rejects(store_folder: Path) -> None:
    text = (store_folder / "rejects.jsonl").read_text()

    assert text == (
        '{"position": 5, "id": "picture 5", "source": "photos/5.png", "sha256": "' + f"{5:064x}" + '", '
        '"reason": "damaged", "detail": "cut off"}\n'
    )


def test_finish_of_an_empty_source_makes_an_empty_store(tmp_path: Path) -> None:
    manifest = LatentStore.create(tmp_path / "store", describe(num_records=0)).finish(0)

    assert (manifest.num_records, manifest.num_items, manifest.shards) == (0, 0, ())


@pytest.mark.parametrize("name", ["shard-00001.safetensors", "shard-00001.arrow", "shard-00001.json"])
def test_store_makes_a_lost_file_anew(name: str, store_folder: Path) -> None:
    before = contents(store_folder)
    (store_folder / name).unlink()

    synthetic.make(store_folder)

    assert contents(store_folder) == before


def test_store_makes_a_truncated_shard_anew_and_says_so(store_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = contents(store_folder)
    os.truncate(store_folder / "shard-00001.safetensors", 100)

    with caplog.at_level(logging.WARNING):
        synthetic.make(store_folder)

    assert contents(store_folder) == before
    assert "shard-00001.safetensors has 100 bytes instead of" in caplog.text


def test_store_refuses_a_shard_of_another_store(store_folder: Path, tmp_path: Path) -> None:
    synthetic.make(tmp_path / "other", dtype="float32")
    (store_folder / "shard-00001.json").write_bytes((tmp_path / "other" / "shard-00001.json").read_bytes())

    with pytest.raises(UserError, match="two stores are mixed in one folder"):
        LatentStore.open(store_folder).unfinished(NUM_RECORDS)


def test_store_refuses_a_record_under_another_name(store_folder: Path) -> None:
    (store_folder / "shard-00001.json").write_bytes((store_folder / "shard-00002.json").read_bytes())

    with pytest.raises(UserError, match=r"00001\.json describes shard 2 with files shard-00002"):
        LatentStore.open(store_folder).unfinished(NUM_RECORDS)


def test_store_is_unfinished_while_a_shard_is_made_anew(store_folder: Path) -> None:
    store = LatentStore.open(store_folder)

    fill(store, [1])

    assert not store.is_complete


def test_full_disk_is_one_line_and_loses_nothing(store_folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    store = LatentStore.create(tmp_path / "full", describe())
    fill(store, [0])
    done = contents(store.folder)

    def no_space(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", no_space)
        with pytest.raises(UserError, match=r"cannot write .*shard-00001\.safetensors: No space left on device"):
            fill(store, [1])

    assert contents(store.folder) == done
    synthetic.make(store.folder)
    assert contents(store.folder) == contents(store_folder)


def test_writer_takes_the_record_back_before_it_writes(store_folder: Path, monkeypatch: Any) -> None:
    """A record that outlived its files would vouch for others, where the machine is another."""
    store = LatentStore.open(store_folder)

    def fails(*_: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fails)
        with pytest.raises(UserError, match="Input/output error"):
            fill(store, [1])

    assert store.unfinished(NUM_RECORDS) == [1]


def test_writer_removes_what_a_killed_attempt_left(store_folder: Path) -> None:
    left, another = (store_folder / f".shard-0000{k}.safetensors.abc.tmp" for k in (1, 2))
    left.touch()
    another.touch()

    fill(LatentStore.open(store_folder), [1])

    assert not left.exists()
    assert another.exists()  # may be of a process that is at work on it


def test_writer_of_a_store_on_a_stream_may_end_early(tmp_path: Path) -> None:
    store = LatentStore.create(tmp_path / "store", describe(num_records=None))
    with store.writer(0) as writer:
        writer.add(item(0), moments_of(item(0)))
        writer.reject(reject(1))

    manifest = store.finish(2)

    assert (manifest.num_records, manifest.num_items) == (2, 1)
