"""The only folder that knows transformers and PEFT: models in, adapters on."""

from halfbyte.huggingface.attention import attention_calls
from halfbyte.huggingface.install_attention import use_attention
from halfbyte.huggingface.load import load_model, load_tokenizer
from halfbyte.huggingface.peft import add_lora
from halfbyte.huggingface.quantizer import QuantizationConfig

__all__ = ["QuantizationConfig", "add_lora", "attention_calls", "load_model", "load_tokenizer", "use_attention"]
