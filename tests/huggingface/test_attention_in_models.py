"""halfbyte's attention inside transformers' models: what they compute is what they computed before."""

import copy
import sys
from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.masking_utils import (
    and_masks,
    causal_mask_function,
    chunked_causal_mask_function,
    find_packed_sequence_indices,
    packed_sequence_compatibility_function,
    sdpa_mask,
    sliding_window_causal_mask_function,
)

from halfbyte import ops
from halfbyte.huggingface import attention_calls, attention_mask, use_attention
from halfbyte.huggingface.attention import reset_attention_calls

SMALL: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "mistral, window": ("mistral", {"sliding_window": 7}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "gemma2": ("gemma2", {"sliding_window": 8, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 2.0}),
    "gemma3": ("gemma3_text", {"sliding_window": 8, "query_pre_attn_scalar": 16, "num_hidden_layers": 6}),
    "phi3": ("phi3", {}),
    "gpt_neox": ("gpt_neox", {}),
    "granite": ("granite", {"attention_multiplier": 0.3}),
}


def tiny(name: str, dtype: torch.dtype = torch.float32, implementation: str | None = None) -> PreTrainedModel:
    model_type, changes = CONFIGS[name]
    torch.manual_seed(0)
    settings = {**SMALL, **changes}
    if model_type == "gpt_neox":
        settings = {key: value for key, value in settings.items() if key not in ("num_key_value_heads", "head_dim")}
    config = AutoConfig.for_model(model_type, **settings)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=implementation)
    return model.eval()


def with_ours(model: PreTrainedModel) -> PreTrainedModel:
    ours = copy.deepcopy(model)
    said = use_attention(ours)
    assert "halfbyte in place of" in said, said
    reset_attention_calls()
    return ours


def logits_and_gradients(model: PreTrainedModel, seen: Tensor, **inputs: Any) -> dict[str, Tensor]:
    model.zero_grad()
    logits = model(**inputs, use_cache=False).logits.float() * seen[..., None]
    logits.square().mean().backward()
    gradients = {n: p.grad.float() for n, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach(), **gradients}


def assert_close(got: dict[str, Tensor], want: dict[str, Tensor], relative: float) -> None:
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        error, size = (got[name] - tensor).abs().max(), tensor.abs().max()
        assert error <= relative * size + 1e-8, f"{name}: {error} of {size}"


