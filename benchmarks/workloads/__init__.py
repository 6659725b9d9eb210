"""One file a workload: its contestants, what each is asked, and the rows that come of it."""

from collections.abc import Callable

from benchmarks.bench import Bench
from benchmarks.workloads import decode, kernels, layers, load, step, whole_run

MEASURE: dict[str, Callable[[Bench], None]] = {
    "A": step.measure,
    "B": whole_run.measure,
    "C": layers.measure,
    "D": load.measure,
    "E": decode.measure,
    "P": kernels.measure,
}
