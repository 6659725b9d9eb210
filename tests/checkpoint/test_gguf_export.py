"""A model that is written as GGUF is the model that it was: tensors, tokens, settings; in llama.cpp as well."""

import io
import json
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize, quantize
from gguf_models import FAMILIES, llama_cpp, save_family
from rich.console import Console
from transformers import AutoTokenizer

import halfbyte
from adapters import random_adapter
from halfbyte import HalfbyteError, load_model
from halfbyte.huggingface import load_tokenizer
from halfbyte.recipes.inspect import inspect
from models import save_gguf

NOT_READ_BY_TRANSFORMERS = ("gemma", "smollm3", "llama, biases")
# Signs of several bytes, digits, runs of spaces, what looks like a special token, what is no text at all.
HOSTILE = [
    "the model reads a text",
    "otherwise thenhill wantedtowns readerhad atthe theretime mother writestext",
    "a  2026 x   12\n\n\n y",
    "  leading and trailing  ",
    "don't I'LL we'Re",
    "日本語 🏳️‍🌈 naïve e\u0301 \u202eRTL\u202c",
    "a\r\nb\rc\u00a0d\u2003e",
    "<|im_start|>user\nhi<|im_end|>\n<|im_start|> <pad><s></s><0x41>",
    "x=1;y+=2.5e-3!!?? ½ Ⅷ ١٢٣",
    "▁the ▁▁ the",
    " " * 40 + "when",
    "",
]


def export(model: Path | str, output: Path, adapter: Path | None = None, **keys: Any) -> halfbyte.MergeResult:
    silent = Console(file=io.StringIO())
    given = None if adapter is None else str(adapter)
    return halfbyte.merge(str(model), given, str(output), format="gguf", console=silent, **keys)


def hostile_to(family: str) -> list[str]:
    # Qwen's tokenizer composes accents and llama.cpp does not, which is told.
    return [unicodedata.normalize("NFC", text) for text in HOSTILE] if family == "qwen2" else HOSTILE


def tensors_of(file: Path) -> dict[str, Any]:
    return {tensor.name: tensor for tensor in GGUFReader(file).tensors}


def values_of(file: Path) -> dict[str, Any]:
    return {key: field.contents() for key, field in GGUFReader(file).fields.items()}


# ── The same model ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in NOT_READ_BY_TRANSFORMERS])
def test_every_tensor_comes_back(family: str, tmp_path: Path) -> None:
    written = save_family(family, tmp_path / "model").state_dict()
    result = export(tmp_path / "model", tmp_path / "model.gguf", dtype="float32")
    model, _ = load_model(str(tmp_path / "model.gguf"), "none", compute_dtype=torch.float32, fast=False)
    read = model.state_dict()
    assert {name for name in read if "rotary" not in name} == {name for name in written if "rotary" not in name}
    for name, tensor in written.items():
        # 1 is added to Gemma's norms for llama.cpp, and taken away again: a rounding each.
        slack = 2e-7 if family.startswith("gemma") and "norm" in name else 0.0
        assert (read[name] - tensor).abs().max() <= slack, name
    assert (result.changed, result.files) == (0, 1)


@pytest.mark.parametrize("family", NOT_READ_BY_TRANSFORMERS)
def test_every_tensor_is_there(family: str, tmp_path: Path) -> None:
    written = save_family(family, tmp_path / "model").state_dict()
    export(tmp_path / "model", tmp_path / "model.gguf", dtype="float32")
    found = tensors_of(tmp_path / "model.gguf")
    assert len(found) == len(written) - ("output.weight" not in found)
    down = found["blk.1.ffn_down.weight"]
    assert np.array_equal(down.data, written["model.layers.1.mlp.down_proj.weight"].numpy())
    norm = found["output_norm.weight"].data
    assert np.array_equal(norm, written["model.norm.weight"].numpy() + np.float32(family == "gemma"))


