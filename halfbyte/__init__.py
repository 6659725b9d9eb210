"""QLoRA fine-tuning: it fits, it is fast, it is right, and what it makes is kept.

The public names; nothing is defined here. Each is imported when it is first asked for, so that
`halfbyte --help` does not wait for torch and transformers.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from halfbyte import optim
    from halfbyte.config import FinetuneConfig
    from halfbyte.errors import HalfbyteError
    from halfbyte.huggingface import QuantizationConfig, accelerate_model, add_lora, load_model
    from halfbyte.nn import Linear4bit
    from halfbyte.quant import QuantizedTensor, quantize_4bit
    from halfbyte.recipes.finetune import RunResult, finetune
    from halfbyte.recipes.merge import MergeResult, merge

_HOME = {
    "FinetuneConfig": "halfbyte.config",
    "HalfbyteError": "halfbyte.errors",
    "Linear4bit": "halfbyte.nn",
    "MergeResult": "halfbyte.recipes.merge",
    "QuantizationConfig": "halfbyte.huggingface",
    "QuantizedTensor": "halfbyte.quant",
    "RunResult": "halfbyte.recipes.finetune",
    "accelerate_model": "halfbyte.huggingface",
    "add_lora": "halfbyte.huggingface",
    "finetune": "halfbyte.recipes.finetune",
    "load_model": "halfbyte.huggingface",
    "merge": "halfbyte.recipes.merge",
    "quantize_4bit": "halfbyte.quant",
}

__all__ = [
    "FinetuneConfig",
    "HalfbyteError",
    "Linear4bit",
    "MergeResult",
    "QuantizationConfig",
    "QuantizedTensor",
    "RunResult",
    "accelerate_model",
    "add_lora",
    "finetune",
    "load_model",
    "merge",
    "optim",
    "quantize_4bit",
]


def __getattr__(name: str) -> Any:
    if name == "optim":
        return importlib.import_module("halfbyte.optim")
    if name not in _HOME:
        raise AttributeError(f"module 'halfbyte' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
