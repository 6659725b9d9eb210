"""PEFT's own calls, and none of halfbyte's, on a 4-bit model: the same numbers as on a dense model of its weights."""

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from dense_models import INPUT_IDS, adapter_of, dense_base, logits, settings
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model, prepare_model_for_kbit_training
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, PreTrainedModel

from halfbyte import HalfbyteError, Linear4bit, QuantizationConfig, add_lora, load_model, optim
from halfbyte.checkpoint.fingerprint import weights_sha256
from halfbyte.huggingface.peft import LoraLinear4bit
from models import VOCABULARY_SIZE


def in_4_bits(source: Path, dtype: torch.dtype = torch.float32, **settings: Any) -> PreTrainedModel:
    config = QuantizationConfig(compute_dtype=dtype, fast=False, **settings)
    return AutoModelForCausalLM.from_pretrained(source, quantization_config=config, dtype=dtype)


@pytest.fixture
def source(model_directory: Callable[[str], Path]) -> Path:
    return model_directory("llama")


@pytest.fixture
def model(source: Path) -> PreTrainedModel:
    return in_4_bits(source)


def both(model: PreTrainedModel, **changes: Any) -> tuple[PeftModel, PeftModel]:
    """PEFT on the 4-bit model, and on a dense one of its weights, with the same adapter."""
    dense = dense_base(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's remarks
        ours, theirs = get_peft_model(model, settings(**changes)), get_peft_model(dense, settings(**changes))
    equalize(ours, theirs)
    return ours, theirs


def equalize(ours: PeftModel, theirs: PeftModel) -> None:
    trainable = dict(theirs.named_parameters())
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if any(word in name for word in ("lora_", "modules_to_save", "trainable_tokens")):
                trainable[name].copy_(parameter)


def layers_of(model: nn.Module) -> list[LoraLinear4bit]:
    return [module for module in model.modules() if isinstance(module, LoraLinear4bit)]


def assert_same_logits(ours: nn.Module, theirs: nn.Module, **inputs: Any) -> None:
    with torch.no_grad():
        results = [model(INPUT_IDS, **inputs).logits for model in (ours, theirs)]
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


def assert_same_gradients(ours: nn.Module, theirs: nn.Module) -> None:
    for model in (ours, theirs):
        model(input_ids=INPUT_IDS, labels=INPUT_IDS).loss.backward()
    others = dict(theirs.named_parameters())
    trained = {name: p.grad for name, p in ours.named_parameters() if p.requires_grad}
    assert trained.keys() == {name for name, p in others.items() if p.requires_grad}
    for name, gradient in trained.items():
        expected = others[name].grad
        assert gradient is not None
        assert expected is not None
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item(), msg=name)


# ── Every way in ────────────────────────────────────────────────────────────────────────────────────────────


def test_get_peft_model_is_add_lora(model: PreTrainedModel) -> None:
    torch.manual_seed(3)
    ours = add_lora(copy.deepcopy(model), settings())
    torch.manual_seed(3)
    plain = get_peft_model(model, settings())
    assert len(layers_of(plain)) == 14
    assert all(parameter.dtype == torch.float32 for parameter in adapter_of(plain).values())
    # q, k and v, gate and up in one product each; o and down have an input of their own.
    assert [layer.shared_input is not None for layer in layers_of(plain)] == [True] * 3 + [False] + [True] * 2 + [
        False
    ] + [True] * 3 + [False] + [True] * 2 + [False]
    assert torch.equal(logits(plain), logits(ours))


def test_every_way_of_peft_and_transformers_puts_our_layers_on(
    model: PreTrainedModel, source: Path, tmp_path: Path
) -> None:
    plain = get_peft_model(model, settings())
    plain.save_pretrained(tmp_path)
    expected = logits(plain)
    loaded = PeftModel.from_pretrained(in_4_bits(source), tmp_path)
    quickly = PeftModel.from_pretrained(in_4_bits(source), tmp_path, low_cpu_mem_usage=True)
    by_transformers = in_4_bits(source)
    by_transformers.load_adapter(str(tmp_path))
    injected = inject_adapter_in_model(settings(), in_4_bits(source))
    for adapted in (loaded, quickly, by_transformers, injected):
        assert len(layers_of(adapted)) == 14
        if adapted is not injected:
            assert torch.equal(logits(adapted), expected)