@pytest.mark.parametrize("family", FAMILIES)
def test_llama_cpp_computes_the_same_logits(family: str, tmp_path: Path) -> None:
    model = save_family(family, tmp_path / "model")
    export(tmp_path / "model", tmp_path / "model.gguf", dtype="float32")
    ids = torch.randint(3, model.config.vocab_size, (1, 48), generator=torch.Generator().manual_seed(0))
    (found,) = llama_cpp(tmp_path / "model.gguf", prompts=ids.tolist(), logits=True, context=256)
    with torch.no_grad():
        expected = model(ids).logits[0]
    difference = (torch.tensor(found) - expected).square().mean().sqrt() / expected.std()
    assert difference < 3e-3  # keys and values are kept in float16 there


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "gemma3", "phi3", "smollm3"])
def test_llama_cpp_reads_the_same_tokens(family: str, tmp_path: Path) -> None:
    save_family(family, tmp_path / "model")
    export(tmp_path / "model", tmp_path / "model.gguf", dtype="q8_0")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    texts = hostile_to(family)
    expected = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    assert llama_cpp(tmp_path / "model.gguf", texts=texts) == expected


# ── The same tokens ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "gemma2", "gemma3", "phi3"])
def test_the_tokenizer_comes_back(family: str, tmp_path: Path) -> None:
    save_family(family, tmp_path / "model")
    export(tmp_path / "model", tmp_path / "model.gguf")
    before, after = (load_tokenizer(str(tmp_path / name)) for name in ("model", "model.gguf"))
    assert after.get_vocab() == before.get_vocab()
    assert after.chat_template == before.chat_template
    for text in hostile_to(family):
        assert after(text)["input_ids"] == before(text)["input_ids"], text
    for name in ("bos", "eos", "pad"):
        assert getattr(after, f"{name}_token_id") == getattr(before, f"{name}_token_id")


def test_a_gguf_splits_digits_as_its_name_says(tmp_path: Path) -> None:
    """transformers takes `smollm` for GPT-2's split, where a run of spaces and a digit are other tokens."""
    save_family("llama", tmp_path / "model")
    export(tmp_path / "model", tmp_path / "model.gguf")
    alone = AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    ours = load_tokenizer(str(tmp_path / "model.gguf"))
    text = "x  2026"
    assert ours(text)["input_ids"] == AutoTokenizer.from_pretrained(tmp_path / "model")(text)["input_ids"]
    assert ours(text)["input_ids"] != alone(text)["input_ids"], "transformers has learned it: ours can go"


def test_rows_without_a_token_are_unused_ones(tmp_path: Path) -> None:
    model = save_family("llama", tmp_path / "model", vocab_size=400)
    export(tmp_path / "model", tmp_path / "model.gguf", dtype="float32")
    values = values_of(tmp_path / "model.gguf")
    tokens, types = values["tokenizer.ggml.tokens"], values["tokenizer.ggml.token_type"]
    assert len(tokens) == len(types) == model.config.vocab_size == 400
    assert (tokens[-1], types[-1]) == ("[PAD399]", 5)
    known = len(AutoTokenizer.from_pretrained(tmp_path / "model"))
    assert types.count(5) == 400 - known


def test_what_an_answer_ends_with_is_said(tmp_path: Path) -> None:
    save_family("phi3", tmp_path / "model")
    export(tmp_path / "model", tmp_path / "model.gguf")
    values = values_of(tmp_path / "model.gguf")
    tokens = values["tokenizer.ggml.tokens"]
    assert tokens[values["tokenizer.ggml.eos_token_id"]] == "</s>"
    assert tokens[values["tokenizer.ggml.eot_token_id"]] == "<|im_end|>"
    assert 'PARAMETER stop "<|im_end|>"' in (tmp_path / "model.Modelfile").read_text()


