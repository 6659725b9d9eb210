"""Mixtures of experts: their tensors in 4 bits, adapters on them equal to PEFT's on a dense model, files that open."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from dense_models import INPUT_IDS, adapter_of, dense_base, logits, settings
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from halfbyte import HalfbyteError, QuantizationConfig, add_lora, quantize_4bit
from halfbyte.checkpoint.fingerprint import weights_sha256
from halfbyte.huggingface.experts import computes_the_same, weights_of_experts
from halfbyte.huggingface.peft_experts import LoraExperts4bit
from halfbyte.nn import Experts4bit, PackedWeights
from models import build_model, save_model

# What PEFT says of its own names for experts.
pytestmark = pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys")

MIXTURES = ["mixtral", "qwen3_moe", "gpt_oss"]
BOTH = ["experts.gate_up_proj", "experts.down_proj"]


def in_4_bits(directory: Path, **changes: Any) -> PreTrainedModel:
    config = QuantizationConfig(compute_dtype=torch.float32, **changes)
    return AutoModelForCausalLM.from_pretrained(directory, quantization_config=config, dtype=torch.float32)


def experts_of(model: nn.Module) -> list[Experts4bit]:
    return [module for module in model.modules() if isinstance(module, Experts4bit)]


def on_experts(**changes: Any) -> LoraConfig:
    return settings(**({"target_modules": ["q_proj"], "target_parameters": BOTH} | changes))


@pytest.fixture(params=MIXTURES)
def base(request: pytest.FixtureRequest, model_directory: Callable[[str], Path]) -> PreTrainedModel:
    return in_4_bits(model_directory(request.param))


def twins(base: PreTrainedModel, config: LoraConfig) -> tuple[PeftModel, PeftModel]:
    """PEFT on the dense weights, and on those in 4 bits, with the same adapter."""
    theirs = get_peft_model(dense_base(base), copy.deepcopy(config))
    ours = get_peft_model(base, copy.deepcopy(config))
    with torch.no_grad():
        for (name, mine), (other_name, other) in zip(adapter_of(ours).items(), adapter_of(theirs).items(), strict=True):
            assert name == other_name
            assert mine.shape == other.shape
            other.copy_(mine)
    return theirs, ours


def test_logits_and_gradients_are_those_of_peft_on_dense_experts(base: PreTrainedModel) -> None:
    theirs, ours = twins(base, on_experts())
    assert sum(isinstance(module, LoraExperts4bit) for module in ours.modules()) == 4
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-4, atol=1e-4)
    before = weights_sha256(ours)
    for model in (ours, theirs):
        model(INPUT_IDS, labels=INPUT_IDS).loss.backward()
    for (name, mine), other in zip(adapter_of(ours).items(), adapter_of(theirs).values(), strict=True):
        assert other.grad.norm() > 0, name
        assert (mine.grad - other.grad).norm() <= 1e-4 * other.grad.norm(), name
    assert weights_sha256(ours) == before
    assert not any(module.low_rank for module in experts_of(ours))


def test_a_saved_adapter_opens_in_plain_peft_on_the_dense_model(base: PreTrainedModel, tmp_path: Path) -> None:
    wide = dense_base(base)
    model = get_peft_model(base, on_experts())
    expected = logits(model)
    model.save_pretrained(tmp_path)
    dense = PeftModel.from_pretrained(wide, tmp_path)
    torch.testing.assert_close(logits(dense), expected, rtol=1e-4, atol=1e-4)
    model.unload()
    assert torch.equal(logits(PeftModel.from_pretrained(base, tmp_path)), expected)


def test_what_is_saved_is_what_is_opened_byte_for_byte(base: PreTrainedModel, tmp_path: Path) -> None:
    base.save_pretrained(tmp_path / "once")
    saved = load_file(tmp_path / "once" / "model.safetensors")
    names = [name for name in saved if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]
    assert len(names) == 4
    for name in names:
        assert saved[name].dtype == torch.uint8
        assert {f"{name}.absmax", f"{name}.nested_absmax", f"{name}.quant_state.bitsandbytes__nf4"} <= saved.keys()
    again = in_4_bits(tmp_path / "once")
    assert torch.equal(logits(again), logits(base))
    again.save_pretrained(tmp_path / "twice")
    resaved = load_file(tmp_path / "twice" / "model.safetensors")
    assert resaved.keys() == saved.keys()
    assert all(torch.equal(resaved[name], saved[name]) for name in saved)


def test_several_adapters_and_none(base: PreTrainedModel) -> None:
    plain = logits(base)
    theirs, ours = twins(base, on_experts())
    for model in (theirs, ours):
        torch.manual_seed(3)
        model.add_adapter("second", on_experts(r=2))
    with torch.no_grad():
        for (name, mine), other in zip(adapter_of(ours).items(), adapter_of(theirs).values(), strict=True):
            if ".second." in name:
                mine.copy_(other)
    for active in ("default", "second"):
        theirs.set_adapter(active)
        ours.set_adapter(active)
        torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-4, atol=1e-4)
    both = ["default", "second"]
    theirs.base_model.set_adapter(both)
    ours.base_model.set_adapter(both)
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-4, atol=1e-4)
    with ours.disable_adapter():
        assert torch.equal(logits(ours), plain)


def test_merging_and_taking_it_back(base: PreTrainedModel) -> None:
    before = weights_sha256(base)
    model = get_peft_model(base, on_experts())
    adapted, bits = logits(model), weights_sha256(model)
    assert bits == before
    with model.disable_adapter():
        plain = logits(model)
    model.merge_adapter()
    assert weights_sha256(model) != bits
    assert (logits(model) - adapted).norm() < 0.7 * (plain - adapted).norm()  # quantized again
    model.unmerge_adapter()
    assert weights_sha256(model) == bits
    assert torch.equal(logits(model), adapted)
    merged = model.merge_and_unload()
    assert not any("lora" in name for name, _ in merged.named_parameters())
    assert len(experts_of(merged)) == 2


@pytest.mark.filterwarnings("ignore:Already following adapters were merged:UserWarning")
@pytest.mark.parametrize("at_once", [True, False])
def test_two_adapters_are_quantized_once(base: PreTrainedModel, at_once: bool) -> None:
    model = get_peft_model(base, on_experts())
    model.add_adapter("second", on_experts(r=2))
    layer = next(module for module in model.modules() if isinstance(module, LoraExperts4bit))
    experts, name = layer.get_base_layer(), layer.parameter_name
    before = experts.get_quantized(name)
    first, second = (layer.get_delta_weight(adapter).detach() for adapter in ("default", "second"))
    assert min(first.abs().mean(), second.abs().mean()) > 0.01
    wanted = quantize_4bit(before.dequantize(torch.float32) + first + second)
    for names in [["default", "second"]] if at_once else [["default"], ["second"]]:
        layer.merge(adapter_names=names)
    # A product in another order, near a midpoint.
    assert (experts.get_quantized(name).packed != wanted.packed).float().mean() < 0.001
    layer.unmerge()
    assert torch.equal(experts.get_quantized(name).packed, before.packed)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lora_dropout": 0.1}, "no dropout for experts"),
        ({"use_dora": True}, "no DoRA for experts"),
        ({"init_lora_weights": "pissa"}, "'pissa' is not there for experts"),
    ],
)
def test_what_peft_has_for_layers_alone(
    model_directory: Callable[[str], Path], changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(HalfbyteError, match=words):
        add_lora(in_4_bits(model_directory("mixtral")), on_experts(**changes))


def test_experts_are_counted(model_directory: Callable[[str], Path]) -> None:
    model = in_4_bits(model_directory("mixtral"))
    wide = build_model("mixtral")
    assert model.num_parameters() == wide.num_parameters()
    share = sum(shape.numel() for module in experts_of(model) for shape in module.shapes.values())
    assert share > 0.5 * wide.num_parameters()
    held = sum(q.nbytes for module in experts_of(model) for q in module.all_quantized.values())
    assert held < 0.27 * 2 * share


def test_experts_can_be_skipped(model_directory: Callable[[str], Path]) -> None:
    with pytest.warns(UserWarning, match="4 tensors of three dimensions"):
        model = in_4_bits(model_directory("mixtral"), skip_modules=["experts"])
    assert not experts_of(model)
    assert "halfbyte_experts_4bit" not in model.config.quantization_config.to_dict()


def test_experts_of_another_form_are_named(tmp_path: Path) -> None:
    sizes = {"num_local_experts": 2, "intermediate_size_mlp": 56, "head_dim": 8, "attention_chunk_size": 16}
    save_model(tmp_path, "llama4_text", **sizes)
    with pytest.warns(UserWarning, match=r"stay in 32 bits, [\d,]+ bytes: model.layers.0.feed_forward.experts.gate_up"):
        model = in_4_bits(tmp_path)
    assert not experts_of(model)
    assert any(isinstance(module, PackedWeights) for module in model.modules())


def test_a_class_that_computes_something_else_is_left_alone() -> None:
    config = AutoConfig.for_model("mixtral", num_local_experts=2, hidden_size=32, intermediate_size=56)
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    class Scaled(MixtralExperts):  # type: ignore[misc]
        def forward(self, *args: Any) -> Any:
            return 1.5 * super().forward(*args)

    class Undecorated(MixtralExperts):  # type: ignore[misc]
        def forward(self, *args: Any) -> Any:
            return super().forward(*args)

    Scaled.forward.__wrapped__ = lambda self, *args: 1.5 * MixtralExperts.forward.__wrapped__(self, *args)
    assert computes_the_same(MixtralExperts(config))
    assert not computes_the_same(Scaled(config))
    assert not weights_of_experts(Undecorated(config))