def test_a_model_without_4_bit_layers_is_left_to_peft(source: Path) -> None:
    dense = get_peft_model(AutoModelForCausalLM.from_pretrained(source), settings())
    assert layers_of(dense) == []
    assert dense.peft_config["default"]._custom_modules is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_preparing_for_kbit_training_does_no_harm(source: Path, dtype: torch.dtype) -> None:
    expected = get_peft_model(in_4_bits(source, dtype), settings())
    prepared = in_4_bits(source, dtype)
    adapted = get_peft_model(prepare_model_for_kbit_training(prepared), settings())
    with torch.no_grad():
        for mine, other in zip(adapter_of(adapted).values(), adapter_of(expected).values(), strict=True):
            mine.copy_(other)
    wanted = {name: (p.dtype, p.requires_grad) for name, p in expected.named_parameters()}
    assert {name: (p.dtype, p.requires_grad) for name, p in adapted.named_parameters()} == wanted
    assert weights_sha256(adapted) == weights_sha256(expected)
    assert torch.equal(logits(adapted), logits(expected))


def test_a_parameter_that_was_changed_in_float32_keeps_its_dtype(source: Path) -> None:
    prepared = prepare_model_for_kbit_training(in_4_bits(source, torch.bfloat16))
    with torch.no_grad():
        prepared.model.norm.weight += 1e-6
    adapted = get_peft_model(prepared, settings())
    dtypes = {name: p.dtype for name, p in adapted.named_parameters() if "lora" not in name and p.is_floating_point()}
    assert [name for name, dtype in dtypes.items() if dtype == torch.float32] == ["base_model.model.model.norm.weight"]


def test_trainable_parameters_are_counted_as_on_the_dense_model(
    model: PreTrainedModel, capsys: pytest.CaptureFixture[str]
) -> None:
    ours, theirs = both(model)
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    ours.print_trainable_parameters()
    printed = capsys.readouterr().out
    theirs.print_trainable_parameters()
    assert printed == capsys.readouterr().out


# ── What a configuration can say ────────────────────────────────────────────────────────────────────────────


