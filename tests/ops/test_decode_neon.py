"""decode_token on aarch64, on any machine: cross-compiled and run under qemu, held to the reference.

Debian: apt-get install g++-aarch64-linux-gnu qemu-user
"""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from oracle import CODEBOOKS_16, by_reference

from halfbyte import ops
from halfbyte.quant import quantize_4bit

ROOT = Path(__file__).resolve().parents[2]
COMPILER, EMULATOR = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
CAPACITY, EPSILON = 24, 1e-5
CASES = [  # hidden, intermediate, heads, kv_heads, head_dim, vocabulary, position, block_size, rank
    (64, 96, 4, 2, 16, 33, 0, 64, 0),
    (128, 160, 2, 1, 32, 50, 20, 32, 16),
    (35, 57, 3, 1, 10, 17, 7, 64, 16),
]


def case(*sizes: int) -> bytes:
    hidden, intermediate, heads, kv_heads, head_dim, vocabulary, position, block_size, rank = sizes
    queries, cached = heads * head_dim, kv_heads * head_dim
    linears = []
    for out, into in (
        *((queries, hidden), (cached, hidden), (cached, hidden), (hidden, queries)),
        *((intermediate, hidden), (intermediate, hidden), (hidden, intermediate)),
    ):
        weight = quantize_4bit(torch.randn(out, into) * into**-0.5, "nf4", block_size, False)
        lora = (torch.randn(rank, into) * into**-0.5).bfloat16(), (torch.randn(out, rank) / 8).bfloat16()
        assert isinstance(weight.absmax, torch.Tensor)
        codebook = CODEBOOKS_16["nf4"]
        shape = out, into
        linears.append(
            ops.DecodeLinear(weight.packed, weight.absmax, None, codebook, block_size, shape, torch.randn(out), lora)
        )
    norms = [torch.rand(hidden) + 0.5 for _ in range(3)]
    embedding, head = torch.randn(2, vocabulary, hidden).bfloat16()
    layer = ops.DecodeLayer(norms[0], norms[1], *linears)
    model = ops.DecodeModel((layer,), norms[2], embedding, head, heads, kv_heads, head_dim, EPSILON, head_dim**-0.5)
    keys, values = torch.randn(2, 1, kv_heads, CAPACITY, head_dim).bfloat16()
    angle = torch.rand(head_dim) * 6
    cos, sin = angle.cos(), angle.sin()
    logits = by_reference(ops.decode_token, model, 3, cos, sin, keys.clone(), values.clone(), position)
    head_sizes = [hidden, intermediate, heads, kv_heads, head_dim, vocabulary, CAPACITY, position, block_size, rank]
    arrays = [torch.tensor(head_sizes), torch.tensor([EPSILON, head_dim**-0.5]), CODEBOOKS_16["nf4"]]
    for linear in linears:
        assert linear.bias is not None
        assert linear.lora is not None
        arrays += [linear.packed, linear.absmax, linear.bias, *linear.lora]
    arrays += [*norms, embedding[3], head, cos, sin, keys, values, logits]
    return b"".join(bytes(x.contiguous().view(-1).view(torch.uint8).numpy()) for x in arrays)


@pytest.mark.skipif(
    COMPILER is None or EMULATOR is None,
    reason="aarch64-linux-gnu-g++ or qemu-aarch64 is missing (packages g++-aarch64-linux-gnu and qemu-user)",
)
@pytest.mark.parametrize("instruction_set", ["neon", "portable"])
def test_near_the_reference_under_emulation(instruction_set: str, tmp_path: Path) -> None:
    (tmp_path / "cases").write_bytes(b"".join(case(*sizes) for sizes in CASES))
    kernels = sorted((ROOT / "csrc" / "kernels").glob("*.cpp"))
    sources = [*kernels, ROOT / "csrc/threads.cpp", ROOT / "tests/ops/decode_driver.cpp"]
    flags = ["-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-ffp-contract=off", "-static"]
    driver = str(tmp_path / "driver")
    build = [str(COMPILER), *flags, f"-DHALFBYTE_ISA={instruction_set}", *map(str, sources), "-o", driver]
    built = subprocess.run(build, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    ran = subprocess.run([str(EMULATOR), driver, str(tmp_path / "cases")], capture_output=True, text=True, check=False)
    assert ran.stdout == f"{instruction_set}: {len(CASES)} cases, 0 wrong\n", ran.stderr
