"""Tiny models with random weights and a tiny tokenizer, saved as directories the way the hub has them."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import MODEL_ARCH, GGMLQuantizationType, GGUFWriter, get_tensor_name_map
from gguf.quants import quantize
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

SPECIAL_TOKENS = ("<|im_start|>", "<|im_end|>", "<pad>")
VOCABULARY_SIZE = 256 + len(SPECIAL_TOKENS)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY_SIZE,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "pad_token_id": VOCABULARY_SIZE - 1,
    "bos_token_id": VOCABULARY_SIZE - 3,
    "eos_token_id": VOCABULARY_SIZE - 2,
}
# Of whose names each architecture has its own.
_EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_GEMMA = {"query_pre_attn_scalar": 8, "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}

# model_type -> what its configuration has beside the sizes, or instead of them. Between them: tied and untied output
# layers, biases, fused projections, Conv1D, soft-capped logits, scaled logits, parallel blocks, experts.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 16},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {},
    "gemma2": _GEMMA | {"final_logit_softcapping": 5.0, "attn_logit_softcapping": 5.0},
    "gemma3_text": _GEMMA,
    "phi3": {"tie_word_embeddings": False},
    "gpt_neox": {},
    "gpt2": {},
    "opt": {"ffn_dim": 56, "word_embed_proj_dim": 32, "do_layer_norm_before": True},
    "falcon": {"new_decoder_architecture": False, "multi_query": True, "parallel_attn": True, "bias": False},
    "granite": {"logits_scaling": 4.0, "residual_multiplier": 0.5, "embedding_multiplier": 2.0},
    "mixtral": _EXPERTS,
    "qwen3_moe": _EXPERTS,
    "gpt_oss": _EXPERTS | {"sliding_window": 16, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
}


def build_model(model_type: str = "llama", dtype: torch.dtype = torch.bfloat16, **settings: Any) -> PreTrainedModel:
    """A model of a known architecture with random weights, larger than an untrained model's: its outputs differ."""
    values = _SIZES | ARCHITECTURES.get(model_type, {}) | settings
    if model_type == "falcon":
        del values["head_dim"]  # a property there
    config = AutoConfig.for_model(model_type, **values)
    generator = torch.Generator().manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.2 * noise + (1.0 if "norm" in name or "ln_" in name else 0.0))
    return model.to(dtype).eval()


def build_tokenizer(chat_template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """A token for each byte, without merges, in ChatML."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=chat_template,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<pad>",
    )


def save_model(
    directory: Path,
    model_type: str = "llama",
    max_shard_size: str = "5GB",
    chat_template: str | None = CHATML,
    **settings: Any,
) -> Path:
    """Write a tiny model and its tokenizer; the directory."""
    build_model(model_type, **settings).save_pretrained(directory, max_shard_size=max_shard_size)
    build_tokenizer(chat_template).save_pretrained(directory)
    return directory


def save_gguf(file: Path, kind: str = "F16", **changes: Any) -> PreTrainedModel:
    """Write a tiny Llama as llama.cpp's converter does, its matrices as `kind` (F32, F16, BF16, Q8_0, Q4_0, …).

    Returns the model that was written.
    """
    model = build_model("llama", torch.float32, intermediate_size=64, **changes)
    config, tokenizer = model.config, build_tokenizer()
    writer = GGUFWriter(file, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(VOCABULARY_SIZE)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokenizer.convert_ids_to_tokens(range(VOCABULARY_SIZE)))
    writer.add_token_scores([0.0] * VOCABULARY_SIZE)  # merges follow from the scores, and single bytes have none
    writer.add_token_types([1] * 256 + [3] * len(SPECIAL_TOKENS))
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_chat_template(CHATML)
    names = get_tensor_name_map(MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        stem, _, suffix = name.rpartition(".")
        values = tensor.numpy()
        for projection, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            if projection in name:  # llama.cpp pairs neighbours where transformers pairs halves
                values = values.reshape(heads, 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
        quantization = GGMLQuantizationType[kind if values.ndim == 2 else "F32"]
        blocks = quantize(np.ascontiguousarray(values), quantization)
        writer.add_tensor(f"{names.get_name(stem)}.{suffix}", blocks, raw_dtype=quantization)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model
