"""Attention on aarch64, on any machine: cross-compiled and run under qemu, held to the reference.

Debian: apt-get install g++-aarch64-linux-gnu qemu-user
"""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from oracle import by_reference

from halfbyte import ops

ROOT = Path(__file__).resolve().parents[2]
COMPILER, EMULATOR = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
CASES = [  # heads, kv_heads, queries, keys, head_dim, window, softcap
    (2, 1, 1, 1, 32, 0, 0.0),
    (3, 1, 65, 65, 64, 0, 0.0),
    (2, 2, 17, 130, 80, 0, 0.0),
    (2, 1, 100, 100, 33, 9, 4.0),
    (4, 2, 50, 50, 256, 0, 0.0),
]


def case(dtype: torch.dtype, *sizes: float) -> bytes:
    heads, kv_heads, queries, keys, head_dim, window, softcap = sizes
    q, dout = (torch.randn(2, int(queries), int(heads), int(head_dim)).to(dtype) for _ in range(2))
    k, v = (torch.randn(2, int(keys), int(kv_heads), int(head_dim)).to(dtype) for _ in range(2))
    starts = (torch.arange(int(queries)) // 20 * 20).expand(2, -1).int().contiguous()
    scale = head_dim**-0.5
    rows = [x.float().transpose(1, 2) for x in (q, k, v)]
    out, logsumexp = by_reference(ops.attention, *rows, starts, scale, int(window), softcap)
    saved = *rows, out, logsumexp, starts, scale, int(window), softcap
    gradients = by_reference(ops.attention_backward, dout.float().transpose(1, 2), *saved)
    tolerance = 1e-4 if dtype == torch.float32 else 0.05
    head = torch.tensor([2, heads, kv_heads, queries, keys, head_dim, int(dtype == torch.bfloat16), window]).long()
    expected = [out.transpose(1, 2), logsumexp, *(x.transpose(1, 2) for x in gradients)]
    arrays = [head, torch.tensor([scale, softcap, tolerance]), q, k, v, dout, starts, *expected]
    return b"".join(bytes(x.contiguous().view(-1).view(torch.uint8).numpy()) for x in arrays)


@pytest.mark.skipif(
    COMPILER is None or EMULATOR is None,
    reason="aarch64-linux-gnu-g++ or qemu-aarch64 is missing (packages g++-aarch64-linux-gnu and qemu-user)",
)
@pytest.mark.parametrize("instruction_set", ["neon", "portable"])
def test_near_the_reference_under_emulation(instruction_set: str, tmp_path: Path) -> None:
    cases = [case(dtype, *sizes) for dtype in (torch.float32, torch.bfloat16) for sizes in CASES]
    (tmp_path / "cases").write_bytes(b"".join(cases))
    kernels = sorted((ROOT / "csrc" / "kernels").glob("*.cpp"))
    sources = [*kernels, ROOT / "csrc/threads.cpp", ROOT / "tests/ops/attention_driver.cpp"]
    flags = ["-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-ffp-contract=off", "-static"]
    driver = str(tmp_path / "driver")
    build = [str(COMPILER), *flags, f"-DHALFBYTE_ISA={instruction_set}", *map(str, sources), "-o", driver]
    built = subprocess.run(build, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    ran = subprocess.run([str(EMULATOR), driver, str(tmp_path / "cases")], capture_output=True, text=True, check=False)
    assert ran.stdout == f"{instruction_set}: {len(cases)} cases, 0 wrong\n", ran.stderr
