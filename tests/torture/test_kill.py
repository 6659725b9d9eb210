"""kill -9, for real: wherever it falls, the run goes on from a whole checkpoint and ends with the same bytes."""

import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from halfbyte import FinetuneConfig
from halfbyte.checkpoint.resume import list_checkpoints, read_state
from runs import adapter_bytes, configure, metrics_of, run, write_rows

STEPS = 12
SCRIPT = """
import json, sys
sys.path.insert(0, sys.argv[2])
from runs import run
from halfbyte import FinetuneConfig
run(FinetuneConfig.model_validate(json.loads(sys.argv[1])))
"""
# Falls while the named file of a checkpoint is half written: the adapter, the moments, the state.
SCRIPT_THAT_DIES_WRITING = """
import os, signal
from pathlib import Path
from halfbyte.checkpoint import resume
calls = []
def dying(*arguments):
    calls.append(1)
    if len(calls) == {call}:
        path = Path(arguments[{path}])
        (path / "adapter_model.safetensors" if path.is_dir() else path).write_bytes(b"half of it")
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*arguments)
original, resume.{function} = resume.{function}, dying
"""


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", 20)


Undisturbed = Callable[[bool], dict[str, object]]


@pytest.fixture(scope="module")
def undisturbed(
    model_directory: Callable[[str], Path], rows: Path, tmp_path_factory: pytest.TempPathFactory
) -> Undisturbed:
    """A run of twelve steps with dropout over several epochs, packed or not; in `expected`, the bytes it ends with."""
    root = tmp_path_factory.mktemp("undisturbed")

    @cache
    def settings(packing: bool) -> dict[str, object]:
        changes = {"max_steps": STEPS, "packing": packing, "gradient_accumulation_steps": 1}
        config = configure(model_directory("llama"), rows, root / str(packing), **changes)
        run(config)
        return config.to_dict() | {"expected": adapter_bytes(root / str(packing))}

    return settings


def start(settings: dict[str, object], output_dir: Path, resume: bool, before: str = "") -> subprocess.Popen[bytes]:
    config = {key: value for key, value in settings.items() if key != "expected"}
    config |= {"output_dir": str(output_dir), "resume_from_checkpoint": resume}
    tests = str(Path(__file__).resolve().parents[1])
    command = [sys.executable, "-c", before + SCRIPT, json.dumps(config), tests]
    with output_dir.with_name("errors").open("wb") as errors:
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors)


def assert_ended(process: subprocess.Popen[bytes], output_dir: Path, *returncodes: int) -> None:
    assert process.wait() in returncodes, output_dir.with_name("errors").read_text()


def lines_of(output_dir: Path) -> int:
    metrics = output_dir / "metrics.jsonl"
    return metrics.read_bytes().count(b"\n") if metrics.exists() else 0


def assert_whole(output_dir: Path) -> None:
    for checkpoint in list_checkpoints(output_dir):
        assert read_state(checkpoint)["step"] == int(checkpoint.name.removeprefix("checkpoint-"))
        names = {path.name for path in checkpoint.iterdir()}
        assert {"adapter_model.safetensors", "optimizer.safetensors", "random.safetensors"} <= names


@pytest.mark.parametrize(("packing", "kills"), [(False, (3, 8)), (True, (5,))])
def test_killed_at_random_again_and_again(
    undisturbed: Undisturbed, tmp_path: Path, packing: bool, kills: tuple[int, ...]
) -> None:
    settings, output_dir = undisturbed(packing), tmp_path / "run"
    rng = random.Random(0)
    for until in kills:  # a line of metrics.jsonl, after which the process has not long to live
        process = start(settings, output_dir, resume=bool(list_checkpoints(output_dir)))
        while process.poll() is None:
            if lines_of(output_dir) >= until:
                time.sleep(rng.random() * 0.1)
                process.kill()
            time.sleep(0.005)
        assert_ended(process, output_dir, 0, -signal.SIGKILL)
        assert_whole(output_dir)
    assert_ended(start(settings, output_dir, resume=True), output_dir, 0)
    assert adapter_bytes(output_dir) == settings["expected"]
    assert [line["step"] for line in metrics_of(output_dir)] == list(range(1, STEPS + 1))


@pytest.mark.parametrize(
    ("function", "path", "call"), [("save_adapter", 1, 2), ("save_file", 1, 3), ("write_json", 0, 2)]
)
def test_killed_while_the_second_checkpoint_is_written(
    undisturbed: Undisturbed, tmp_path: Path, function: str, path: int, call: int
) -> None:
    settings, output_dir = undisturbed(False), tmp_path / "run"
    before = SCRIPT_THAT_DIES_WRITING.format(function=function, path=path, call=call)
    assert_ended(start(settings, output_dir, resume=False, before=before), output_dir, -signal.SIGKILL)
    assert [checkpoint.name for checkpoint in list_checkpoints(output_dir)] == ["checkpoint-2"]
    assert (output_dir / "checkpoint-4.writing").is_dir()
    assert_whole(output_dir)
    config = {key: value for key, value in settings.items() if key != "expected"}
    run(FinetuneConfig.model_validate(config | {"output_dir": str(output_dir), "resume_from_checkpoint": True}))
    assert adapter_bytes(output_dir) == settings["expected"]
    assert not list(output_dir.glob("*.writing"))
