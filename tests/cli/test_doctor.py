"""`halfbyte doctor`: the self-test finds a wrong kernel, and the command says so with its exit code."""

import json
import re
from typing import Any

import pytest
import torch

from halfbyte.cli import EXIT_BAD_INPUT, EXIT_FAILED, main
from halfbyte.ops import active_implementation, available_implementations, forced_implementation
from halfbyte.recipes import doctor

OPS = ["quantize_4bit", "dequantize_4bit", "quantize_8bit", "dequantize_8bit"]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "VALUES", 2**14 + 37)
    monkeypatch.setattr(doctor, "SECONDS_A_CHECK", 0.0)


def test_every_op_is_tested_in_every_implementation_that_runs_here(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    names = {row.name for row in available_implementations() if row.available} - {"bitsandbytes"}
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
def test_a_kernel_that_is_off_by_one_bit_fails(op: str, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    right = getattr(doctor, op)

    def wrong(*arguments: Any) -> Any:
        result = right(*arguments)
        first = result[0] if isinstance(result, tuple) else result
        first.view(torch.uint8).view(-1)[-1] ^= active_implementation()[0] == "portable"
        return result

    monkeypatch.setattr(doctor, op, wrong)
    assert main(["doctor"]) == EXIT_FAILED
    shown = capsys.readouterr().out
    assert f"FAILED: {op} in portable: 1 of" in shown
    assert "bytes differ from the reference" in shown
    assert shown.count("FAILED") == 2  # in the table and below it


def test_a_forced_implementation_that_cannot_run_is_bad_input(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    with forced_implementation("abacus"):
        assert main(["doctor"]) == EXIT_BAD_INPUT
    assert capsys.readouterr().err.startswith("error: HALFBYTE_IMPLEMENTATION=abacus cannot run")


def test_a_second_openmp_runtime_is_shown(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(doctor, "_openmp_libraries", lambda: ["/a/libgomp.so.1", "/b/libiomp5.so"])
    assert main(["doctor"]) == 0
    assert "2 OpenMP runtimes, which fight for the cores" in " ".join(capsys.readouterr().out.split())


def test_this_process_has_one_openmp_runtime() -> None:
    doctor.self_test(["reference"])
    assert len(doctor._openmp_libraries()) == 1