# ── The same numbers ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "q8_0", "q4_0"])
def test_weights_are_rounded_once_to_what_was_asked_for(dtype: str, tmp_path: Path) -> None:
    state = save_family("qwen2", tmp_path / "model").state_dict()
    export(tmp_path / "model", tmp_path / "model.gguf", dtype=dtype)
    found = tensors_of(tmp_path / "model.gguf")
    kind = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0", "q4_0": "Q4_0"}[dtype]
    ends = "Q8_0" if dtype == "q4_0" else kind
    for theirs, ours, expected in (
        ("blk.1.ffn_up.weight", "model.layers.1.mlp.up_proj.weight", kind),
        ("token_embd.weight", "model.embed_tokens.weight", ends),
        ("blk.0.attn_q.bias", "model.layers.0.self_attn.q_proj.bias", "F32"),
        ("output_norm.weight", "model.norm.weight", "F32"),
    ):
        tensor, wanted = found[theirs], GGMLQuantizationType[expected]
        assert tensor.tensor_type == wanted
        blocks = quantize(state[ours].numpy(), wanted)
        assert np.array_equal(dequantize(tensor.data, wanted), dequantize(blocks, wanted)), theirs
    assert (
        values_of(tmp_path / "model.gguf")["general.file_type"]
        == {"F32": 0, "F16": 1, "BF16": 32, "Q8_0": 7, "Q4_0": 2}[kind]
    )


def test_rows_that_are_no_blocks_are_16_bits(tmp_path: Path) -> None:
    save_family("llama", tmp_path / "model", intermediate_size=40)
    export(tmp_path / "model", tmp_path / "model.gguf", dtype="q8_0")
    found = tensors_of(tmp_path / "model.gguf")
    assert found["blk.0.ffn_down.weight"].tensor_type == GGMLQuantizationType.F16
    assert found["blk.0.ffn_up.weight"].tensor_type == GGMLQuantizationType.Q8_0
    load_model(str(tmp_path / "model.gguf"))


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.parametrize("base", ["original", "quantized"])
@pytest.mark.parametrize("settings", [{}, {"modules_to_save": ["lm_head"]}, {"use_dora": True}], ids=str)
def test_a_merge_is_the_same_in_either_format(base: str, settings: dict[str, Any], tmp_path: Path) -> None:
    model = save_family("llama, wide heads, tied", tmp_path / "model")
    adapter = random_adapter(model, tmp_path / "adapter", **settings)
    result = export(tmp_path / "model", tmp_path / "out.gguf", adapter, base=base, dtype="float32")
    silent = Console(file=io.StringIO())
    halfbyte.merge(
        str(tmp_path / "model"), str(adapter), str(tmp_path / "out"), base=base, dtype="float32", console=silent
    )
    one, other = (
        load_model(str(tmp_path / name), "none", compute_dtype=torch.float32, fast=False)[0].state_dict()
        for name in ("out.gguf", "out")
    )
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert (
        ("output.weight" in tensors_of(tmp_path / "out.gguf")) == result.untied == bool(settings.get("modules_to_save"))
    )


# ── From a .gguf file ───────────────────────────────────────────────────────────────────────────────────────────────


def test_what_a_gguf_says_of_itself_carries_over(tmp_path: Path) -> None:
    save_family("llama, rope of Llama 3", tmp_path / "model")
    export(tmp_path / "model", tmp_path / "first.gguf", dtype="float16")
    export(tmp_path / "first.gguf", tmp_path / "second.gguf", dtype="q8_0")
    first, second = values_of(tmp_path / "first.gguf"), values_of(tmp_path / "second.gguf")
    differing = {key for key in first.keys() | second.keys() if first.get(key) != second.get(key)}
    assert differing - {"GGUF.kv_count"} == {"general.file_type", "halfbyte.merge"}
    factors = tensors_of(tmp_path / "second.gguf")["rope_freqs.weight"]  # which transformers does not read
    assert np.array_equal(factors.data, tensors_of(tmp_path / "first.gguf")["rope_freqs.weight"].data)
    assert factors.data.max() > 1


def test_its_numbers_are_passed_on_as_they_are(tmp_path: Path) -> None:
    save_family("llama", tmp_path / "model")
    export(tmp_path / "model", tmp_path / "first.gguf", dtype="float16")
    export(tmp_path / "first.gguf", tmp_path / "second.gguf", dtype="float16")
    first, second = tensors_of(tmp_path / "first.gguf"), tensors_of(tmp_path / "second.gguf")
    assert first.keys() == second.keys()
    assert all(np.array_equal(first[name].data, second[name].data) for name in first)


