"""Ctrl-C, or a scheduler's SIGTERM, heard at the end of a step, where there is something whole to save."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupt:
    """True once a signal has come."""

    def __init__(self) -> None:
        self.requested = False

    def __bool__(self) -> bool:
        return self.requested


@contextmanager
def heard_at_step_end() -> Iterator[Interrupt]:
    """Within the block the first SIGINT or SIGTERM sets the flag; a second one acts as it always does."""
    interrupt = Interrupt()

    def request(number: int, _: FrameType | None) -> None:
        interrupt.requested = True
        signal.signal(number, before[signal.Signals(number)])

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        for number in before:
            signal.signal(number, request)
    except ValueError:  # not the main thread, where Python hears no signals
        yield interrupt
        return
    try:
        yield interrupt
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
