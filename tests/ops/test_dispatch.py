"""The table: what is forced is what runs, what cannot run raises, and torch sees every op as one node."""

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import CODEBOOKS_16, CODEBOOKS_256

from halfbyte import _C, ops
from halfbyte.errors import HalfbyteError
from halfbyte.ops import _dispatch

SCRIPT = """
import torch
from halfbyte import ops
from halfbyte.formats import CODEBOOKS
ops.quantize_4bit(torch.randn(64), torch.tensor(CODEBOOKS["nf4"]), 64)
print(ops.executed_implementation())
"""


def run_with(name: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {ops.ENVIRONMENT_VARIABLE: name}
    return subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("name", ["portable", "reference"])
def test_environment_variable_forces(name: str) -> None:
    assert run_with(name).stdout.strip() == name


def test_environment_variable_that_cannot_run_raises() -> None:
    result = run_with("altivec")
    assert result.returncode != 0
    assert "HalfbyteError: HALFBYTE_IMPLEMENTATION=altivec cannot run quantize_4bit on cpu here" in result.stderr
    assert "portable, reference" in result.stderr


def test_forced_one_is_the_one_that_ran(implementation: str) -> None:
    """The compiled table reports; forgetting to select, or selecting the wrong entry, would show here."""
    assert ops.executed_implementation() is None
    for op, arguments in CALLS.items():
        getattr(ops, op)(*arguments)
        assert _C.executed() == ops.executed_implementation() == implementation
        assert ops.active_implementation(op)[0] == implementation


def test_force_ends_with_its_block() -> None:
    before = ops.active_implementation()
    with ops.forced_implementation("reference"):
        assert ops.active_implementation() == ("reference", "forced by HALFBYTE_IMPLEMENTATION")
    assert ops.active_implementation() == before


def test_unavailable_names_are_refused() -> None:
    unavailable = [i.name for i in ops.available_implementations() if not i.available]
    for name in [*unavailable, "altivec"]:
        with ops.forced_implementation(name), pytest.raises(HalfbyteError, match=f"{name} cannot run"):
            ops.active_implementation()
    assert not _C.select("altivec")


def test_python_and_compiled_tables_agree() -> None:
    compiled = [name for name, _, _ in _C.implementations()]
    assert compiled == [name for name in _dispatch.NATIVE if name in compiled]  # same names, same order
    assert compiled[-1] == "portable"


def test_best_runnable_is_the_default() -> None:
    with ops.forced_implementation(None):
        best = next(name for name, runs, _ in _C.implementations() if runs)
        assert ops.active_implementation()[0] == best


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("order", ["from halfbyte import _C; import torch", "import torch; from halfbyte import _C"])
def test_one_openmp_runtime_whoever_comes_first(order: str) -> None:
    """Two pools of threads fight for the cores: a small product then takes several times as long."""
    script = f"{order}\nfor line in open('/proc/self/maps'):\n    print(line.split()[-1])"
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    runtimes = {path for path in ran.stdout.split() if "libgomp" in path or "libomp" in path or "libiomp" in path}
    assert len(runtimes) == 1


PACKED, ABSMAX = torch.arange(64, dtype=torch.uint8), torch.rand(2)
CALLS: dict[str, tuple[Any, ...]] = {
    "quantize_4bit": (torch.randn(10, 13), CODEBOOKS_16["nf4"], 64),
    "dequantize_4bit": (PACKED, ABSMAX, CODEBOOKS_16["nf4"], 64, [8, 16], torch.bfloat16),
    "quantize_8bit": (torch.randn(10, 13), CODEBOOKS_256["signed"], 256),
    "dequantize_8bit": (PACKED.view(8, 8), ABSMAX[:1], CODEBOOKS_256["signed"], 256),
    "matmul_4bit": (torch.randn(3, 16).bfloat16(), PACKED, ABSMAX, CODEBOOKS_16["nf4"], 64, [8, 16]),
    "matmul_dense": (torch.randn(3, 16).bfloat16(), torch.randn(8, 16).bfloat16()),
}
LISTS = {
    "matmul_4bit_sum": (
        *([torch.randn(3, 8).bfloat16()] * 2, [PACKED] * 2, [ABSMAX] * 2, [8, 8], CODEBOOKS_16["nf4"], 64, 16),
        *([], None, [], None, None, 0, 0),
    ),
}


@pytest.mark.parametrize("op", CALLS | LISTS)
def test_opcheck(op: str) -> None:
    torch.library.opcheck(getattr(torch.ops.halfbyte, op).default, (CALLS | LISTS)[op])


@pytest.mark.parametrize("op", CALLS)
def test_traces_as_one_graph(op: str) -> None:
    function: Callable[..., Any] = getattr(ops, op)
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*CALLS[op]), function(*CALLS[op]), rtol=0, atol=0)


@pytest.mark.parametrize("op", CALLS)
def test_thread_count_does_not_show(op: str, implementation: str) -> None:
    large: dict[str, tuple[Any, ...]] = {
        "quantize_4bit": (torch.randn(300_001), CODEBOOKS_16["nf4"], 64),
        "dequantize_4bit": (PACKED.repeat(4000), ABSMAX.repeat(4000), CODEBOOKS_16["nf4"], 64, [512_000], torch.half),
        "quantize_8bit": (torch.randn(300_001), CODEBOOKS_256["signed"], 256),
        "dequantize_8bit": (PACKED.repeat(4000), ABSMAX.repeat(500), CODEBOOKS_256["signed"], 256),
        "matmul_4bit": (
            torch.randn(70, 640),
            PACKED.repeat(8000),
            ABSMAX.repeat(8000),
            CODEBOOKS_16["nf4"],
            64,
            [1600, 640],
        ),
        "matmul_dense": (torch.randn(700, 300), torch.randn(16, 300)),
    }
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(getattr(ops, op)(*large[op]))
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)
    torch.testing.assert_close(results[2], results[0], rtol=0, atol=0)


def test_defaults_of_torch_do_not_leak_in() -> None:
    """Loading a model sets a default dtype or device around us."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            packed, absmax = ops.quantize_4bit(*CALLS["quantize_4bit"])
            values = ops.dequantize_4bit(*CALLS["dequantize_4bit"])
    finally:
        torch.set_default_dtype(before)
    assert packed.is_cpu
    assert absmax.dtype == torch.float32
    assert values.is_cpu
