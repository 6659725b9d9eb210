"""A run's figures: a line a step in metrics.jsonl, and the same to whatever trackers are asked for."""

import json
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, filter_trackers

from halfbyte.checkpoint.files import write_text
from halfbyte.errors import HalfbyteError

METRICS_FILE = "metrics.jsonl"


class Metrics:
    """Appends to metrics.jsonl and passes numbers on.  The trackers are accelerate's (TensorBoard, wandb, …)."""

    def __init__(self, directory: Path, report_to: list[str], settings: dict[str, Any]) -> None:
        self._file = (directory / METRICS_FILE).open("a", encoding="utf-8")
        self._trackers = []
        for name in filter_trackers(list(report_to), str(directory)):
            tracker_class = LOGGER_TYPE_TO_CLASS[str(name)]
            needs_directory = {"logging_dir": str(directory)} if tracker_class.requires_logging_directory else {}
            tracker = tracker_class("logs", **needs_directory)
            tracker.start()
            # Trackers take flat numbers and text only.
            tracker.store_init_configuration({key: _flat(value) for key, value in settings.items()})
            self._trackers.append(tracker)

    def log(self, step: int, values: dict[str, float | int]) -> None:
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        for tracker in self._trackers:
            tracker.log(values, step=step)

    def close(self) -> None:
        self._file.close()
        for tracker in self._trackers:
            tracker.finish()


def check_trackers(report_to: list[str]) -> None:
    """Raises HalfbyteError for a tracker whose package is not installed."""
    PartialState()  # accelerate's logger asks for it
    available = {str(name) for name in filter_trackers(list(report_to), ".")}
    for name in report_to:
        if name not in available:
            raise HalfbyteError(f"report_to: {name} is not installed here; install its package or leave it out.")


def forget_after(directory: Path, step: int) -> None:
    """Drop the lines of steps that a resumed run will take again."""
    path = directory / METRICS_FILE
    if path.is_file():
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if _step(line) <= step]
        write_text(path, "".join(f"{line}\n" for line in lines))


def _step(line: str) -> float:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):  # a line that a kill cut short
        return float("inf")


def _flat(value: Any) -> str | int | float:
    return value if isinstance(value, str | int | float) else str(value)
