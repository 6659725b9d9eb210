"""The aarch64 kernels, on any machine: cross-compiled, run under qemu, held to the reference byte for byte.

Debian: apt-get install g++-aarch64-linux-gnu qemu-user
"""

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from oracle import CODEBOOKS_16, CODEBOOKS_256, DTYPES, by_reference, hostile_values

from halfbyte import ops

ROOT = Path(__file__).resolve().parents[2]
COMPILER, EMULATOR = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
# (rows, out, in, block_size, rank) of products.
MATMULS = ((1, 40, 64, 64, 8), (7, 33, 96, 32, 0), (9, 50, 131, 32, 5), (30, 64, 128, 64, 16), (13, 1, 600, 4096, 3))
SIZES = (0, 1, 2, 31, 32, 33, 63, 64, 65, 1000, 4097)

pytestmark = pytest.mark.skipif(
    COMPILER is None or EMULATOR is None,
    reason="aarch64-linux-gnu-g++ or qemu-aarch64 is missing (packages g++-aarch64-linux-gnu and qemu-user)",
)


def case(op: int, dtype: torch.dtype, n: int, block_size: int, codebook: torch.Tensor, *arrays: torch.Tensor) -> bytes:
    head = torch.tensor([op, DTYPES.index(dtype), n, block_size, len(codebook)])
    return b"".join(bytes(t.contiguous().view(-1).view(torch.uint8).numpy()) for t in (head, codebook, *arrays))


def cases() -> Iterator[bytes]:
    f32 = torch.float32
    for n in SIZES:
        for block_size in (32, 64, 4096):
            for codebook in CODEBOOKS_16.values():
                for dtype in DTYPES:
                    values = (torch.randn(n) if dtype == torch.float16 else hostile_values(n, codebook)).to(dtype)
                    packed, absmax = by_reference(ops.quantize_4bit, values, codebook, block_size)
                    restored = by_reference(ops.dequantize_4bit, packed, absmax, codebook, block_size, [n], dtype)
                    yield case(0, dtype, n, block_size, codebook, values, packed, absmax)
                    yield case(2, dtype, n, block_size, codebook, packed, absmax, restored)
            for codebook in CODEBOOKS_256.values():
                values = hostile_values(n, codebook)
                codes, absmax = by_reference(ops.quantize_8bit, values, codebook, block_size)
                restored = by_reference(ops.dequantize_8bit, codes, absmax, codebook, block_size)
                yield case(1, f32, n, block_size, codebook, values, codes, absmax)
                yield case(3, f32, n, block_size, codebook, codes, absmax, restored)


def integers(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randint(-4, 5, (rows, columns)).to(dtype)


def matmul_cases() -> Iterator[bytes]:
    """Small multiples of powers of two: every product and sum is exact, so the order of summation cannot show."""
    codebook = torch.arange(-8, 8) / 8
    for rows, out, into, block_size, rank in MATMULS:
        packed = torch.randint(256, ((out * into + 1) // 2,), dtype=torch.uint8)
        absmax = 2.0 ** torch.randint(-1, 2, (-(-out * into // block_size),))
        for dtype in DTYPES:
            weight = by_reference(ops.dequantize_4bit, packed, absmax, codebook, block_size, [out, into], dtype)
            for transpose in (False, True):
                factor = weight if transpose else weight.t()
                x = integers(rows, len(factor), dtype)
                left, right = integers(rows, rank, dtype), integers(rank, factor.shape[1], dtype)
                y = (x.double() @ factor.double() + left.double() @ right.double()).to(dtype)
                shape = torch.tensor([rows, out, into, transpose, rank]).view(torch.uint8)
                padded = [F.pad(t, (0, t.shape[1] % 2)) for t in (x, left)]
                arrays = shape, padded[0], packed, absmax, padded[1], right if transpose else right.t(), y
                yield case(4, dtype, out * into, block_size, codebook, *arrays)


def adamw_cases() -> Iterator[bytes]:
    """With both betas 0 the moments are g and g², so their codes are known to the bit."""
    signed, unsigned = CODEBOOKS_256["signed"], CODEBOOKS_256["unsigned"]
    for n in SIZES[1:]:
        grad = hostile_values(n, signed)
        first = by_reference(ops.quantize_8bit, grad, signed, 256)
        second = by_reference(ops.quantize_8bit, grad * grad, unsigned, 256)
        yield case(5, torch.float32, n, 256, signed, unsigned, grad, *first, *second)


@pytest.fixture(scope="module")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("golden") / "cases"
    path.write_bytes(b"".join([*cases(), *matmul_cases(), *adamw_cases()]))
    return path


@pytest.mark.parametrize("instruction_set", ["neon", "portable"])
def test_equals_reference_under_emulation(instruction_set: str, golden: Path, tmp_path: Path) -> None:
    kernels = sorted((ROOT / "csrc" / "kernels").glob("*.cpp"))
    sources = [*kernels, ROOT / "csrc/codebook.cpp", ROOT / "csrc/threads.cpp", ROOT / "tests/ops/golden_driver.cpp"]
    flags = ["-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-ffp-contract=off", "-static"]
    driver = tmp_path / "driver"
    assert COMPILER is not None
    assert EMULATOR is not None
    build = [COMPILER, *flags, f"-DHALFBYTE_ISA={instruction_set}", *map(str, sources), "-o", str(driver)]
    built = subprocess.run(build, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    ran = subprocess.run([EMULATOR, str(driver), str(golden)], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    count = len(SIZES) * 3 * (len(CODEBOOKS_16) * len(DTYPES) * 2 + len(CODEBOOKS_256) * 2)
    count += len(MATMULS) * len(DTYPES) * 2 + len(SIZES) - 1
    assert ran.stdout == f"{instruction_set}: {count} cases, 0 wrong\n"
