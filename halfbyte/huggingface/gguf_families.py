"""What llama.cpp calls the models that it shares with transformers: their hyperparameters, tensors and values.

A family is known here when llama.cpp computes what transformers computes, from the same numbers but for three things:

    q, k of Llama's     llama.cpp rotates neighbours where transformers rotates halves, so the rows of each head change
                        places: (2, d/2) becomes (d/2, 2)
    norms of Gemma's    transformers multiplies by 1 + w, llama.cpp by what is in the file
    rotary factors      llama.cpp computes its frequencies itself, and reads by what to divide them (`rope_freqs`)

What a configuration asks for and llama.cpp does not do is refused, or where it shows in long texts alone, noted.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, GGUFWriter, RopeScalingType, get_tensor_name_map
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from halfbyte.errors import HalfbyteError

Transform = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Family:
    """How llama.cpp has a model_type of transformers."""

    arch: MODEL_ARCH
    activation: str = "silu"
    rotates_neighbours: bool = False
    norms_from_zero: bool = False  # transformers adds 1 to what it multiplies by
    layer_pattern: int | None = None  # every so-manieth layer sees everything, the others a window


_GEMMA = "gelu_pytorch_tanh"
FAMILIES = {
    "llama": Family(MODEL_ARCH.LLAMA, rotates_neighbours=True),  # and SmolLM, SmolLM2
    "mistral": Family(MODEL_ARCH.LLAMA, rotates_neighbours=True),
    "smollm3": Family(MODEL_ARCH.SMOLLM3, rotates_neighbours=True),
    "qwen2": Family(MODEL_ARCH.QWEN2),
    "qwen3": Family(MODEL_ARCH.QWEN3),
    "gemma": Family(MODEL_ARCH.GEMMA, _GEMMA, norms_from_zero=True),
    "gemma2": Family(MODEL_ARCH.GEMMA2, _GEMMA, norms_from_zero=True, layer_pattern=2),
    "gemma3_text": Family(MODEL_ARCH.GEMMA3, _GEMMA, norms_from_zero=True, layer_pattern=6),
    "phi3": Family(MODEL_ARCH.PHI3),
}
_TOLD = "Llama, Mistral, SmolLM, Qwen2, Qwen3, Gemma, Gemma 2, Gemma 3 (text) and Phi-3"


@dataclass(frozen=True)
class GgufLayout:
    """Where a model's parameters go in a .gguf file, and what llama.cpp wants beside them."""

    arch: MODEL_ARCH
    architecture: str  # the same as a word
    names: dict[str, str]  # the model's name of a parameter -> the file's
    transforms: dict[str, Transform]  # the model's name -> what is done to its values
    extra: dict[str, Tensor] = field(default_factory=dict)  # the file's name -> what is no parameter of the model
    notes: list[str] = field(default_factory=list)


def family_of(config: PreTrainedConfig, where: str) -> Family:
    """Raises HalfbyteError: llama.cpp is not known to compute such a model, or this one of its kind."""
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise HalfbyteError(
            f"{where} is a model of the type {config.model_type!r}, which is not written as GGUF; {_TOLD} are."
        )
    activation = getattr(config, "hidden_act", None) or getattr(config, "hidden_activation", None)
    if activation != family.activation:
        raise HalfbyteError(
            f"{where} has the activation {activation!r} where llama.cpp computes {family.activation!r} for a"
            f" {config.model_type}; it cannot be written as GGUF."
        )
    _check_attention(config, family, where)
    return family


def gguf_layout(model: PreTrainedModel, where: str, tied: Collection[str] = ()) -> GgufLayout:
    """Names and transforms of all parameters of a model, on the meta device too.

    Args:
        tied: parameters that are one tensor: the output layer, and the embedding that is written for both.

    Raises:
        HalfbyteError: llama.cpp does not have such a model, or has no place for one of its parameters.
    """
    config = model.config
    family = family_of(config, where)
    table = get_tensor_name_map(family.arch, config.num_hidden_layers)
    names: dict[str, str] = {}
    transforms: dict[str, Transform] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        stem, _, suffix = name.rpartition(".")
        found = "token_embd" if name in tied else table.get_name(stem)
        if found is None or suffix not in ("weight", "bias"):
            raise HalfbyteError(f"{where}: llama.cpp has no place for {name} in a {config.model_type}.")
        names[name] = f"{found}.{suffix}"
        heads = _rotated_heads(config, family, stem)
        if heads is not None:
            transforms[name] = _interleaved(heads, parameter.shape[0])
        elif family.norms_from_zero and stem.endswith("norm"):
            transforms[name] = _plus_one
    extra, notes = _rotary_tensors(config), []
    window = getattr(config, "sliding_window", None)
    if window and family.layer_pattern is None and getattr(config, "use_sliding_window", True):
        notes.append(
            f"the model's attention looks back {window:,} tokens, and llama.cpp's over all of them for this family:"
            " longer texts get other answers there"
        )
    return GgufLayout(family.arch, MODEL_ARCH_NAMES[family.arch], names, transforms, extra, notes)