def ids_of(rows: int, length: int) -> Tensor:
    return torch.randint(3, SMALL["vocab_size"], (rows, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("length", [1, 2, 17, 63, 130])
def test_float32_equals_the_models_own(name: str, length: int) -> None:
    theirs = tiny(name)
    ours = with_ours(theirs)
    inputs, seen = {"input_ids": ids_of(2, length)}, torch.ones(2, length)
    assert_close(logits_and_gradients(ours, seen, **inputs), logits_and_gradients(theirs, seen, **inputs), 2e-4)
    one_query = "eager: one query" if name == "gemma2" else "sdpa: one query"
    assert attention_calls() == {"halfbyte" if length > 1 else one_query: ours.config.num_hidden_layers}


@pytest.mark.parametrize("name", CONFIGS)
def test_right_padding(name: str) -> None:
    theirs = tiny(name)
    ours = with_ours(theirs)
    mask = torch.ones(3, 40, dtype=torch.long)
    mask[1, 25:] = 0
    mask[2, 3:] = 0
    inputs = {"input_ids": ids_of(3, 40), "attention_mask": mask, "position_ids": torch.arange(40).expand(3, -1)}
    assert_close(logits_and_gradients(ours, mask, **inputs), logits_and_gradients(theirs, mask, **inputs), 2e-4)
    assert set(attention_calls()) == {"halfbyte"}


@pytest.mark.parametrize("name", CONFIGS)
def test_packed_rows_do_not_see_each_other(name: str) -> None:
    """Packed, a row's logits are those of the row alone, and the gradients are the sum of theirs."""
    ours = with_ours(tiny(name))
    lengths, ids = (13, 1, 30, 20), ids_of(1, 64)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    packed = ours(input_ids=ids, position_ids=positions, use_cache=False).logits
    begin = 0
    for length in lengths:
        row = ids[:, begin : begin + length]
        alone = ours(input_ids=row, position_ids=torch.arange(length)[None], use_cache=False).logits
        torch.testing.assert_close(packed[:, begin : begin + length], alone, rtol=1e-4, atol=1e-3)
        begin += length


@pytest.mark.parametrize("name", CONFIGS)
def test_bfloat16_is_as_good_as_the_models_own(name: str) -> None:
    exact_model, theirs = tiny(name), tiny(name, torch.bfloat16)
    ours = with_ours(theirs)
    inputs, seen = {"input_ids": ids_of(2, 65)}, torch.ones(2, 65)
    exact = logits_and_gradients(exact_model, seen, **inputs)
    usual, got = (logits_and_gradients(model, seen, **inputs) for model in (theirs, ours))
    for key, want in exact.items():
        allowed = 2 * (usual[key] - want).norm() + 0.004 * want.norm()
        assert (got[key] - want).norm() <= allowed, key


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_batched_left_padded_generation(name: str, dtype: torch.dtype) -> None:
    """Greedy tokens of a padded batch with a cache, past the end of any window; in float32 the very same."""
    theirs = tiny(name, dtype)
    ours = with_ours(theirs)
    ids, mask = ids_of(3, 12), torch.ones(3, 12, dtype=torch.long)
    for row, padding in enumerate((0, 4, 11)):
        ids[row, :padding], mask[row, :padding] = 0, 0
    inputs = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 12, "do_sample": False}
    got, want = ours.generate(**inputs), theirs.generate(**inputs)
    if dtype == torch.float32:
        assert torch.equal(got, want)
    else:
        assert torch.equal(got[:, :13], want[:, :13])  # later ones follow near ties
    assert "halfbyte" in attention_calls()


def test_chunked_prefill_sees_the_cache() -> None:
    """Several queries at the end of more keys: logits of the second half are those of the whole row at once."""
    ours = with_ours(tiny("llama"))
    ids = ids_of(2, 50)
    whole = ours(input_ids=ids).logits
    first = ours(input_ids=ids[:, :20])
    second = ours(input_ids=ids[:, 20:], past_key_values=first.past_key_values).logits
    torch.testing.assert_close(second, whole[:, 20:], rtol=1e-4, atol=1e-4)
    assert set(attention_calls()) == {"halfbyte"}


def test_static_cache_falls_back_and_is_right() -> None:
    theirs = tiny("llama")
    ours = with_ours(theirs)
    inputs = {"input_ids": ids_of(2, 9), "max_new_tokens": 5, "do_sample": False, "cache_implementation": "static"}
    inputs["disable_compile"] = True
    assert torch.equal(ours.generate(**inputs), theirs.generate(**inputs))
    assert "sdpa: a mask of another form" in attention_calls()


@pytest.mark.parametrize(("name", "implementation"), [("llama", "sdpa"), ("gemma2", "eager")])
def test_dropout_falls_back_and_is_counted(name: str, implementation: str) -> None:
    theirs = tiny(name)
    ours = with_ours(theirs)
    for model in (theirs, ours):
        model.train()
        for module in model.modules():
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = 0.5
    results = []
    for model in (theirs, ours):
        torch.manual_seed(3)
        results.append(model(input_ids=ids_of(2, 20)).logits)
    torch.testing.assert_close(results[1], results[0])
    assert attention_calls() == {f"{implementation}: dropout": 2}


def test_attention_sinks_go_to_the_models_own_function() -> None:
    config = AutoConfig.for_model("gpt_oss", **SMALL, num_local_experts=2, num_experts_per_tok=1, sliding_window=8)
    torch.manual_seed(0)
    theirs = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    ours = with_ours(theirs)
    inputs = {"input_ids": ids_of(2, 30)}
    torch.testing.assert_close(ours(**inputs).logits, theirs(**inputs).logits, rtol=1e-4, atol=1e-4)
    assert attention_calls() == {"eager: attention sinks": 2}


def test_a_model_that_differs_keeps_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: Any) -> tuple[Tensor, Tensor]:
        out, logsumexp = ops.attention(*arguments)
        return out * 1.01, logsumexp

    monkeypatch.setattr(sys.modules["halfbyte.nn.attention"], "attention_forward", broken)
    model = tiny("llama")
    reset_attention_calls()
    assert use_attention(model) == "attention: sdpa; halfbyte's differs from it in the output of layer 0"
    assert model.config._attn_implementation == "sdpa"
    assert attention_calls() == {}


