"""A name holds the old bytes or the new ones, whatever happens in between."""

import json
from pathlib import Path

import pytest

from halfbyte.checkpoint import files
from halfbyte.checkpoint.files import directory_written_aside, write_json, write_text


class DiskFullError(OSError):
    """What a test lets a write end with."""


def contents(directory: Path) -> dict[str, str]:
    return {str(p.relative_to(directory)): p.read_text() for p in directory.rglob("*") if p.is_file()}


def test_json_is_written_and_replaced(tmp_path: Path) -> None:
    path = tmp_path / "value.json"
    for value in ({"a": 1, "ü": [None, 0.1]}, [], "text"):
        write_json(path, value)
        assert json.loads(path.read_text(encoding="utf-8")) == value
    assert [p.name for p in tmp_path.iterdir()] == ["value.json"]


def test_a_value_that_is_no_json_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "value.json"
    write_json(path, 1)
    with pytest.raises(TypeError):
        write_json(path, {"path": tmp_path})
    assert contents(tmp_path) == {"value.json": "1\n"}


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "lines"
    write_text(path, "old")

    def full(_: int) -> None:
        raise DiskFullError

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(DiskFullError):
        write_text(path, "new")
    assert path.read_text() == "old"


def test_a_directory_appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "checkpoint-4"
    with directory_written_aside(target) as aside:
        (aside / "a").write_text("1")
        (aside / "sub").mkdir()
        (aside / "sub" / "b").write_text("2")
        assert not target.exists()
    assert contents(tmp_path) == {"checkpoint-4/a": "1", "checkpoint-4/sub/b": "2"}


def test_a_directory_replaces_an_older_one_whole(tmp_path: Path) -> None:
    target = tmp_path / "model"
    for name in ("old", "new"):
        with directory_written_aside(target) as aside:
            (aside / name).write_text(name)
    assert contents(tmp_path) == {"model/new": "new"}


@pytest.mark.parametrize("error", [DiskFullError, KeyboardInterrupt, SystemExit])
def test_a_block_that_fails_leaves_what_was_there_and_nothing_else(tmp_path: Path, error: type[BaseException]) -> None:
    target = tmp_path / "model"
    with directory_written_aside(target) as aside:
        (aside / "old").write_text("old")

    def write_half() -> None:
        with directory_written_aside(target) as aside:
            (aside / "new").write_text("half")
            raise error

    with pytest.raises(error):
        write_half()
    assert contents(tmp_path) == {"model/old": "old"}
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_what_a_kill_left_is_cleared_by_the_next_write(tmp_path: Path) -> None:
    for suffix in (files.WRITING, files.REPLACED):
        (tmp_path / f"model{suffix}").mkdir()
        (tmp_path / f"model{suffix}" / "left").write_text("over")
    with directory_written_aside(tmp_path / "model") as aside:
        assert list(aside.iterdir()) == []
        (aside / "new").write_text("new")
    assert contents(tmp_path) == {"model/new": "new"}


def test_at_no_moment_is_there_neither_the_old_nor_the_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "model"
    with directory_written_aside(target) as aside:
        (aside / "old").write_text("old")
    seen = []
    rename, rmtree = Path.rename, files.shutil.rmtree

    def look() -> None:
        whole = [contents(path) for path in tmp_path.iterdir()]
        seen.append({"old": "old"} in whole or {"new": "new"} in whole)

    def watched_rename(self: Path, to: Path) -> Path:
        look()
        result = rename(self, to)
        look()
        return result

    monkeypatch.setattr(Path, "rename", watched_rename)
    monkeypatch.setattr(files.shutil, "rmtree", lambda *a, **k: (look(), rmtree(*a, **k), look()))
    with directory_written_aside(target) as aside:
        (aside / "new").write_text("new")
    assert len(seen) >= 6
    assert all(seen)