def write_hyperparameters(writer: GGUFWriter, config: PreTrainedConfig) -> None:
    """The model's sizes and constants, under llama.cpp's keys."""
    family = FAMILIES[config.model_type]
    head_dim = _head_dim(config)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    rope = _rope(config)
    writer.add_rope_dimension_count(int(head_dim * (rope.get("partial_rotary_factor") or 1.0)))
    writer.add_rope_freq_base(rope["rope_theta"])
    if family.arch == MODEL_ARCH.GEMMA3:
        writer.add_rope_freq_base_swa(config.rope_parameters["sliding_attention"]["rope_theta"])
    if family.arch == MODEL_ARCH.GEMMA2:
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
    if getattr(config, "final_logit_softcapping", None):
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if family.layer_pattern is not None:
        writer.add_sliding_window(config.sliding_window)
        writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in config.layer_types])
    elif family.arch == MODEL_ARCH.PHI3:
        writer.add_sliding_window(config.sliding_window or 0)
    _write_rope_scaling(writer, config, rope)


def _write_rope_scaling(writer: GGUFWriter, config: PreTrainedConfig, rope: dict[str, Any]) -> None:
    kind = rope.get("rope_type", "default")
    original = rope.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)
    if config.model_type == "phi3":
        writer.add_rope_scaling_orig_ctx_len(original or config.max_position_embeddings)
    if kind == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    elif kind == "yarn":
        _, attention_factor = ROPE_INIT_FUNCTIONS["yarn"](config, torch.device("cpu"))
        writer.add_rope_scaling_type(RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(original or config.max_position_embeddings)
        # llama.cpp multiplies its own scale of the logits by what is said here.
        own = 1.0 + 0.1 * float(torch.tensor(rope["factor"]).log())
        writer.add_rope_scaling_attn_factors(attention_factor / own)
        writer.add_rope_scaling_yarn_beta_fast(rope.get("beta_fast") or 32.0)
        writer.add_rope_scaling_yarn_beta_slow(rope.get("beta_slow") or 1.0)
    elif kind == "longrope":
        _, attention_factor = ROPE_INIT_FUNCTIONS["longrope"](config, torch.device("cpu"), seq_len=1)
        writer.add_rope_scaling_attn_factors(attention_factor)


def _rotary_tensors(config: PreTrainedConfig) -> dict[str, Tensor]:
    """By what llama.cpp divides its frequencies: float32, one for each pair of a head."""
    rope = _rope(config)
    kind = rope.get("rope_type", "default")
    if kind == "llama3":
        scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
        size = 2 * len(scaled)
        plain = 1.0 / rope["rope_theta"] ** (torch.arange(0, size, 2, dtype=torch.float32) / size)
        return {"rope_freqs.weight": plain / scaled}
    if kind == "longrope":
        return {
            f"rope_factors_{name}.weight": torch.tensor(rope[f"{name}_factor"], dtype=torch.float32)
            for name in ("long", "short")
        }
    return {}


def _rope(config: PreTrainedConfig) -> dict[str, Any]:
    """Of the layers that see everything, where there are two kinds."""
    rope: dict[str, Any] = config.rope_parameters.get("full_attention", config.rope_parameters)
    return rope


def _check_attention(config: PreTrainedConfig, family: Family, where: str) -> None:
    rope = _rope(config)
    kind = rope.get("rope_type", "default")
    known = {"default", "linear", "yarn"} | {"longrope" if family.arch == MODEL_ARCH.PHI3 else "llama3"}
    if kind not in known:
        raise HalfbyteError(f"{where} has rotary positions of the type {kind!r}, which GGUF has no words for.")
    partial = (rope.get("partial_rotary_factor") or 1.0) != 1.0
    if partial and family.arch != MODEL_ARCH.PHI3:
        raise HalfbyteError(f"{where} rotates a part of each head, which llama.cpp does not for a {config.model_type}.")
    if family.arch == MODEL_ARCH.SMOLLM3:
        expected = [int((layer + 1) % 4 != 0) for layer in range(config.num_hidden_layers)]
        if list(config.no_rope_layers) != expected:
            raise HalfbyteError(f"{where} rotates other layers than llama.cpp does, which leaves out every fourth.")
    if family.layer_pattern is not None:
        scale, largest = config.query_pre_attn_scalar, config.num_hidden_layers in (46, 62)
        expected_scale = config.hidden_size // config.num_attention_heads if largest else _head_dim(config)
        if scale != expected_scale:
            raise HalfbyteError(
                f"{where} divides its attention by the root of {scale}, and llama.cpp by that of {expected_scale}."
            )
    if getattr(config, "use_bidirectional_attention", False):
        raise HalfbyteError(f"{where} has attention in both directions, which llama.cpp has for embeddings alone.")


def _head_dim(config: PreTrainedConfig) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _rotated_heads(config: PreTrainedConfig, family: Family, stem: str) -> int | None:
    if not family.rotates_neighbours:
        return None
    if stem.endswith(".q_proj"):
        return int(config.num_attention_heads)
    return int(config.num_key_value_heads) if stem.endswith(".k_proj") else None


def _interleaved(heads: int, rows: int) -> Transform:
    """Rows of each head from (first half, second half) to pairs of one of each."""
    order = torch.arange(rows).reshape(heads, 2, -1).transpose(1, 2).flatten()
    return lambda tensor: tensor[order]


def _plus_one(tensor: Tensor) -> Tensor:
    return tensor.float() + 1.0