def test_an_adapter_goes_onto_a_gguf(tmp_path: Path) -> None:
    model = save_gguf(tmp_path / "model.gguf", "F32")
    adapter = random_adapter(model, tmp_path / "adapter")
    export(tmp_path / "model.gguf", tmp_path / "out.gguf", adapter, base="original", dtype="float32")
    before, after = tensors_of(tmp_path / "model.gguf"), tensors_of(tmp_path / "out.gguf")
    changed = {name for name in before if not np.allclose(before[name].data, after[name].data, atol=1e-2)}
    assert changed == {name for name in before if "attn_" in name or "ffn_" in name} - {
        name for name in before if "norm" in name
    }


# ── Where it is from, and what it is not written over ───────────────────────────────────────────────────────────────


def test_the_file_says_where_it_is_from(tmp_path: Path) -> None:
    model = save_family("llama", tmp_path / "model")
    adapter = random_adapter(model, tmp_path / "adapter")
    export(tmp_path / "model", tmp_path / "out.gguf", adapter)
    record = json.loads(values_of(tmp_path / "out.gguf")["halfbyte.merge"])
    assert record["base_model"]["name_or_path"] == str(tmp_path / "model")
    assert record["adapters"][0]["path"] == str(adapter)
    assert record["onto"] == "quantized"
    told = inspect(str(tmp_path / "out.gguf"))
    assert any(str(adapter) in sentence for sentence in told.from_)
    export(tmp_path / "model", tmp_path / "lora.gguf", adapter, adapter_only=True)
    assert inspect(str(tmp_path / "lora.gguf")).holds[0].startswith("A LoRA adapter for a llama in GGUF")
    assert inspect(str(tmp_path / "lora.gguf")).from_ == []


def test_what_llama_cpp_does_otherwise_is_noted(tmp_path: Path) -> None:
    save_family("mistral", tmp_path / "model", sliding_window=16)
    notes = export(tmp_path / "model", tmp_path / "out.gguf").notes
    assert any("looks back 16 tokens" in note for note in notes)


@pytest.mark.parametrize(
    ("family", "changes", "told"),
    [
        ("llama", {"hidden_act": "gelu"}, "activation 'gelu'"),
        ("llama", {"rope_parameters": {"rope_theta": 1e4, "rope_type": "dynamic", "factor": 2.0}}, "'dynamic'"),
        ("gemma2", {"query_pre_attn_scalar": 32}, "root of 32"),
        ("smollm3", {"no_rope_layers": [1, 1, 1, 1]}, "every fourth"),
    ],
)
def test_what_llama_cpp_does_not_compute_is_refused(
    family: str, changes: dict[str, Any], told: str, tmp_path: Path
) -> None:
    save_family(family, tmp_path / "model", **changes)
    with pytest.raises(HalfbyteError, match=told):
        export(tmp_path / "model", tmp_path / "out.gguf")
    assert [file.name for file in tmp_path.iterdir()] == ["model"]


def test_values_that_16_bits_cannot_hold_are_named(tmp_path: Path) -> None:
    model = save_family("llama", tmp_path / "model")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 3] = 1e6
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(HalfbyteError, match=r"blk\.1\.ffn_up\.weight.*bfloat16"):
        export(tmp_path / "model", tmp_path / "out.gguf", dtype="float16")
    assert [file.name for file in tmp_path.iterdir()] == ["model"]
    export(tmp_path / "model", tmp_path / "out.gguf", dtype="bfloat16")


def test_an_audit_measures_the_file(tmp_path: Path) -> None:
    model = save_family("llama", tmp_path / "model")
    adapter = random_adapter(model, tmp_path / "adapter")
    result = export(
        tmp_path / "model", tmp_path / "out.gguf", adapter, dtype="q8_0", audit=True, limit=2, max_length=64
    )
    assert result.audit is not None
    written = result.audit.of("q8_0 GGUF, quantized base")
    assert result.audit.shipped == written.name
    assert 0 < written.mean_kl < 0.05
    assert (tmp_path / "out.gguf").is_file()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["adapter", "model", "out.Modelfile", "out.gguf"]
