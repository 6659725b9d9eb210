"""What a worker and the one who gives it work say to each other: a JSON object a line.

    orchestrator                      worker
    {settings}                →                       once
                              ←       {"ready": {...}}
    {request}                 →                       as often as wanted; the worker sleeps in between
                              ←       {"seconds": ..., "peak_bytes": ..., ...}
    end of input              →       exits

A worker stays alive, so that a model is loaded once and each side is measured in its turn. This file is read by
halfbyte's interpreter and by the peers', so it needs nothing but Python.
"""

import json
import os
import resource
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

Request = dict[str, Any]
Reply = dict[str, Any]
Measure = Callable[[Request], Reply]

_RESET_PEAK = "5"  # what /proc/PID/clear_refs takes to forget the largest resident set so far


def serve(prepare: Callable[[Request], tuple[Measure, Reply]]) -> None:
    """Read the settings, prepare, then answer requests until the input ends.

    `prepare(settings)` gives the function that measures, and facts about what it has prepared.
    """
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print; what they print belongs in the log, not between the lines
    try:
        started = time.perf_counter()
        measure, facts = prepare(json.loads(sys.stdin.readline()))
        _send(channel, {"ready": {"prepare_seconds": time.perf_counter() - started, **facts}})
        for line in iter(sys.stdin.readline, ""):
            reset_peak()
            reply = measure(json.loads(line))
            _send(channel, {"peak_bytes": peak_bytes(), **reply})
    except Exception as error:  # whatever it was, the orchestrator must hear of it
        traceback.print_exc()
        _send(channel, {"error": f"{type(error).__name__}: {error}"})
        sys.exit(1)


def _send(channel: Any, message: Reply) -> None:
    channel.write(json.dumps(message) + "\n")
    channel.flush()


def reset_peak() -> None:
    """Let the largest resident set be counted anew, where the system can."""
    try:
        Path("/proc/self/clear_refs").write_text(_RESET_PEAK)
    except OSError:
        return


def peak_bytes() -> int:
    """The largest resident set of this process since the last reset, model and libraries included."""
    # Not ru_maxrss where it can be helped: a child inherits its parent's.
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
