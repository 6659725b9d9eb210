"""Run another project's tests against halfbyte: `make conformance SUITE=DIR`.

DIR is a checkout of bitsandbytes or of PEFT, or its folder of tests. Each file of tests is a process of its own, on
the CPU, with `conformance_plugin` in it: one that dies takes no other with it. Printed are, by file, how many tests
passed, failed, and do not apply; why; and which failed. Exit code 0, 1 if an applicable test failed, 2 if there is
nothing to run.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).parent
# PEFT 0.21 asks transformers 5.23 for what it calls deprecated, and PEFT's suite makes that an error.
KNOWN = "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
NO_TESTS = 5  # pytest's exit code for a file in which nothing was collected


class NothingToRunError(Exception):
    """One sentence for the person who asked; exit code 2."""


@dataclass
class File:
    """What became of a file's tests."""

    name: str
    passed: int = 0
    failed: list[tuple[str, str]] = field(default_factory=list)  # test, first line of its error
    not_applicable: Counter[str] = field(default_factory=Counter)  # by reason

    def add(self, test: str, outcome: str, reason: str) -> None:
        if outcome == "passed":
            self.passed += 1
        elif outcome == "failed":
            self.failed.append((test, reason))
        else:
            self.not_applicable[reason] += 1


def find(suite: Path | None, only: list[str]) -> tuple[Path, list[Path]]:
    """The root of a checkout, and its files of tests in order of name."""
    if suite is None:
        raise NothingToRunError("no SUITE was named; it is a checkout of bitsandbytes or of PEFT: SUITE=DIR.")
    suite = suite.resolve()
    if not suite.is_dir():
        raise NothingToRunError(
            f"SUITE {suite} is not a directory; name a checkout of bitsandbytes or PEFT, or its tests."
        )
    root = suite.parent if suite.name == "tests" else suite
    tests = root / "tests" if (root / "tests").is_dir() else root
    files = sorted(tests.rglob("test_*.py"))
    unknown = [name for name in only if name not in {file.name for file in files}]
    if unknown:
        raise NothingToRunError(f"SUITE {suite} has no file {unknown[0]}.")
    if not files:
        raise NothingToRunError(f"SUITE {suite} has no files test_*.py in it; name a checkout of bitsandbytes or PEFT.")
    return root, [file for file in files if not only or file.name in only]


def run(root: Path, file: Path, seconds: int, scratch: Path, arguments: list[str]) -> File:
    results = scratch / f"{file.stem}.jsonl"
    given = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    path = [HERE, *(folder for folder in [root / "src"] if folder.is_dir()), *map(Path, given)]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(str(entry.resolve()) for entry in path),  # the tests run in another directory
        "PYTHONDONTWRITEBYTECODE": "1",
        "HALFBYTE_CONFORMANCE_RESULTS": str(results),
        "HF_HUB_OFFLINE": os.environ.get("HF_HUB_OFFLINE", "1"),
        "BNB_TEST_DEVICE": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = [sys.executable, "-m", "pytest", str(file), f"--rootdir={root}", "-q", "--tb=short"]
    command += [
        "-p",
        "conformance_plugin",
        "-p",
        "no:cacheprovider",
        "-o",
        "addopts=",
        f"--timeout={seconds}",
        "-W",
        KNOWN,
    ]
    log = scratch / f"{file.stem}.log"
    with log.open("w", encoding="utf-8") as output:
        done = subprocess.run(
            [*command, *arguments], cwd=root, env=environment, stdout=output, stderr=subprocess.STDOUT, check=False
        )
    outcome = read(file.name, results, done.returncode, log)
    print(f"  {file.name}: {outcome.passed} passed, {len(outcome.failed)} failed", file=sys.stderr, flush=True)
    return outcome


def read(name: str, results: Path, code: int, log: Path) -> File:
    """A test's worst outcome is its outcome: one may pass and fail when it is taken down."""
    rank = {"passed": 0, "not applicable": 1, "failed": 2}
    worst: dict[str, dict[str, str]] = {}
    if results.exists():
        for line in results.read_text(encoding="utf-8").splitlines():
            entry = json.loads(line)
            known = worst.setdefault(entry["test"], entry)
            if rank[entry["outcome"]] > rank[known["outcome"]]:
                worst[entry["test"]] = entry
    file = File(name)
    for entry in worst.values():
        file.add(entry["test"], entry["outcome"], entry["reason"])
    if code < 0 or code not in (0, 1, 2, NO_TESTS) or (code == 2 and not worst):
        said = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["nothing was said"]
        last = next((line for line in said if line.startswith(("Fatal Python error", "ERROR"))), said[-1])
        file.add(name, "failed", f"the process ended with code {code}: {last[:200]}")
    return file


def show(files: list[File]) -> None:
    reasons: Counter[str] = Counter()
    width = max(len(file.name) for file in files)
    print(f"\n{'':{width}}  passed  failed  not applicable")
    for file in files:
        reasons += file.not_applicable
        print(f"{file.name:{width}}  {file.passed:6}  {len(file.failed):6}  {file.not_applicable.total():14}")
    failed = [(test, error) for file in files for test, error in file.failed]
    print(f"{'':{width}}  {sum(file.passed for file in files):6}  {len(failed):6}  {reasons.total():14}")
    if reasons:
        print("\nNot applicable, and why:")
        for reason, count in reasons.most_common():
            print(f"{count:6}  {reason}")
    if failed:
        print("\nFailed:")
        for test, error in failed:
            print(f"  {test}\n      {error}")


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="conformance", description=__doc__.split("\n")[0])
    parser.add_argument("suite", nargs="?", type=Path, help="a checkout of bitsandbytes or PEFT, or its tests")
    parser.add_argument("--only", nargs="*", default=[], metavar="FILE", help="files to run: test_ops.py; default: all")
    parser.add_argument("--seconds", type=int, default=300, help="for one test")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="files that run at a time")
    parser.add_argument("--pytest", default="", help="more for pytest, as one word: --pytest='-k nf4'")
    given = parser.parse_args(arguments)
    try:
        root, files = find(given.suite, given.only)
    except NothingToRunError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # a thread a process; their pools would wait for one another
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(given.jobs) as pool:
        more = shlex.split(given.pytest)
        done = list(pool.map(lambda file: run(root, file, given.seconds, Path(folder), more), files))
    show(done)
    return 1 if any(file.failed for file in done) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
