"""Files and folders: whole or absent, never by surprise."""

import os
from pathlib import Path

import pytest

from sd_vae.errors import UserError
from sd_vae.files import (
    atomic_file,
    atomic_folder,
    read_json,
    read_text,
    require_own_folder,
    require_writable_target,
    write_json,
    write_text,
)


def test_atomic_file_that_fails_leaves_the_old_content_and_no_rest(tmp_path: Path) -> None:
    write_text(tmp_path / "a.txt", "old")

    with pytest.raises(RuntimeError, match="half-way"), atomic_file(tmp_path / "a.txt") as temporary:
        temporary.write_text("new")
        raise RuntimeError("half-way")

    assert (tmp_path / "a.txt").read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_atomic_file_respects_the_umask(tmp_path: Path) -> None:
    mask = os.umask(0o027)
    try:
        write_text(tmp_path / "a.txt", "x")
    finally:
        os.umask(mask)

    assert (tmp_path / "a.txt").stat().st_mode & 0o777 == 0o640


def test_atomic_folder_that_fails_leaves_the_old_folder(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    write_text(tmp_path / "out" / "old.txt", "old")

    with pytest.raises(RuntimeError, match="half-way"), atomic_folder(tmp_path / "out", overwrite=True) as temporary:
        write_text(temporary / "new.txt", "new")
        raise RuntimeError("half-way")

    assert os.listdir(tmp_path / "out") == ["old.txt"]
    assert os.listdir(tmp_path) == ["out"]


def test_atomic_folder_replaces_the_whole_folder_when_asked(tmp_path: Path) -> None:
    for name in ("old.txt", "new.txt"):
        with atomic_folder(tmp_path / "out", overwrite=True) as temporary:
            write_text(temporary / name, name)

    assert os.listdir(tmp_path / "out") == ["new.txt"]
    assert os.listdir(tmp_path) == ["out"]


def test_require_writable_target_refuses_what_is_there(tmp_path: Path) -> None:
    write_text(tmp_path / "a.txt", "x")

    with pytest.raises(UserError, match=r"a.txt exists; choose another place or pass --overwrite"):
        require_writable_target(tmp_path / "a.txt")


def test_require_writable_target_takes_an_empty_folder_for_absent(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()

    require_writable_target(tmp_path / "out")


def test_require_writable_target_names_a_folder_without_permission(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write everywhere

    with pytest.raises(UserError, match=r"is not writable; choose another place or change its permissions"):
        require_writable_target(tmp_path / "out")


def test_a_parent_that_is_a_file_is_named(tmp_path: Path) -> None:
    write_text(tmp_path / "a", "x")

    with pytest.raises(UserError, match=r"cannot write .*a/b/c"):
        write_text(tmp_path / "a" / "b" / "c", "x")


@pytest.mark.parametrize("kind", ["file", "foreign folder"])
def test_require_own_folder_replaces_nothing_foreign(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "out"
    write_text(target if kind == "file" else target / "thesis.tex", "x")

    with pytest.raises(UserError, match=r"not a run.*so it is not replaced; choose another --out"):
        require_own_folder(target, ("config.yaml",), kind="a run", overwrite=True)


def test_write_json_turns_what_json_lacks_into_null(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"a": float("nan"), "b": [float("inf"), 1.5]})

    assert read_json(tmp_path / "a.json") == {"a": None, "b": [None, 1.5]}


def test_read_json_names_a_file_that_is_not_json(tmp_path: Path) -> None:
    write_text(tmp_path / "a.json", "{")

    with pytest.raises(UserError, match=r"a.json is not JSON .*restore it or make it anew"):
        read_json(tmp_path / "a.json")


def test_read_text_names_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read .*nothing: No such file"):
        read_text(tmp_path / "nothing")
