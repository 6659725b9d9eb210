"""The only folder that knows transformers and PEFT: models in, adapters on."""

from halfbyte.huggingface.load import load_model, load_tokenizer
from halfbyte.huggingface.peft import add_lora
from halfbyte.huggingface.quantizer import QuantizationConfig

__all__ = ["QuantizationConfig", "add_lora", "load_model", "load_tokenizer"]
