"""Run by the interpreter of another environment (test_bitsandbytes.py): bitsandbytes' results for given tensors.

    python bitsandbytes_peer.py ROOT C_EXTENSION_FOLDER INPUT OUTPUT

ROOT and the folder make our own sources importable there, so that halfbyte's `bitsandbytes` implementations run
against the real package as well; on the CPU, which bitsandbytes dispatches to behind the same op names.
"""

import sys

import bitsandbytes.functional as bnb
import torch
from safetensors.torch import load_file, save_file

root, extension_folder, source, target = sys.argv[1:]
sys.path.insert(0, root)
import halfbyte  # noqa: E402

halfbyte.__path__.append(extension_folder)

from halfbyte.ops.adamw_8bit_step.bitsandbytes import adamw_8bit_step  # noqa: E402
from halfbyte.ops.dequantize_4bit.bitsandbytes import dequantize_4bit  # noqa: E402
from halfbyte.ops.dequantize_8bit.bitsandbytes import dequantize_8bit  # noqa: E402
from halfbyte.ops.quantize_4bit.bitsandbytes import quantize_4bit  # noqa: E402

results = {"signed": bnb.create_dynamic_map(True), "unsigned": bnb.create_dynamic_map(False)}
given = load_file(source)
adamw = {name: given.pop(name) for name in sorted(given) if name.startswith("adamw ")}
adamw_8bit_step(*([tensor] for tensor in adamw.values()), 1e-2, 0.9, 0.999, 1e-8, 0.1, 5)
results |= adamw
for name, values in given.items():
    for quant_type in ("nf4", "fp4"):
        codebook = results[quant_type] = bnb.get_4bit_type(quant_type, device="cpu")
        for block_size in (32, 64, 256, 4096):
            key = f"{name}|{quant_type}|{block_size}"
            packed, state = bnb.quantize_4bit(values, blocksize=block_size, quant_type=quant_type)
            results[f"{key}|packed"], results[f"{key}|absmax"] = packed.view(-1), state.absmax
            ours = quantize_4bit(values, codebook, block_size)
            assert torch.equal(ours[0], packed.view(-1))
            assert torch.equal(ours[1], state.absmax)
            restored = dequantize_4bit(packed, state.absmax, codebook, block_size, list(values.shape), torch.float32)
            results[f"{key}|restored"] = restored.contiguous()

codes = torch.arange(256, dtype=torch.uint8)
results["dequantize_8bit"] = dequantize_8bit(codes, torch.tensor([0.3]), results["signed"], 256)
save_file({key: value.clone() for key, value in results.items()}, target)
