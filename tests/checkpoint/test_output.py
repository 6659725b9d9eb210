"""Whose the output directory is: nothing of anybody else's is ever removed."""

import json
from pathlib import Path

import pytest

from halfbyte import HalfbyteError
from halfbyte.checkpoint.output import RUN_FILE, check_output_dir, clear_run, is_run


def make_run(directory: Path) -> Path:
    directory.mkdir()
    (directory / RUN_FILE).write_text(json.dumps({"versions": {"halfbyte": "0.1.0"}}))
    (directory / "adapter_model.safetensors").write_text("an adapter")
    return directory


def test_a_directory_that_is_new_or_empty_will_do(tmp_path: Path) -> None:
    check_output_dir(tmp_path)
    check_output_dir(tmp_path / "a" / "b" / "c")
    assert list(tmp_path.iterdir()) == []  # looking makes nothing


@pytest.mark.parametrize(
    ("resume", "overwrite", "told"),
    [(False, False, "overwrite_output_dir"), (True, False, None), (False, True, None)],
)
def test_a_run_is_continued_or_replaced_only_on_request(
    tmp_path: Path, resume: bool, overwrite: bool, told: str | None
) -> None:
    run = make_run(tmp_path / "run")
    if told is None:
        check_output_dir(run, resume=resume, overwrite=overwrite)
    else:
        with pytest.raises(HalfbyteError, match=told):
            check_output_dir(run, resume=resume, overwrite=overwrite)
    assert (run / "adapter_model.safetensors").read_text() == "an adapter"


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("content", [None, "", "{", "[]", "{}", '{"versions": {"other": "1"}}', '{"versions": 3}'])
def test_what_is_no_run_of_ours_is_never_taken(
    tmp_path: Path, content: str | None, overwrite: bool, resume: bool
) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    if content is not None:
        (tmp_path / RUN_FILE).write_text(content)
    assert not is_run(tmp_path)
    with pytest.raises(HalfbyteError, match="something else"):
        check_output_dir(tmp_path, resume=resume, overwrite=overwrite)
    clear_run(tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_a_file_is_no_directory(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(HalfbyteError, match="is a file"):
        check_output_dir(tmp_path / "out")
    with pytest.raises(HalfbyteError, match=r"cannot be written|is a file"):
        check_output_dir(tmp_path / "out" / "below")


def test_nothing_to_resume(tmp_path: Path) -> None:
    for directory in (tmp_path, tmp_path / "new"):
        with pytest.raises(HalfbyteError, match="no run to resume"):
            check_output_dir(directory, resume=True)


def test_a_place_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(**_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", refused)
    with pytest.raises(HalfbyteError, match="Permission denied"):
        check_output_dir(tmp_path / "new")


def test_clearing_removes_a_run_and_makes_the_directory(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    clear_run(run)
    assert list(run.iterdir()) == []
    clear_run(tmp_path / "new" / "one")
    assert (tmp_path / "new" / "one").is_dir()
