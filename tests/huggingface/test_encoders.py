"""Encoders and encoder-decoders: in 4 bits, with gradients of the dense model, trained, saved and read again."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from halfbyte import QuantizationConfig
from halfbyte.checkpoint.fingerprint import weights_sha256
from halfbyte.huggingface.peft import LoraLinear4bit
from halfbyte.nn import PackedWeights
from halfbyte.optim import AdamW

_T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
_BART = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
}
_BERT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
# Class, type, configuration, task of PEFT's, layers in 4 bits, layers that are not: T5's `wo` transformers keeps in
# float32, and heads are trained anew.
MODELS: dict[str, tuple[Any, str, dict[str, Any], str, int, int]] = {
    "t5": (AutoModelForSeq2SeqLM, "t5", _T5, "SEQ_2_SEQ_LM", 28, 5),
    "flan-t5": (
        AutoModelForSeq2SeqLM,
        "t5",
        _T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
        "SEQ_2_SEQ_LM",
        32,
        5,
    ),
    "bart": (AutoModelForSeq2SeqLM, "bart", _BART, "SEQ_2_SEQ_LM", 32, 1),
    "bert": (AutoModelForSequenceClassification, "bert", _BERT, "SEQ_CLS", 13, 1),
    "roberta": (AutoModelForSequenceClassification, "roberta", _BERT, "SEQ_CLS", 12, 2),
    "modernbert": (AutoModelForSequenceClassification, "modernbert", _BERT | _IDS, "SEQ_CLS", 8, 2),
    "bert for words": (AutoModelForMaskedLM, "bert", _BERT, "FEATURE_EXTRACTION", 12, 2),
}
# What PEFT asks of transformers by a name that is to go.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")


def load(kind: Any, directory: Path) -> PreTrainedModel:
    torch.manual_seed(0)
    config = QuantizationConfig(compute_dtype=torch.float32)
    return kind.from_pretrained(directory, quantization_config=config, dtype=torch.float32)


def dense_copy(model: PreTrainedModel) -> PreTrainedModel:
    dense = copy.deepcopy(model)
    for name, layer in list(dense.named_modules()):
        if isinstance(layer, PackedWeights):
            linear = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
            linear.weight = nn.Parameter(layer.quantized.dequantize(torch.float32))
            linear.bias = layer.bias
            dense.set_submodule(name, linear)
    return dense


@pytest.mark.parametrize("name", MODELS)
def test_an_encoder(name: str, tmp_path: Path) -> None:
    kind, model_type, sizes, task, count, wide = MODELS[name]
    torch.manual_seed(0)
    original = kind.from_config(AutoConfig.for_model(model_type, vocab_size=259, **sizes))
    for parameter in original.parameters():
        parameter.data += 0.15 * torch.randn(parameter.shape)
    original.save_pretrained(tmp_path / "16-bit")
    model = load(kind, tmp_path / "16-bit")
    packed = [m for m in model.modules() if isinstance(m, PackedWeights)]
    linears = [m for m in model.modules() if isinstance(m, nn.Linear) and not isinstance(m, PackedWeights)]
    assert (len(packed), len(linears)) == (count, wide)

    model.save_pretrained(tmp_path / "4-bit")
    again = load(kind, tmp_path / "4-bit")
    assert weights_sha256(again) == weights_sha256(model)

    targets = r".*\.(q|v|query|value|q_proj|v_proj|Wqkv|Wo|wi|wi_0|fc1|dense)"
    lora = LoraConfig(r=4, init_lora_weights=False, target_modules=targets, task_type=task)
    theirs, ours = get_peft_model(dense_copy(model), copy.deepcopy(lora)), get_peft_model(model, copy.deepcopy(lora))
    assert any(isinstance(module, LoraLinear4bit) for module in ours.modules())
    trained = {name: p for name, p in ours.named_parameters() if p.requires_grad}
    others = {name: p for name, p in theirs.named_parameters() if p.requires_grad}
    assert trained.keys() == others.keys()
    with torch.no_grad():
        for name, parameter in trained.items():
            others[name].copy_(parameter)
    ids = 3 + torch.arange(18).view(2, 9) * 7 % 256
    labels = torch.tensor([0, 1]) if task == "SEQ_CLS" else ids
    batch = {"input_ids": ids, "labels": labels}
    losses = [adapted.eval()(**batch).loss for adapted in (ours, theirs)]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-5)
    for loss in losses:
        loss.backward()
    for name, parameter in trained.items():
        if others[name].grad is not None:
            assert (parameter.grad - others[name].grad).norm() <= 1e-4 * others[name].grad.norm() + 1e-7, name
    assert sum(other.grad is not None for other in others.values()) > 4

    optimizer = AdamW(trained.values(), lr=1e-2)
    before = weights_sha256(ours)
    for _ in range(10):
        optimizer.step()
        optimizer.zero_grad()
        loss = ours.train()(**batch).loss
        loss.backward()
    assert loss < 0.9 * losses[0]
    if task != "SEQ_CLS":  # whose head is trained, too
        assert weights_sha256(ours) == before


def test_t5_writes_what_its_dense_self_writes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    original = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model("t5", vocab_size=259, **_T5))
    original.save_pretrained(tmp_path)
    model = load(AutoModelForSeq2SeqLM, tmp_path).eval()
    ids = torch.arange(18).view(2, 9)
    settings = {"input_ids": ids, "max_new_tokens": 6, "do_sample": False}
    assert torch.equal(model.generate(**settings), dense_copy(model).generate(**settings))
