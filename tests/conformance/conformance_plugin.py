"""A pytest plugin for other projects' suites: `bitsandbytes` is the package beside this file, and every outcome that is
neither passed nor failed says why the test does not apply here.

It writes a JSON object a line to the file that HALFBYTE_CONFORMANCE_RESULTS names: test, outcome (passed, failed or not
applicable), reason, and seconds.
"""

import json
import os
import re
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import OfflineModeIsEnabled

sys.path.insert(0, str(Path(__file__).parent))  # before the checkout, which has a folder of the same name

import bitsandbytes
from bitsandbytes._absent import NotInHalfbyteError

RESULTS = "HALFBYTE_CONFORMANCE_RESULTS"

if Path(bitsandbytes.__file__).parents[1] != Path(__file__).parent:
    raise ImportError(f"bitsandbytes was imported from {bitsandbytes.__file__}")

if Path("src/peft").is_dir():  # PEFT's suite: with halfbyte's seams in PEFT, which must do no harm
    import halfbyte.huggingface  # noqa: F401


def _refuse(_request: Any) -> None:
    raise OfflineModeIsEnabled("offline mode is enabled for this suite")


if os.environ.get("HF_HUB_OFFLINE") == "1":  # even where a suite switches it off, and would then wait for no answer
    _client = type(huggingface_hub.get_session())
    huggingface_hub.set_client_factory(lambda: _client(event_hooks={"request": [_refuse]}))

_NO_GPU = "needs a GPU"
_NO_HUB = "needs the hub: the model or the data set is not on this machine"
# Looked for in what an exception says, and its causes, and what it was raised in the course of; the first that fits.
_REASONS = [
    (r"Torch not compiled with CUDA|No CUDA GPUs are available|Found no NVIDIA driver", _NO_GPU),
    (r"OfflineModeIsEnabled|LocalEntryNotFoundError|[Oo]ffline mode is enabled|couldn't connect to 'https://", _NO_HUB),
    (r"name resolution|Name or service not known|MaxRetryError|ProxyError|ConnectError:|unreachable", _NO_HUB),
    (r"No module named 'bitsandbytes([\w.]+)'", r"bitsandbytes\1 is not among the names"),
    (r"cannot import name '(\w+)' from 'bitsandbytes([\w.]*)'", r"bitsandbytes\2.\1 is not among the names"),
    (r"module 'bitsandbytes([\w.]*)' has no attribute '(\w+)'", r"bitsandbytes\1.\2 is not among the names"),
    (r"No module named '(?!halfbyte)([\w.]+)'", r"needs the package \1"),
    (r"FixtureLookupError: (\w+)", r"needs a fixture \1, which the suite has not"),
]
_SKIPPED_FOR_GPU = re.compile(r"\b(CUDA|GPU|XPU|HPU|MPS|MLU|accelerators?|Triton|ROCm)\b", re.IGNORECASE)
_SKIPPED_FOR_CPU = re.compile(r"\bCPU\b", re.IGNORECASE)  # what is left out on one: a GPU may be named beside it
_MEASURED = ("benchmark", "slow")  # marks of tests that a suite leaves out itself


def why_not(error: BaseException) -> str | None:
    """The reason why a test that ended with the error does not apply, or None: it failed."""
    text, seen, cause = "", set(), error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        if isinstance(cause, NotInHalfbyteError):
            return f"not in halfbyte: {cause.reason}"
        text += f"\n{type(cause).__name__}: {getattr(cause, 'argname', None) or cause}"
        cause = cause.__cause__ or cause.__context__
    for pattern, reason in _REASONS:
        found = re.search(pattern, text)
        if found:
            return found.expand(reason)
    return None


def _record(test: str, outcome: str, reason: str = "", seconds: float = 0.0) -> None:
    line = {"test": test, "outcome": outcome, "reason": reason, "seconds": round(seconds, 3)}
    with Path(os.environ[RESULTS]).open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def _last_line(report: Any) -> str:
    crash = getattr(report.longrepr, "reprcrash", None)
    text = crash.message if crash else str(report.longrepr)
    return next((line.strip() for line in text.splitlines() if line.strip()), "")[:200]


def _judge(report: Any, call: pytest.CallInfo[Any] | None) -> None:
    """A failure for want of something that is not halfbyte's is made a skip, with the reason on the report."""
    if report.failed and call is not None and call.excinfo is not None:
        reason = why_not(call.excinfo.value)
        if reason:
            report.outcome, report.not_applicable = "skipped", reason
            report.longrepr = (str(getattr(report, "fspath", "")), 0, reason)
    elif report.skipped:
        said = str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr)
        said = said.removeprefix("Skipped").lstrip(": ") or "no reason given"
        for_gpu = _SKIPPED_FOR_GPU.search(said) and not _SKIPPED_FOR_CPU.search(said)
        report.not_applicable = _NO_GPU if for_gpu else f"the suite skips it: {said}"


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Generator[None, Any, Any]:
    report = yield
    _judge(report, getattr(report, "call", None))
    if not report.passed:
        reason = getattr(report, "not_applicable", "")
        _record(report.nodeid, "not applicable" if reason else "failed", reason or _last_line(report))
    return report


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        marks = [name for name in _MEASURED if item.get_closest_marker(name)]
        if marks:
            item.add_marker(pytest.mark.skip(reason=f"marked {marks[0]}"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
    report = yield
    if not hasattr(report, "wasxfail"):
        _judge(report, call)
    return report


def pytest_runtest_logreport(report: Any) -> None:
    seconds = report.duration
    if hasattr(report, "wasxfail"):
        if report.skipped:
            _record(report.nodeid, "not applicable", "the suite expects it to fail", seconds)
        elif report.when == "call":
            _record(report.nodeid, report.outcome, "", seconds)
    elif report.skipped:
        _record(report.nodeid, "not applicable", report.not_applicable, seconds)
    elif report.failed or report.when == "call":
        _record(report.nodeid, report.outcome, _last_line(report) if report.failed else "", seconds)
