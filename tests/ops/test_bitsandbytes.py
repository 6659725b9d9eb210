"""Our bytes against bitsandbytes' own, live, in the environment `make` builds for peers (.peers)."""

import os
import subprocess
from pathlib import Path

import pytest
import torch
from oracle import CODEBOOKS_16, CODEBOOKS_256, DTYPES
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from halfbyte import _C, ops

ROOT = Path(__file__).resolve().parents[2]
PEER = ROOT / ".peers" / "bin" / "python"
MODEL = ROOT / ".peers" / "smollm2" / "model.safetensors"

pytestmark = pytest.mark.skipif(not PEER.exists(), reason=f"no environment with bitsandbytes at {PEER}")


def inputs() -> dict[str, Tensor]:
    tensors = {}
    for dtype in DTYPES:
        tiny = torch.randn(4096) * torch.logspace(-44, 0, 4096)  # some blocks all denormal
        tensors |= {
            f"normal {dtype}": torch.randn(512, 512).to(dtype),
            f"tiny {dtype}": torch.cat([torch.zeros(4096), tiny]).to(dtype),
            f"short {dtype}": torch.randn(64 * 63 + 11).to(dtype),
        }
    # A step of AdamW: parameter, gradient, and for each moment its codes and their absmax.
    moments = [t for _ in range(2) for t in (torch.randint(256, (10_000,), dtype=torch.uint8), torch.rand(40))]
    step = [torch.randn(10_000), torch.randn(10_000), *moments]
    tensors |= {f"adamw {index}": tensor for index, tensor in enumerate(step)}
    if MODEL.exists():
        with safe_open(MODEL, framework="pt") as file:
            for name in [name for name in sorted(file.keys()) if "proj" in name][::100]:
                tensors[f"real {name}"] = file.get_tensor(name)
                tensors[f"real {name} float32"] = file.get_tensor(name).float()
    return tensors


@pytest.fixture(scope="module")
def exchange(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors given, and what bitsandbytes made of them."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("peer")
    given = inputs()
    save_file(given, folder / "given")
    script = Path(__file__).with_name("bitsandbytes_peer.py")
    arguments = [PEER, script, ROOT, Path(_C.__file__).parent, folder / "given", folder / "got"]
    environment = os.environ | {"TORCHDYNAMO_DISABLE": "1"}  # bitsandbytes would compile its fallbacks shape by shape
    command = [str(argument) for argument in arguments]
    ran = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    return given, load_file(folder / "got")


def test_codebooks(exchange: tuple[dict[str, Tensor], dict[str, Tensor]]) -> None:
    got = exchange[1]
    for name, codebook in {**CODEBOOKS_16, **CODEBOOKS_256}.items():
        if name != "int4":  # bitsandbytes defines that table and cannot build it
            assert torch.equal(codebook, got[name])


@pytest.mark.parametrize("block_size", [32, 64, 256, 4096])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_codes_absmax_and_values(
    exchange: tuple[dict[str, Tensor], dict[str, Tensor]], quant_type: str, block_size: int
) -> None:
    given, got = exchange
    codebook = CODEBOOKS_16[quant_type]
    for name, values in given.items():
        if name.startswith("adamw "):
            continue
        key = f"{name}|{quant_type}|{block_size}"
        packed, absmax = ops.quantize_4bit(values, codebook, block_size)
        assert torch.equal(absmax, got[f"{key}|absmax"]), key
        theirs = got[f"{key}|packed"]
        whole = values.numel() // block_size * block_size
        assert torch.equal(packed[: whole // 2], theirs[: whole // 2]), key

        # In a short last block bitsandbytes' CPU code divides by absmax instead of multiplying by its inverse, which
        # can move a value across a midpoint by a rounding; both codes are then equally near.
        def restored(codes: Tensor, absmax: Tensor = absmax, like: Tensor = values) -> Tensor:
            return ops.dequantize_4bit(codes, absmax, codebook, block_size, list(like.shape), torch.float32)

        distance, their_distance = ((restored(codes) - values.float()).abs() for codes in (packed, theirs))
        assert (distance - their_distance).abs().max() <= 1e-6 * absmax.max(), key
        # bitsandbytes' CPU code reads the wrong absmax where a block straddles two rows.
        if values.shape[-1] % min(block_size, values.numel()) == 0:
            assert torch.equal(restored(theirs), got[f"{key}|restored"]), key


def test_dequantize_8bit(exchange: tuple[dict[str, Tensor], dict[str, Tensor]]) -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    values = ops.dequantize_8bit(codes, torch.tensor([0.3]), CODEBOOKS_256["signed"], 256)
    assert torch.equal(values, exchange[1]["dequantize_8bit"])


def test_adamw_8bit_step(exchange: tuple[dict[str, Tensor], dict[str, Tensor]]) -> None:
    """The same step from the same state. Their codes are now and then a neighbour, for their search is not exact."""
    given, got = exchange
    ours, theirs = ([tensors[f"adamw {index}"].clone() for index in range(6)] for tensors in (given, got))
    ops.adamw_8bit_step(*([tensor] for tensor in ours), 1e-2, 0.9, 0.999, 1e-8, 0.1, 5)
    assert not torch.equal(theirs[0], given["adamw 0"])
    for index in (0, 1, 3, 5):
        torch.testing.assert_close(ours[index], theirs[index], rtol=1e-5, atol=1e-6)
    for index, kind in ((2, "signed"), (4, "unsigned")):
        codebook = CODEBOOKS_256[kind]
        assert (ours[index] != theirs[index]).float().mean() < 0.03
        coarsest = codebook.diff().max()
        distance = codebook[ours[index].long()] - codebook[theirs[index].long()]
        assert distance.abs().max() <= coarsest * 1.001
