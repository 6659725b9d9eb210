"""Which implementation of an op runs: one table, in order of preference, and one way to overrule it.

    HALFBYTE_IMPLEMENTATION=avx2 halfbyte finetune ...

forces an implementation by name for every op. A choice that cannot run here raises and names those that can: a
measurement or a bug report is never about something else than it says.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from halfbyte import _C
from halfbyte.errors import HalfbyteError

ENVIRONMENT_VARIABLE = "HALFBYTE_IMPLEMENTATION"

# The rows of csrc/dispatch.cpp, best first. All live in an op's cpu.py: which of them a call reaches is the C++ table's
# business, and `select` tells it.
NATIVE = ("avx512bf16", "avx512", "avx2", "neon", "portable")

# (op, device) -> implementations, best first. `reference` is plain torch and serves every device not listed.
TABLE: dict[tuple[str, str], tuple[str, ...]] = {
    ("attention", "cpu"): (*NATIVE, "reference"),
    ("attention_backward", "cpu"): (*NATIVE, "reference"),
    ("quantize_4bit", "cpu"): (*NATIVE, "reference"),
    ("quantize_4bit", "cuda"): ("bitsandbytes", "reference"),
    ("dequantize_4bit", "cpu"): (*NATIVE, "reference"),
    ("dequantize_4bit", "cuda"): ("bitsandbytes", "reference"),
    ("quantize_8bit", "cpu"): (*NATIVE, "reference"),
    ("quantize_8bit", "cuda"): ("reference",),
    ("dequantize_8bit", "cpu"): (*NATIVE, "reference"),
    ("dequantize_8bit", "cuda"): ("bitsandbytes", "reference"),
    ("adamw_step", "cpu"): (*NATIVE, "reference"),
    ("adamw_8bit_step", "cpu"): (*NATIVE, "reference"),
    ("adamw_8bit_step", "cuda"): ("bitsandbytes", "reference"),
    ("gated", "cpu"): (*NATIVE, "reference"),
    ("gated_backward", "cpu"): (*NATIVE, "reference"),
    ("layer_norm", "cpu"): (*NATIVE, "reference"),
    ("layer_norm_backward", "cpu"): (*NATIVE, "reference"),
    ("linear_cross_entropy", "cpu"): (*NATIVE, "reference"),
    ("matmul_4bit", "cpu"): (*NATIVE, "reference"),
    ("matmul_4bit_sum", "cpu"): (*NATIVE, "reference"),
    ("matmul_dense", "cpu"): (*NATIVE, "reference"),
    ("rms_norm", "cpu"): (*NATIVE, "reference"),
    ("rms_norm_backward", "cpu"): (*NATIVE, "reference"),
    ("rotary", "cpu"): (*NATIVE, "reference"),
    ("decode_token", "cpu"): (*NATIVE, "reference"),
}

# Ops that live in the folder of another: each of these is short, and reads best beside its forward.
FOLDERS = {
    "gated_backward": "gated",
    "layer_norm_backward": "layer_norm",
    "rms_norm_backward": "rms_norm",
}


@dataclass(frozen=True)
class Implementation:
    """A line of what `doctor` prints."""

    name: str
    available: bool  # it can run here
    needs: str  # what it takes, for a person


@dataclass(frozen=True)
class _Entry:
    name: str
    function: Callable[..., Any]


@dataclass
class _State:
    forced: str | None
    entries: dict[tuple[str, str], _Entry] = field(default_factory=dict)  # what _resolve found, until the force changes
    last: _Entry | None = None


_state = _State(forced=os.environ.get(ENVIRONMENT_VARIABLE) or None)


def available_implementations() -> list[Implementation]:
    """Everything this build has, best first, and whether it can run on this machine."""
    native = [Implementation(*row) for row in _C.implementations()]
    has_bitsandbytes = importlib.util.find_spec("bitsandbytes") is not None and torch.cuda.is_available()
    return [
        *native,
        Implementation("bitsandbytes", has_bitsandbytes, "a CUDA device and the bitsandbytes package"),
        Implementation("reference", True, "nothing: plain torch, on any device"),
    ]


def active_implementation(op: str = "dequantize_4bit", device: str = "cpu") -> tuple[str, str]:
    """The name of what `op` runs on `device`, and why that one. HalfbyteError if the forced one cannot."""
    name = _resolve(op, device).name
    return name, f"forced by {ENVIRONMENT_VARIABLE}" if _state.forced else "the best of those that run here"


def executed_implementation() -> str | None:
    """The name of what ran last. For compiled kernels the compiled table says it, not the caller's wish."""
    last = _state.last
    if last is None:
        return None
    return _C.executed() if last.name in NATIVE else last.name


@contextlib.contextmanager
def forced_implementation(name: str | None) -> Iterator[None]:
    """As the environment variable, for the length of a `with` block and in every thread; None lifts a force."""
    before = _state.forced
    _set_forced(name)
    try:
        yield
    finally:
        _set_forced(before)


def call(op: str, device: str, *arguments: Any) -> Any:
    """Run `op` by the implementation the table gives for `device`."""
    entry = _state.entries.get((op, device)) or _resolve(op, device)
    _state.last = entry
    return entry.function(*arguments)


def _set_forced(name: str | None) -> None:
    _state.forced = name
    _state.entries.clear()
    _state.last = None


def _resolve(op: str, device: str) -> _Entry:
    runnable = {i.name for i in available_implementations() if i.available}
    candidates = [name for name in TABLE.get((op, device), ("reference",)) if name in runnable]
    if _state.forced is not None and _state.forced not in candidates:
        raise HalfbyteError(
            f"{ENVIRONMENT_VARIABLE}={_state.forced} cannot run {op} on {device} here; "
            f"available: {', '.join(candidates)}."
        )
    name = _state.forced or candidates[0]
    if name in NATIVE:
        _C.select(name)
    folder = FOLDERS.get(op, op)
    module = importlib.import_module(f"halfbyte.ops.{folder}.{'cpu' if name in NATIVE else name}")
    entry = _Entry(name, getattr(module, op))
    _state.entries[op, device] = entry
    return entry
