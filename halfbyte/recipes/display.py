"""What a person sees while a run goes on: a live line on a terminal, a plain line now and then elsewhere."""

import time
from types import TracebackType

import psutil
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

SECONDS_BETWEEN_LINES = 10.0  # where there is no terminal to redraw


class Display:
    """Shows loss, learning rate, tokens a second, time left and memory as steps go by."""

    def __init__(self, console: Console, total_steps: int, done_steps: int) -> None:
        self._console = console
        self._total = total_steps
        self._first_step = done_steps
        self._started = self._last_line = time.monotonic()
        self._process = psutil.Process()
        self._progress = Progress(
            TextColumn("[bold]training"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
        )
        self._task: TaskID | None = None
        if console.is_terminal:
            self._task = self._progress.add_task("", total=total_steps, completed=done_steps, figures="")

    def __enter__(self) -> "Display":
        if self._task is not None:
            self._progress.start()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        if self._task is not None:
            self._progress.stop()

    def step(self, step: int, values: dict[str, float | int]) -> None:
        """`step` steps are done; `values` are the figures that metrics.jsonl gets."""
        figures = (
            f"loss {values['loss']:.4f}  lr {values['learning_rate']:.2e}"
            f"  {values['tokens_per_second']:,.0f} tok/s  {self._process.memory_info().rss / 1e9:.2f} GB"
        )
        now = time.monotonic()
        if self._task is not None:
            self._progress.update(self._task, completed=step, figures=figures)
        elif now - self._last_line >= SECONDS_BETWEEN_LINES or step in (self._first_step + 1, self._total):
            self._last_line = now
            left = (now - self._started) / (step - self._first_step) * (self._total - step)
            self._console.print(f"step {step}/{self._total}  {figures}  {left:.0f} s left", highlight=False)

    def say(self, text: str) -> None:
        self._console.print(text, highlight=False)
