"""Workers, and the order in which they are asked."""

import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import turns as turns_module
from benchmarks.bench import Bench, Setting
from benchmarks.options import Options
from benchmarks.results import Results
from benchmarks.turns import Lane, Worker, WorkerError, alternate, workers

WORKER = """
    import os, sys
    sys.path.insert(0, {protocol!r})
    from protocol import serve

    def prepare(settings):
        if settings.get("fail") == "prepare":
            raise MemoryError("no room for the model")
        print("a library says hello")  # must not come between the lines

        def measure(request):
            if request.get("die"):
                print("the last words", file=sys.stderr, flush=True)
                os._exit(3)
            if request.get("fail"):
                raise ValueError("a bad request")
            return {{"seconds": request["seconds"], "units": 10, "threads": os.environ["OMP_NUM_THREADS"]}}

        return measure, {{"threads": settings["threads"]}}

    serve(prepare)
"""


@pytest.fixture
def options(tmp_path, monkeypatch) -> Options:
    protocol = str(Path(turns_module.__file__).parent / "workers")
    monkeypatch.setattr(turns_module, "_WORKERS", tmp_path)
    (tmp_path / "peer_toy.py").write_text(textwrap.dedent(WORKER.format(protocol=protocol)))
    return replace(Options(), smoke=True, threads=3, directory=tmp_path / "bench", peers_python=Path(sys.executable))


def test_a_worker_answers_with_its_peak_and_keeps_to_its_threads(options):
    worker = Worker("peer_toy", {}, options)
    with workers(worker):
        assert worker.facts["threads"] == 3
        answer = worker.measure({"seconds": 0.5})
        assert answer["threads"] == "3"
        assert answer["peak_bytes"] > 1e6
    assert worker.process.returncode == 0


def test_a_failure_is_told_in_the_workers_words(options):
    with pytest.raises(WorkerError, match="MemoryError: no room for the model"):
        Worker("peer_toy", {"fail": "prepare"}, options)
    worker = Worker("peer_toy", {}, options)
    with workers(worker), pytest.raises(WorkerError, match="ValueError: a bad request"):
        worker.measure({"fail": True})


def test_a_death_is_told_with_the_last_words(options):
    worker = Worker("peer_toy", {}, options)
    with workers(worker), pytest.raises(WorkerError, match="ended with 3: the last words"):
        worker.measure({"die": True})


def test_turns_alternate_and_a_warm_up_is_not_counted(options):
    one, two = Worker("peer_toy", {}, options), Worker("peer_toy", {}, options)
    results = Results()
    with workers(one, two):
        lanes = [Lane("one", one, {"seconds": 1.0}), Lane("two", two, {"seconds": 2.0})]
        turns = alternate(lanes, 2, options, results, "T")
    order = [(turn["lane"], turn["repetition"]) for turn in results.all("turn")]
    assert order == [("one", -1), ("two", -1), ("one", 0), ("two", 0), ("one", 1), ("two", 1)]
    assert [turn["seconds"] for turn in turns["two"]] == [2.0, 2.0]
    assert all(turn["idle_seconds"] <= turn["core_seconds"] + 0.1 for turn in results.all("turn"))


def test_the_fastest_setting_wins_and_one_that_fails_is_recorded(options):
    bench = Bench(options, Results())
    candidates = [
        Setting("slow", {}, {"seconds": 2.0}),
        Setting("dies", {}, {"seconds": 0.1, "die": True}),
        Setting("no room", {"fail": "prepare"}, {"seconds": 0.1}),
        Setting("fast", {}, {"seconds": 1.0}),
    ]
    assert bench.best_setting("T", "peer_toy", candidates).words == "fast"
    failed = {scan["setting"]: scan["failed"] for scan in bench.results.all("scan") if "failed" in scan}
    assert set(failed) == {"dies", "no room"}
    with pytest.raises(WorkerError, match="works in no setting"):
        bench.best_setting("T", "peer_toy", candidates[1:3])
