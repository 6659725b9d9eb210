"""The only folder that knows transformers and PEFT: models in, adapters on."""

from halfbyte.huggingface.attention import attention_calls
from halfbyte.huggingface.install_attention import use_attention
from halfbyte.huggingface.load import load_model, load_tokenizer
from halfbyte.huggingface.patch import Replacement, accelerate_model, describe_replacements, replacements_of
from halfbyte.huggingface.peft import add_lora
from halfbyte.huggingface.quantizer import QuantizationConfig
from halfbyte.huggingface.tokenizer import prepare_tokenizer

__all__ = [
    "QuantizationConfig",
    "Replacement",
    "accelerate_model",
    "add_lora",
    "attention_calls",
    "describe_replacements",
    "load_model",
    "load_tokenizer",
    "prepare_tokenizer",
    "replacements_of",
    "use_attention",
]
