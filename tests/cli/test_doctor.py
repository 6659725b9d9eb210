"""`halfbyte doctor`: the self-test finds a wrong kernel, and the command says so with its exit code."""

import json
import re
from typing import Any

import pytest
import torch

from halfbyte import ops
from halfbyte.cli import EXIT_BAD_INPUT, EXIT_FAILED, main
from halfbyte.ops import _dispatch
from halfbyte.recipes import doctor, self_test

OPS = sorted(op for op, device in _dispatch.TABLE if device == "cpu")


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(self_test, "VALUES", 2**14)
    monkeypatch.setattr(self_test, "SECONDS_A_CHECK", 0.0)


def test_every_op_is_tested_in_every_implementation_that_runs_here(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    names = {row.name for row in ops.available_implementations() if row.available} - {"bitsandbytes"}
    assert {(check["op"], check["implementation"]) for check in report["checks"]} == {
        (op, name) for op in OPS for name in names
    }
    assert all(check["passed"] for check in report["checks"])
    assert all(check["values_per_second"] > 0 for check in report["checks"])
    assert {row["name"] for row in report["implementations"] if row["chosen"]} <= names
    assert report["healthy"] is True
    assert report["packages"]["torch"] == torch.__version__


def test_it_reads_as_a_page(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    for words in ("CPU", "threads", "memory", "CUDA", "chosen", "runs here", "OK", *OPS):
        assert words in shown
    assert re.search(r"all \d+ checks passed", shown)
    assert max(map(len, shown.splitlines())) <= 80


@pytest.mark.parametrize("op", OPS)
def test_a_kernel_that_is_wrong_fails(op: str, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    right = getattr(ops, op)

    def wrong(*arguments: Any) -> Any:
        result = right(*arguments)
        if ops.active_implementation()[0] == "portable":
            changed = arguments[0][0] if result is None else result[0] if isinstance(result, tuple) else result
            changed[(-1,) * changed.ndim] += 1
        return result

    monkeypatch.setattr(ops, op, wrong)
    assert main(["doctor"]) == EXIT_FAILED
    shown = capsys.readouterr().out
    assert f"FAILED: {op} in portable: " in shown
    assert "reference" in shown
    assert shown.count("FAILED") == 2  # in the table and below it


def test_a_result_that_is_no_number_fails(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    right = ops.rotary
    monkeypatch.setattr(ops, "rotary", lambda *arguments: right(*arguments) * float("nan"))
    assert main(["doctor"]) == EXIT_FAILED
    assert "FAILED: rotary in portable: nan from the float32 result" in capsys.readouterr().out


def test_a_forced_implementation_that_cannot_run_is_bad_input(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    with ops.forced_implementation("abacus"):
        assert main(["doctor"]) == EXIT_BAD_INPUT
    assert capsys.readouterr().err.startswith("error: HALFBYTE_IMPLEMENTATION=abacus cannot run")


def test_a_second_openmp_runtime_is_shown(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(doctor, "_openmp_libraries", lambda: ["/a/libgomp.so.1", "/b/libiomp5.so"])
    assert main(["doctor"]) == 0
    assert "2 OpenMP runtimes, which fight for the cores" in " ".join(capsys.readouterr().out.split())


def test_this_process_has_one_openmp_runtime() -> None:
    self_test.self_test(["reference"])
    assert len(doctor._openmp_libraries()) == 1
