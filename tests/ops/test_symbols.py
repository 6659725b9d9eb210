"""No kernel may leave the linker a choice: a function emitted under AVX-512 and shared by name with a baseline one
could be the copy that is kept, and would crash an older machine."""

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[2] / "csrc"
COMPILER, LISTER = shutil.which("c++"), shutil.which("nm")
X86 = platform.machine() == "x86_64"


@pytest.mark.skipif(COMPILER is None or LISTER is None, reason="c++ or nm is missing")
@pytest.mark.parametrize("kernel", sorted(path.name for path in (CSRC / "kernels").glob("*.cpp")))
def test_kernels_define_only_what_is_their_own(kernel: str, tmp_path: Path) -> None:
    flags = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mf16c"] if X86 else []
    name = "avx512" if X86 else "portable"
    compiled = str(tmp_path / "kernel.o")
    source = str(CSRC / "kernels" / kernel)
    compile_it = [
        COMPILER or "",
        "-std=c++17",
        "-O0",
        "-fno-exceptions",
        *flags,
        f"-DHALFBYTE_ISA={name}",
        "-c",
        source,
        "-o",
        compiled,
    ]
    subprocess.run(compile_it, check=True)
    list_it = [LISTER or "", "--defined-only", "-P", compiled]
    listing = subprocess.run(list_it, capture_output=True, text=True, check=True).stdout
    kind_of = dict(line.split()[:2] for line in listing.splitlines())
    assert not [symbol for symbol, kind in kind_of.items() if kind in "VvWwu"]  # weak or unique: the linker's choice
    seen_outside = [symbol for symbol, kind in kind_of.items() if kind.isupper()]
    assert seen_outside
    assert all(symbol.startswith(f"_ZN8halfbyte{len(name)}{name}") for symbol in seen_outside)
