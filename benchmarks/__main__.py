"""`python -m benchmarks`: what `make bench` runs. `--help` lists its options."""

import argparse
import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

from benchmarks import machine
from benchmarks.bench import Bench, RedCheckError
from benchmarks.correctness import check_all
from benchmarks.models import big_layers
from benchmarks.options import ROOT, SMOKE, WORKLOADS, Options
from benchmarks.page import render_row, write_page
from benchmarks.results import Results, latest_of_each_workload, read_results
from benchmarks.turns import WorkerError
from benchmarks.workloads import MEASURE

DOCS_PAGE = ROOT / "docs/benchmarks.md"


def main() -> None:
    arguments = parse_arguments()
    if arguments.results:
        publish([read_results(path) for path in arguments.results], arguments.page or DOCS_PAGE, Options())
        return
    options = make_options(arguments)
    stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
    bench = Bench(options, Results(options.directory / f"{stamp}.jsonl"))
    try:
        failed = run(bench)
    except RedCheckError as error:
        sys.exit(f"error: {error}")
    whole = set(options.workloads) == set(WORKLOADS) and not options.smoke and not failed
    publish([bench.results], arguments.page or (DOCS_PAGE if whole else options.directory / f"{stamp}.md"), options)
    if failed:
        sys.exit(f"error: not measured: {', '.join(failed)}")


def run(bench: Bench) -> list[str]:
    """Describe the machine, pass the gate, measure; in that order, so that a red check leaves no speed behind.

    Returns the workloads that could not be measured; the others are not lost for them.
    """
    options, results = bench.options, bench.results
    results.add(
        "run",
        date=machine.now(),
        commit=machine.commit(),
        workloads=options.workloads,
        repeats=options.repeats,
        smoke=options.smoke,
    )
    results.add("machine", **machine.describe(options))
    models = {}
    if set(options.workloads) & set("ABDE"):
        models["SmolLM2"] = options.model
    if set(options.workloads) & set("CD"):
        models["big layers"] = big_layers(bench)
    print("Is it right?", file=sys.stderr)
    check_all(bench, models)
    print("How fast is it?", file=sys.stderr)
    failed = []
    for workload in options.workloads:
        try:
            MEASURE[workload](bench)
        except WorkerError as error:
            failed.append(workload)
            results.add("note", text=f"{workload} could not be measured: {error}")
            print(f"  {workload} could not be measured: {error}", file=sys.stderr)
        finally:
            bench.stop_all()
    return failed


def publish(runs: list[Results], page: Path, options: Options) -> None:
    """Write the page and its picture, and print the table."""
    rows = [
        row for results, workloads in latest_of_each_workload(runs) for row in results.all("row")
        if row["workload"] in workloads
    ]  # fmt: skip
    picture = page.with_suffix(".png")
    page.parent.mkdir(parents=True, exist_ok=True)
    command = [options.peers_python, ROOT / "benchmarks/plot.py", picture]
    drawn = subprocess.run(command, input=json.dumps(rows), text=True, capture_output=True, check=False)
    if drawn.returncode:
        print(f"no picture: {''.join(drawn.stderr.strip().splitlines()[-1:])}", file=sys.stderr)
    write_page(runs, page, None if drawn.returncode else picture.name)
    for row in rows:
        print(render_row(row).replace("<br>", ": "))
    print(f"\nwritten: {page}", file=sys.stderr)


def make_options(arguments: argparse.Namespace) -> Options:
    options = Options(arguments.workloads, arguments.repeats, smoke=arguments.smoke)
    if arguments.threads:
        options = replace(options, threads=arguments.threads)
    sizes = SMOKE if arguments.smoke else options.sizes
    if arguments.peer_rows:
        sizes = replace(sizes, peer_rows=arguments.peer_rows)
    return replace(options, sizes=sizes)


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="halfbyte and its peers, side by side.")
    parser.add_argument("--workloads", type=_workloads, default=WORKLOADS, help=f"some of {','.join(WORKLOADS)}")
    parser.add_argument("--repeats", type=int, help="turns of each side; 5 unless given, 3 where a turn takes minutes")
    parser.add_argument("--threads", type=int, help="on both sides; every core unless given")
    parser.add_argument("--peer-rows", type=int, help="rows of the peer's run in B; 96 unless given, 512 are all")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, one turn: does the harness work?")
    parser.add_argument("--page", type=Path, help="where the page goes; docs/benchmarks.md if everything was measured")
    parser.add_argument(
        "--results",
        type=Path,
        nargs="+",
        help="measure nothing: write the page from these files of runs/bench, the last run of each workload",
    )
    return parser.parse_args(words)


def _workloads(text: str) -> str:
    letters = text.upper().replace(",", "").replace(" ", "")
    if not letters or set(letters) - set(WORKLOADS):
        raise argparse.ArgumentTypeError(f"{text!r} is not some of {','.join(WORKLOADS)}")
    return "".join(letter for letter in WORKLOADS if letter in letters)


if __name__ == "__main__":
    main()
