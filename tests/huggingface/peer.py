"""Run by the interpreter of another environment, which has bitsandbytes (test_bitsandbytes_checkpoints.py).

    python peer.py FOLDER

FOLDER/weights and FOLDER/input_ids are given. Each sub-folder holds a `job` of one word and what it needs; results are
safetensors beside it. One process for all, since importing takes longer than the work.

    layer    weights as bitsandbytes' Linear4bit: `states` (module state dicts) and `dequantized`
    read     `model`, a 4-bit checkpoint, maybe with an `adapter`: its `dequantized` weights and `logits`
    write    `original`, a 16-bit model, to bitsandbytes' own checkpoint in `model`: its `dequantized` weights
"""

import json
import sys
from pathlib import Path

import bitsandbytes as bnb
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig


def dequantize(model: nn.Module) -> dict[str, Tensor]:
    # Before any forward: on a CPU bitsandbytes repacks its weights in the first one.
    return {
        name: bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state).float().clone()
        for name, module in model.named_modules()
        if isinstance(module, bnb.nn.Linear4bit)
    }


def layer(folder: Path, quant_type: str, double_quant: bool, storage: str) -> None:
    states, values = {}, {}
    for name, weight in load_file(folder.parent / "weights").items():
        settings = {"quant_type": quant_type, "compress_statistics": double_quant}
        linear = bnb.nn.Linear4bit(weight.shape[1], weight.shape[0], bias=False, **settings)
        linear.weight = bnb.nn.Params4bit(weight, requires_grad=False, **settings)
        linear = linear.to("cpu")
        values[name] = dequantize(nn.Sequential(linear))["0"]
        states |= {f"{name}|{key}": tensor.clone() for key, tensor in linear.state_dict().items()}
    save_file(states, folder / "states")
    save_file(values, folder / "dequantized")


def read(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.bfloat16)
    save_file(dequantize(model), folder / "dequantized")
    if (folder / "adapter").exists():
        model = PeftModel.from_pretrained(model, folder / "adapter")
    with torch.no_grad():
        logits = model(load_file(folder.parent / "input_ids")["input_ids"]).logits.float()
    save_file({"logits": logits.clone()}, folder / "logits")


def write(folder: Path, quant_type: str, double_quant: bool, storage: str) -> None:
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant_type,
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_quant_storage=getattr(torch, storage),
    )
    model = AutoModelForCausalLM.from_pretrained(folder / "original", quantization_config=config, dtype=torch.bfloat16)
    save_file(dequantize(model), folder / "dequantized")
    model.save_pretrained(folder / "model")


for path in sorted(Path(sys.argv[1]).glob("*/job")):
    job = json.loads(path.read_text())
    {"layer": layer, "read": read, "write": write}[job.pop("do")](path.parent, **job)