def test_a_model_that_cannot_be_tried_keeps_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    monkeypatch.setattr(type(model.model), "forward", lambda *_, **__: 1 / 0)
    assert "could not be tried on LlamaForCausalLM (division by zero)" in use_attention(model)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_use_twice_and_through_peft() -> None:
    model = peft.get_peft_model(tiny("llama"), peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    assert use_attention(model).startswith("attention: halfbyte in place of sdpa; 2 layers checked")
    assert use_attention(model) == "attention: halfbyte, as before"
    assert model.config._attn_implementation == "halfbyte"


# ── The mask ─────────────────────────────────────────────────────────────────────────────────────────────────────


def as_bool(starts: Tensor | None, size: dict[str, int], q_offset: int, kv_offset: int) -> Tensor:
    if starts is not None and starts.ndim == 4:
        return starts
    key = torch.arange(size["kv_length"])
    position = torch.arange(size["q_length"])[:, None] + q_offset - kv_offset
    seen = (key <= position)[None, None].expand(size["batch_size"], -1, -1, -1)
    return seen if starts is None else seen & (key >= starts[:, None, :, None])


def packed(function: Any, positions: Tensor) -> Any:
    return packed_sequence_compatibility_function(function, positions, find_packed_sequence_indices(positions))


POSITIONS = torch.tensor([[*range(7), *range(20), *range(3)], [*range(1), *range(28), *range(1)]])
PADDING = torch.tensor([[1] * 30, [0] * 11 + [1] * 19], dtype=torch.bool)
RIGHT = torch.tensor([[1] * 30, [1] * 13 + [0] * 17], dtype=torch.bool)
GAP = torch.tensor([[1] * 30, [1] * 13 + [0] * 7 + [1] * 10], dtype=torch.bool)
MASKS: dict[str, tuple[Any, Tensor | None, int, int]] = {  # function, padding, queries, dimensions of the result
    "causal": (causal_mask_function, None, 30, 0),
    "window": (sliding_window_causal_mask_function(5), None, 30, 2),
    "window that reaches": (sliding_window_causal_mask_function(50), None, 30, 0),
    "packed": (packed(causal_mask_function, POSITIONS), None, 30, 2),
    "packed, window": (packed(sliding_window_causal_mask_function(5), POSITIONS), None, 30, 2),
    "left padding": (causal_mask_function, PADDING, 30, 2),
    "left padding, window": (sliding_window_causal_mask_function(5), PADDING, 30, 2),
    "right padding": (causal_mask_function, RIGHT, 30, 2),
    "left padding, cache": (causal_mask_function, PADDING, 4, 2),
    "one query": (causal_mask_function, PADDING, 1, 2),
    "gap": (causal_mask_function, GAP, 30, 4),
    "chunks": (chunked_causal_mask_function(8, torch.zeros(2, dtype=torch.long)), None, 30, 2),
    "of unknown parts": (and_masks(causal_mask_function, lambda b, h, q, k: k % 2 == 0), None, 30, 4),
    "causal, unknown": (lambda b, h, q, k: k <= q, PADDING, 30, 2),
}


@pytest.mark.parametrize("name", MASKS)
def test_mask_shows_what_transformers_mask_shows(name: str) -> None:
    function, padding, queries, dimensions = MASKS[name]
    size, q_offset = {"batch_size": 2, "q_length": queries, "kv_length": 30}, 30 - queries
    got = attention_mask.halfbyte_mask(**size, q_offset=q_offset, mask_function=function, attention_mask=padding)
    assert (0 if got is None else got.ndim) == dimensions
    want = sdpa_mask(
        **size, q_offset=q_offset, mask_function=function, attention_mask=padding, allow_is_causal_skip=False
    )
    queries_that_count = torch.ones(2, queries, dtype=torch.bool) if padding is None else padding[:, q_offset:]
    assert torch.equal(as_bool(got, size, q_offset, 0)[:, 0][queries_that_count], want[:, 0][queries_that_count])


@pytest.mark.parametrize("name", [n for n, m in MASKS.items() if "unknown" not in n and n not in ("gap", "chunks")])
def test_known_parts_are_known(name: str) -> None:
    """A new transformers that names its parts otherwise costs time: this says so."""
    function, padding, queries, _ = MASKS[name]
    positions = torch.arange(30 - queries, 30)
    known = attention_mask._of_known_parts(function, padding, positions)
    assert known is not None
    if padding is None:
        evaluated = attention_mask._of_evaluation(function, padding, positions, 2, 0, False)
        assert evaluated is not None
        assert torch.equal(known.clamp(min=0).expand(2, -1), evaluated)


def test_mask_of_a_cache_that_has_dropped_keys() -> None:
    """A sliding cache hands over the last keys only: offsets differ, and the padding mask is longer than the keys."""
    size = {"batch_size": 2, "q_length": 1, "kv_length": 8}
    arguments = {"q_offset": 29, "kv_offset": 22, "mask_function": sliding_window_causal_mask_function(8)}
    padding = torch.tensor([[1] * 30, [0] * 25 + [1] * 5], dtype=torch.bool)
    got = attention_mask.halfbyte_mask(**size, **arguments, attention_mask=padding)
    want = sdpa_mask(**size, **arguments, attention_mask=padding, allow_is_causal_skip=False)
    assert torch.equal(as_bool(got, size, 29, 22), want)