VARIANTS = [
    {"use_dora": True},
    {"use_dora": True, "r": 8, "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"q_proj": 32}},
    {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]},
    {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["lm_head"]},
    {"target_modules": ["q_proj", "down_proj"], "trainable_token_indices": [7, 14, 35]},
    {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    {"target_modules": ["o_proj"], "exclude_modules": ["0.self_attn.o_proj"], "use_rslora": True},
]


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_outputs_and_gradients_are_those_on_the_dense_model(model: PreTrainedModel, changes: dict[str, Any]) -> None:
    ours, theirs = both(model, **changes)
    base = weights_sha256(ours)
    assert_same_logits(ours, theirs)
    assert_same_gradients(ours, theirs)
    assert weights_sha256(ours) == base


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_what_is_saved_opens_on_the_dense_model(
    model: PreTrainedModel, tmp_path: Path, changes: dict[str, Any]
) -> None:
    dense = dense_base(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours = get_peft_model(model, settings(**changes))
        ours.save_pretrained(tmp_path)
        assert_same_logits(ours, PeftModel.from_pretrained(dense, tmp_path))


@pytest.mark.parametrize("fan_in_fan_out", [False, True])
@pytest.mark.parametrize("changes", [{}, {"use_dora": True}, {"lora_bias": True}], ids=str)
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False but")  # PEFT sees to it itself, and says so
@pytest.mark.filterwarnings("ignore:Adapter 'default'. 8 LoRA tensor")  # it takes biases for torn matrices
def test_gpt2_whose_weights_lie_the_other_way(
    model_directory: Callable[[str], Path], tmp_path: Path, changes: dict[str, Any], fan_in_fan_out: bool
) -> None:
    """It opens in PEFT on the model as it is on the hub, with weights `(in, out)`."""
    model = in_4_bits(model_directory("gpt2"))
    dense = dense_base(model)
    ours = get_peft_model(model, settings(fan_in_fan_out=fan_in_fan_out, **changes))
    assert len(layers_of(ours)) == 8
    ours.save_pretrained(tmp_path)
    theirs = PeftModel.from_pretrained(dense, tmp_path, is_trainable=True)
    assert_same_logits(ours, theirs)
    assert_same_gradients(ours, theirs)
    model = in_4_bits(model_directory("gpt2"))
    assert torch.equal(logits(PeftModel.from_pretrained(model, tmp_path)), logits(ours))


def test_dora_in_training_makes_no_tensor_of_the_weights_size(source: Path) -> None:
    ours = get_peft_model(in_4_bits(source), settings(use_dora=True, target_modules=["gate_proj"], r=2))
    layer = layers_of(ours)[0].train()
    made: list[torch.Size] = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = function(*args, **(kwargs or {}))
            made.extend(t.shape for t in [result] if isinstance(t, Tensor))
            return result

    with Record():
        layer(torch.randn(3, 32, requires_grad=True)).sum().backward()
    sizes = {tuple(sorted(shape)) for shape in made}
    assert (3, 56) in sizes
    assert (32, 56) not in sizes


def test_doras_dropout_falls_on_the_low_rank_term_alone(model: PreTrainedModel) -> None:
    ours = get_peft_model(model, settings(use_dora=True, lora_dropout=0.5))
    layer = layers_of(ours)[0].train()
    x = torch.randn(1, 32)
    with torch.no_grad():
        drawn = torch.stack([layer(x) for _ in range(4000)])
        expected = layer.eval()(x)
    assert drawn.std(0).max() > 0
    assert (drawn.mean(0) - expected).abs().max() < 6 * (drawn.std(0) / 4000**0.5).max()


def test_a_dora_adapter_is_trained_by_our_optimizer(model: PreTrainedModel) -> None:
    ours = get_peft_model(model, settings(use_dora=True, init_lora_weights=True))
    optimizer = optim.AdamW((p for p in ours.parameters() if p.requires_grad), lr=1e-2)
    before = {name: p.detach().clone() for name, p in adapter_of(ours).items()}
    losses = []
    for _ in range(4):
        loss = ours(input_ids=INPUT_IDS, labels=INPUT_IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    assert all(not torch.equal(p, before[name]) for name, p in adapter_of(ours).items())


def test_gaussian_initial_values(model: PreTrainedModel) -> None:
    ours = get_peft_model(model, settings(init_lora_weights="gaussian", r=8))
    drawn = torch.cat([layer.lora_A["default"].weight.detach().flatten() for layer in layers_of(ours)])
    assert drawn.std().item() == pytest.approx(1 / 8, rel=0.05)
    assert all(layer.lora_B["default"].weight.abs().max() == 0 for layer in layers_of(ours))


# ── Initial values ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("initial", ["pissa", "pissa_niter_4", "olora"])
@pytest.mark.parametrize("use_dora", [False, True])
def test_what_pissa_and_olora_leave_is_quantized_again(model: PreTrainedModel, initial: str, use_dora: bool) -> None:
    before = logits(model)
    changes: dict[str, Any] = {"init_lora_weights": initial, "use_dora": use_dora, "r": 8}
    dense = dense_base(model)
    torch.manual_seed(5)
    theirs = get_peft_model(dense, settings(**changes))
    torch.manual_seed(5)
    ours = get_peft_model(model, settings(**changes))
    for mine, other in zip(layers_of(ours), lora_layers(theirs), strict=True):
        torch.testing.assert_close(mine.lora_A["default"].weight, other.lora_A["default"].weight)
        torch.testing.assert_close(mine.lora_B["default"].weight, other.lora_B["default"].weight)
        left, quantized = other.base_layer.weight, mine.base_layer.quantized
        error = (quantized.dequantize(torch.float32) - left).abs().max()
        assert error < 0.2 * left.abs().max()
        assert not torch.equal(quantized.dequantize(torch.float32), left)
    # Near what it was, since less is left to be rounded.
    assert (logits(ours) - before).norm() < 0.5 * before.norm()
    ours(input_ids=INPUT_IDS, labels=INPUT_IDS).loss.backward()
    assert all(p.grad is not None for p in ours.parameters() if p.requires_grad)


def lora_layers(model: nn.Module) -> list[Any]:
    return [module for name, module in model.named_modules() if hasattr(module, "lora_A")]


def test_the_same_initial_values_come_back_with_a_saved_adapter(
    model: PreTrainedModel, source: Path, tmp_path: Path
) -> None:
    ours = get_peft_model(model, settings(init_lora_weights="pissa"))
    ours.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(in_4_bits(source), tmp_path)
    assert torch.equal(logits(again), logits(ours))


def error_of(adapted: nn.Module, wanted: Tensor) -> float:
    return float((logits(adapted) - wanted).abs().mean())


def test_pissa_on_16_bits_then_quantized_loses_less_than_quantization(source: Path, tmp_path: Path) -> None:
    original = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    wanted = logits(original)
    plain = error_of(in_4_bits(source), wanted)
    adapted = get_peft_model(original, settings(init_lora_weights="pissa", r=16, lora_alpha=16))
    adapted.peft_config["default"].init_lora_weights = True  # as PEFT's guide has it: the base is saved beside it
    adapted.save_pretrained(tmp_path / "adapter")
    adapted.unload().save_pretrained(tmp_path / "left")
    ours = PeftModel.from_pretrained(in_4_bits(tmp_path / "left"), tmp_path / "adapter")
    assert error_of(ours, wanted) < plain / 1.03


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_loftq_loses_less_than_quantization_and_less_with_more_iterations(
    model_directory: Callable[[str], Path], model_type: str, use_dora: bool
) -> None:
    source = model_directory(model_type)
    original = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    weights = {name: p.detach() for name, p in original.named_parameters()}
    errors = [distance(in_4_bits(source), weights)]
    plain = error_of(in_4_bits(source), logits(original))
    for iterations in (1, 5):
        ours = get_peft_model(in_4_bits(source), loftq_settings(iterations, use_dora))
        errors.append(distance(ours, weights))
        assert error_of(ours, logits(original)) < plain / 1.03
    assert errors == sorted(errors, reverse=True)
    assert errors[1] < errors[0] / 1.03


def distance(model: nn.Module, weights: dict[str, Tensor]) -> float:
    """The Frobenius distance of all layers, adapters included, from the original's."""
    total = 0.0
    for name, module in model.named_modules():
        base = module.base_layer if isinstance(module, LoraLinear4bit) else module
        if not isinstance(base, Linear4bit) or name.endswith("base_layer"):
            continue
        weight = base.quantized.dequantize(torch.float32)
        if base is not module:
            weight = weight + module.get_delta_weight("default").detach()
        original = weights[f"{name.removeprefix('base_model.model.')}.weight"]
        is_transposed = "transformer.h" in name
        total += float((weight - (original.T if is_transposed else original)).square().sum())
    return total


def loftq_settings(iterations: int = 1, use_dora: bool = False, bits: int = 4) -> LoraConfig:
    config = settings(r=8, lora_alpha=16, use_dora=use_dora)
    # Set here, since LoraConfig wants scipy to be installed for it, and no more than that.
    config.init_lora_weights = "loftq"
    config.loftq_config = {"loftq_bits": bits, "loftq_iter": iterations}
    return config


def test_loftq_without_the_16_bit_weights_is_refused(model: PreTrainedModel, tmp_path: Path) -> None:
    with pytest.raises(HalfbyteError, match="4 bits"):
        get_peft_model(copy.deepcopy(model), loftq_settings(bits=8))
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=QuantizationConfig())
    with pytest.raises(HalfbyteError, match=r"in 16 bits.*LoftQ"):
        get_peft_model(again, loftq_settings())


# ── Several adapters, and merging ───────────────────────────────────────────────────────────────────────────


def test_a_dora_adapter_on_top_of_a_plain_one(model: PreTrainedModel) -> None:
    ours, theirs = both(model)
    for adapted in (ours, theirs):
        adapted.add_adapter("second", settings(use_dora=True, r=2))
    equalize(ours, theirs)
    for active in (["default", "second"], ["second"], ["default"], ["second", "default"]):
        for adapted in (ours, theirs):
            adapted.base_model.set_adapter(active)
        assert_same_logits(ours, theirs)
    base = weights_sha256(ours)
    with ours.disable_adapter(), theirs.disable_adapter():
        assert_same_logits(ours, theirs)
    assert weights_sha256(ours) == base


def test_adapters_mixed_in_a_batch(model: PreTrainedModel) -> None:
    ours, theirs = both(model)
    for adapted in (ours, theirs):
        adapted.add_adapter("second", settings(r=2, target_modules=["q_proj", "down_proj"]))
        adapted.eval()
    equalize(ours, theirs)
    for names in (["default", "second"], ["__base__", "default"]):
        assert_same_logits(ours, theirs, adapter_names=names)
    with torch.no_grad():
        mixed = ours(INPUT_IDS, adapter_names=["second", "__base__"]).logits
        ours.set_adapter("second")
        torch.testing.assert_close(mixed[:1], logits(ours)[:1], rtol=1e-5, atol=3e-5)


@pytest.mark.parametrize("changes", [{}, {"use_dora": True}, {"lora_bias": True}], ids=str)
@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_merging_gives_the_adapters_output_but_for_rounding_and_unmerging_the_bits(
    model_directory: Callable[[str], Path], model_type: str, changes: dict[str, Any]
) -> None:
    if changes.get("lora_bias") and model_type == "llama":
        pytest.skip("its layers have no bias")
    ours = get_peft_model(in_4_bits(model_directory(model_type)), settings(**changes))
    with torch.no_grad():
        for name, parameter in adapter_of(ours).items():
            parameter.mul_(1.5 if "magnitude" in name else 1)
    base, with_adapter = weights_sha256(ours), logits(ours)
    with ours.disable_adapter():
        without = logits(ours)
    wanted = {layer: dense_weight(layer) for layer in layers_of(ours)}
    ours.merge_adapter()
    for layer, weight in wanted.items():
        merged = layer.base_layer.quantized.dequantize(torch.float32)
        assert (merged - weight).norm() < 0.15 * weight.norm()
    assert (logits(ours) - with_adapter).norm() < (without - with_adapter).norm()
    ours.unmerge_adapter()
    assert weights_sha256(ours) == base
    assert torch.equal(logits(ours), with_adapter)
    unloaded = ours.merge_and_unload()
    assert layers_of(unloaded) == []
    assert sum(isinstance(module, Linear4bit) for module in unloaded.modules()) == len(wanted)


@torch.no_grad()
def dense_weight(layer: LoraLinear4bit) -> Tensor:
    """What the layer multiplies with, from what it makes of the unit vectors."""
    outputs = layer(torch.eye(layer.in_features)) - layer(torch.zeros(1, layer.in_features))
    return outputs.t()


def test_two_dora_adapters_merge_and_unmerge(model: PreTrainedModel) -> None:
    ours = get_peft_model(model, settings(use_dora=True))
    ours.add_adapter("second", settings(use_dora=True, r=2))
    ours.base_model.set_adapter(["default", "second"])
    base, together = weights_sha256(ours), logits(ours)
    wanted = [dense_weight(layer) for layer in layers_of(ours)]
    ours.merge_adapter(["default", "second"])
    for layer, weight in zip(layers_of(ours), wanted, strict=True):
        merged = layer.base_layer.quantized.dequantize(torch.float32)
        assert (merged - weight).norm() < 0.25 * weight.norm()  # rounded twice
    ours.unmerge_adapter()
    assert weights_sha256(ours) == base
    assert torch.equal(logits(ours), together)


def test_a_bias_that_is_not_finite_is_not_merged(model_directory: Callable[[str], Path]) -> None:
    ours = get_peft_model(in_4_bits(model_directory("gpt2")), settings(lora_bias=True))
    layer = layers_of(ours)[0]
    base = weights_sha256(ours)
    with torch.no_grad():
        layer.lora_B["default"].bias[0] = torch.nan
    with pytest.raises(HalfbyteError, match="bias"):
        layer.merge()
    assert not layer.merged
    assert weights_sha256(ours) == base


# ── New tokens ──────────────────────────────────────────────────────────────────────────────────────────────


def test_new_tokens_are_trained_saved_and_read(source: Path, tmp_path: Path) -> None:
    def enlarged() -> PreTrainedModel:
        model = in_4_bits(source)
        torch.manual_seed(7)
        model.resize_token_embeddings(VOCABULARY_SIZE + 2, mean_resizing=False)
        return model

    new = [VOCABULARY_SIZE, VOCABULARY_SIZE + 1]
    ours = get_peft_model(
        enlarged(), settings(target_modules=["q_proj"], trainable_token_indices={"embed_tokens": new, "lm_head": new})
    )
    ids = INPUT_IDS.clone()
    ids[:, 3], ids[:, 6] = new
    optimizer = optim.AdamW((p for p in ours.parameters() if p.requires_grad), lr=1e-2)
    old = ours.get_input_embeddings().weight.detach().clone()
    losses = []
    for _ in range(4):
        loss = ours(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    assert torch.equal(ours.get_input_embeddings().weight[: new[0]], old[: new[0]])
    ours.save_pretrained(tmp_path, save_embedding_layers=False)
    assert any("trainable_tokens" in name for name in load_file(tmp_path / "adapter_model.safetensors"))
    again = PeftModel.from_pretrained(enlarged(), tmp_path)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, ours(ids).logits)


def test_load_models_model_is_no_different(source: Path) -> None:
    ours, _ = load_model(str(source), compute_dtype=torch.float32, fast=False)
    torch.manual_seed(3)
    one = get_peft_model(ours, settings(use_dora=True))
    torch.manual_seed(3)
    two = get_peft_model(in_4_bits(source), settings(use_dora=True))
    assert torch.equal(logits(one), logits(two))
