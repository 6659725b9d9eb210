"""LoRA over a 4-bit base: PEFT's own results, PEFT's own files, and a base that never changes."""

import copy
import json
import math
import shutil
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

import halfbyte
from halfbyte import HalfbyteError, Linear4bit, add_lora, quantize_4bit
from halfbyte.checkpoint.adapter import ADAPTER_FILES, save_adapter
from halfbyte.checkpoint.fingerprint import weights_sha256
from halfbyte.huggingface.peft import LoraLinear4bit, load_adapter
from models import VOCABULARY_SIZE, build_model

# What it puts in the place of a model's own operations is test_patch.py's matter.
load_model = partial(halfbyte.load_model, fast=False)

INPUT_IDS = torch.arange(2 * 9).view(2, 9) * 7 % (VOCABULARY_SIZE - 3)


def settings(**changes: Any) -> LoraConfig:
    """LoRA whose B is not zero, so that it does something from the first step."""
    values = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "init_lora_weights": False} | changes
    return LoraConfig(task_type="CAUSAL_LM", **values)


def dense_base(model: PreTrainedModel) -> PreTrainedModel:
    """A float32 model with the dequantized weights and no trace of 4 bits."""
    dense = AutoModelForCausalLM.from_config(copy.deepcopy(model.config))
    state = {}
    for name, module in model.named_modules():
        if isinstance(module, Linear4bit):
            weight = module.quantized.dequantize(torch.float32)
            state[f"{name}.weight"] = weight.T if isinstance(dense.get_submodule(name), Conv1D) else weight
            if module.bias is not None:
                state[f"{name}.bias"] = module.bias
    others = {name: t for name, t in model.state_dict().items() if name in dense.state_dict() and name not in state}
    dense.load_state_dict(others | state)
    return dense.eval()


def adapter_of(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if "lora_" in name}


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(INPUT_IDS).logits
    return result


@pytest.fixture
def model(model_directory: Callable[[str], Path]) -> PreTrainedModel:
    return load_model(str(model_directory("llama")), compute_dtype=torch.float32)[0]


@pytest.fixture
def adapted(model: PreTrainedModel) -> PeftModel:
    return add_lora(model, settings())


# ── The same as PEFT ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_rslora": True},
        {"r": 8, "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"q_proj": 32}},
        {"lora_bias": True},
        {"bias": "all"},
    ],
    ids=str,
)
def test_outputs_and_gradients_equal_plain_peft_on_the_dense_model(
    model_type: str, changes: dict[str, Any], model_directory: Callable[[str], Path]
) -> None:
    base, _ = load_model(str(model_directory(model_type)), compute_dtype=torch.float32)
    plain_base = dense_base(base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's remarks on lora_bias without a bias, on patterns that match nothing
        ours = add_lora(base, settings(**changes))
        plain = get_peft_model(plain_base, settings(**changes))
    with torch.no_grad():
        for mine, other in zip(adapter_of(ours).values(), adapter_of(plain).values(), strict=True):
            other.copy_(mine)
    assert adapter_of(ours).keys() == adapter_of(plain).keys()

    results = [adapted(INPUT_IDS, labels=INPUT_IDS) for adapted in (ours, plain)]
    for result in results:
        result.loss.backward()
    torch.testing.assert_close(results[0].logits, results[1].logits, rtol=1e-4, atol=1e-4)
    for (name, mine), other in zip(adapter_of(ours).items(), adapter_of(plain).values(), strict=True):
        assert mine.grad is not None, name
        assert other.grad is not None
        assert mine.grad.abs().max() > 0
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-3, atol=1e-5 * other.grad.abs().max().item() + 1e-7)


def test_in_bfloat16_the_gradients_are_no_further_from_float32_than_pefts(
    model_directory: Callable[[str], Path],
) -> None:
    exact_base, _ = load_model(str(model_directory("llama")), compute_dtype=torch.float32)
    base, _ = load_model(str(model_directory("llama")))
    exact, ours = get_peft_model(dense_base(exact_base), settings()), add_lora(base, settings())
    plain = get_peft_model(dense_base(exact_base).bfloat16(), settings())
    for other in (ours, plain):
        with torch.no_grad():
            for mine, their in zip(adapter_of(other).values(), adapter_of(exact).values(), strict=True):
                mine.copy_(their)
    for model in (exact, ours, plain):
        model(INPUT_IDS, labels=INPUT_IDS).loss.backward()
    norms = []
    for truth, mine, their in zip(*(adapter_of(m).values() for m in (exact, ours, plain)), strict=True):
        assert mine.dtype == mine.grad.dtype == torch.float32
        norms.append([(grad - truth.grad).norm() for grad in (mine.grad, their.grad.float())])
    ours_error, plain_error = (sum(column) for column in zip(*norms, strict=True))
    # Rounding is a matter of luck: the sums over all 28 matrices may differ by a quarter.
    assert ours_error <= 1.25 * plain_error


def test_dropout_is_active_in_training_alone_and_keeps_the_mean(model: PreTrainedModel) -> None:
    with_dropout = add_lora(copy.deepcopy(model), settings(lora_dropout=0.5))
    without = add_lora(model, settings())
    with torch.no_grad():
        for mine, other in zip(adapter_of(with_dropout).values(), adapter_of(without).values(), strict=True):
            mine.copy_(other)
    with_dropout.eval()
    assert torch.equal(logits(with_dropout), logits(without))
    layer, plain = (m.base_model.model.model.layers[0].mlp.up_proj for m in (with_dropout.train(), without))
    x = torch.randn(1, 32)
    base = plain.get_base_layer()(x)
    with torch.no_grad():
        drawn = torch.stack([layer(x) - base for _ in range(4000)])
        expected = plain(x) - base
    assert drawn.std(0).max() > 0
    assert (drawn.mean(0) - expected).abs().max() < 6 * (drawn.std(0) / math.sqrt(4000)).max()


def test_adapters_are_float32_on_every_linear_layer_and_the_base_is_frozen(adapted: PeftModel) -> None:
    layers = [module for module in adapted.modules() if isinstance(module, LoraLinear4bit)]
    assert len(layers) == 14
    for name, parameter in adapted.named_parameters():
        assert parameter.requires_grad == ("lora_" in name)
        assert parameter.dtype == torch.float32 or "lora_" not in name


def test_nothing_is_said_while_an_adapter_is_put_on(model: PreTrainedModel) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        add_lora(model, settings())


# ── Several adapters, and none ──────────────────────────────────────────────────────────────────────────────


def test_disabling_gives_the_base_and_enabling_the_adapter_again(model: PreTrainedModel) -> None:
    base = logits(model)
    adapted = add_lora(model, settings())
    with_adapter = logits(adapted)
    assert not torch.allclose(with_adapter, base, atol=1e-2)
    with adapted.disable_adapter():
        assert torch.equal(logits(adapted), base)
    assert torch.equal(logits(adapted), with_adapter)


def test_several_adapters(model: PreTrainedModel) -> None:
    dense = get_peft_model(dense_base(model), settings())
    ours = add_lora(model, settings())
    for adapted in (ours, dense):
        adapted.add_adapter("second", settings(r=2, target_modules=["q_proj", "down_proj"]))
    with torch.no_grad():
        for mine, other in zip(adapter_of(ours).values(), adapter_of(dense).values(), strict=True):
            other.copy_(mine)
    seen = []
    for active in ("default", "second", ["default", "second"]):
        for adapted in (ours, dense):
            adapted.base_model.set_adapter(active)
        torch.testing.assert_close(logits(ours), logits(dense), rtol=1e-4, atol=1e-4)
        seen.append(logits(ours))
    assert not torch.allclose(seen[0], seen[1], atol=1e-2)
    assert not torch.allclose(seen[0], seen[2], atol=1e-2)
    ours.delete_adapter("second")
    ours.set_adapter("default")
    assert torch.equal(logits(ours), seen[0])


# ── Merge ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("quant_type", ["nf4", "fp4", "int4"])
@pytest.mark.parametrize("double_quant", [False, True])
def test_unmerge_restores_the_bits(quant_type: str, double_quant: bool, model_directory: Callable[[str], Path]) -> None:
    model, _ = load_model(str(model_directory("llama")), quant_type, 32, double_quant, torch.float32)
    adapted = add_lora(model, settings())
    base, with_adapter = weights_sha256(adapted), logits(adapted)
    adapted.merge_adapter()
    assert weights_sha256(adapted) != base
    merged = logits(adapted)
    # What is merged is rounded to 4 bits again: near the adapter's result, and nearer than the base is.
    with_base = (logits_of_base(adapted) - with_adapter).norm()
    adapted.merge_adapter()
    assert (merged - with_adapter).norm() < with_base
    adapted.unmerge_adapter()
    assert weights_sha256(adapted) == base
    assert torch.equal(logits(adapted), with_adapter)


def logits_of_base(adapted: PeftModel) -> Tensor:
    with adapted.disable_adapter():
        return logits(adapted)


def test_a_merge_adds_in_float32(model_directory: Callable[[str], Path]) -> None:
    model, _ = load_model(str(model_directory("llama")))
    layer = add_lora(model, settings()).base_model.model.model.layers[0].mlp.up_proj
    before = layer.get_base_layer().quantized
    assert before.dtype == torch.bfloat16
    wanted = before.dequantize(torch.float32) + layer.get_delta_weight("default").detach()
    layer.merge()
    merged = layer.get_base_layer().quantized
    assert torch.equal(merged.packed, quantize_4bit(wanted.bfloat16()).packed)
    assert merged.dtype == torch.bfloat16


def test_two_adapters_merge_and_unmerge(adapted: PeftModel) -> None:
    base = weights_sha256(adapted)
    adapted.add_adapter("second", settings())
    adapted.merge_adapter(["default", "second"])
    merged = weights_sha256(adapted)
    with pytest.warns(UserWarning, match="already merged"):
        adapted.merge_adapter(["default"])
    assert weights_sha256(adapted) == merged != base
    adapted.unmerge_adapter()
    assert weights_sha256(adapted) == base


@pytest.mark.filterwarnings("ignore:Already following adapters were merged:UserWarning")
@pytest.mark.parametrize("at_once", [True, False])
def test_two_adapters_are_quantized_once(model: PreTrainedModel, at_once: bool) -> None:
    adapted = add_lora(model, settings())
    adapted.add_adapter("second", settings())
    layer = adapted.base_model.model.model.layers[0].mlp.up_proj
    with torch.no_grad():
        for name in ("default", "second"):
            layer.lora_B[name].weight.normal_(std=0.3)
    before = layer.get_base_layer().quantized
    codes = before.packed.clone()
    deltas = [layer.get_delta_weight(name).detach().float() for name in ("default", "second")]
    wanted = quantize_4bit((before.dequantize(torch.float32) + deltas[0] + deltas[1]).to(before.dtype))
    for names in [["default", "second"]] if at_once else [["default"], ["second"]]:
        layer.merge(adapter_names=names)
    assert torch.equal(layer.get_base_layer().quantized.packed, wanted.packed)
    layer.unmerge()
    assert torch.equal(layer.get_base_layer().quantized.packed, codes)


def test_merge_and_unload_gives_a_4_bit_model(adapted: PeftModel, tmp_path: Path) -> None:
    with_adapter = logits(adapted)
    merged = adapted.merge_and_unload()
    assert not any(isinstance(module, LoraLinear4bit) for module in merged.modules())
    assert isinstance(merged.model.layers[0].mlp.up_proj, Linear4bit)
    assert (logits(merged) - with_adapter).abs().mean() < 0.5 * with_adapter.abs().mean()


def test_a_broken_adapter_is_not_merged(adapted: PeftModel) -> None:
    base = weights_sha256(adapted)
    layer = adapted.base_model.model.model.layers[0].mlp.up_proj
    with torch.no_grad():
        layer.lora_B["default"].weight[3, 1] = math.nan
    with pytest.raises(HalfbyteError, match="NaN"):
        layer.merge()
    assert not layer.merged
    assert weights_sha256(adapted) == base


# ── PEFT alone, which knows nothing of 4 bits here ──────────────────────────────────────────────────────────


def test_plain_peft_computes_the_same(model: PreTrainedModel) -> None:
    ours = add_lora(copy.deepcopy(model), settings())
    plain = get_peft_model(model, settings())
    with torch.no_grad():
        for mine, other in zip(adapter_of(ours).values(), adapter_of(plain).values(), strict=True):
            other.copy_(mine)
    torch.testing.assert_close(logits(plain), logits(ours), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("safe_merge", [False, True])
@pytest.mark.parametrize("method", ["merge_adapter", "merge_and_unload"])
def test_plain_peft_refuses_to_merge_and_changes_nothing(model: PreTrainedModel, method: str, safe_merge: bool) -> None:
    plain = get_peft_model(model, settings())
    base, before = weights_sha256(plain), logits(plain)
    with pytest.raises(RuntimeError):
        getattr(plain, method)(safe_merge=safe_merge)
    assert weights_sha256(plain) == base
    assert torch.equal(logits(plain), before)


READS_THE_BASE = [
    {"use_dora": True},
    {"init_lora_weights": "pissa"},
    {"init_lora_weights": "pissa_niter_4"},
    {"init_lora_weights": "olora"},
    {"init_lora_weights": "orthogonal"},
    {"init_lora_weights": "mica"},
]


@pytest.mark.parametrize("changes", READS_THE_BASE, ids=str)
def test_what_reads_the_base_weight_is_refused_and_changes_nothing(
    model: PreTrainedModel, changes: dict[str, Any]
) -> None:
    base = weights_sha256(model)
    with pytest.raises(HalfbyteError, match=r"4 bits"):
        add_lora(copy.deepcopy(model), settings(**changes))
    with pytest.raises((TypeError, RuntimeError, ValueError)):
        get_peft_model(model, settings(**changes))
    assert weights_sha256(model) == base


@pytest.mark.parametrize("target_modules", ["no_such_layer", ["no_such_layer"], "[", []])
def test_targets_that_match_nothing_are_refused(model: PreTrainedModel, target_modules: Any) -> None:
    with pytest.raises(HalfbyteError, match="target_modules"):
        add_lora(model, settings(target_modules=target_modules))


# ── On disk ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_plain_peft_reads_what_is_saved(
    adapted: PeftModel, model_directory: Callable[[str], Path], tmp_path: Path
) -> None:
    base, _ = load_model(str(model_directory("llama")), compute_dtype=torch.float32)
    dense = dense_base(base)
    save_adapter(adapted, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(ADAPTER_FILES)
    plain = PeftModel.from_pretrained(dense, str(tmp_path))
    assert type(plain.base_model.model.model.layers[0].mlp.up_proj).__module__ == "peft.tuners.lora.layer"
    torch.testing.assert_close(logits(plain), logits(adapted), rtol=1e-4, atol=1e-4)
    names = load_file(tmp_path / "adapter_model.safetensors").keys()
    assert "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight" in names
    assert len(names) == 28
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert "halfbyte" not in json.dumps(config)


def test_an_adapter_that_plain_peft_saved_is_read(
    model: PreTrainedModel, model_directory: Callable[[str], Path], tmp_path: Path
) -> None:
    plain = get_peft_model(build_model(dtype=torch.float32), settings())
    plain.save_pretrained(tmp_path)
    ours = load_adapter(model, tmp_path)
    for mine, other in zip(adapter_of(ours).values(), adapter_of(plain).values(), strict=True):
        assert torch.equal(mine, other)
        assert not mine.requires_grad
    assert isinstance(ours.base_model.model.model.layers[0].mlp.up_proj, LoraLinear4bit)


def test_a_loaded_adapter_can_be_trained_on(
    adapted: PeftModel, model_directory: Callable[[str], Path], tmp_path: Path
) -> None:
    save_adapter(adapted, tmp_path)
    fresh, _ = load_model(str(model_directory("llama")), compute_dtype=torch.float32)
    again = load_adapter(fresh, tmp_path, is_trainable=True)
    assert torch.equal(logits(again), logits(adapted))
    again(INPUT_IDS, labels=INPUT_IDS).loss.backward()
    assert all(parameter.grad is not None for parameter in adapter_of(again).values())


def saved_adapter(model_directory: Callable[[str], Path], directory: Path) -> Path:
    model, _ = load_model(str(model_directory("llama")))
    save_adapter(add_lora(model, settings()), directory)
    return directory


def rewritten(file: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


LAST = "base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda tensors: tensors.pop(LAST), LAST),
        (lambda tensors: tensors.update({LAST: tensors[LAST][:-1].clone()}), "v_proj"),
        (
            lambda tensors: tensors.update({LAST.replace("1.self", "7.self"): tensors[LAST].clone()}),
            "layers.7.self_attn",
        ),
        (lambda tensors: tensors[LAST].view(-1).__setitem__(0, math.nan), LAST),
        (lambda tensors: tensors.clear(), "lora_A"),
    ],
    ids=["missing", "shape", "too many", "NaN", "empty"],
)
def test_an_adapter_file_that_does_not_fit_is_refused(
    model: PreTrainedModel,
    model_directory: Callable[[str], Path],
    tmp_path: Path,
    change: Callable[[dict[str, Tensor]], Any],
    told: str,
) -> None:
    directory = saved_adapter(model_directory, tmp_path)
    rewritten(directory / "adapter_model.safetensors", change)
    with pytest.raises(HalfbyteError, match=told) as caught:
        load_adapter(model, directory)
    assert str(directory) in str(caught.value)


@pytest.mark.parametrize("name", ADAPTER_FILES)
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"peft_type": "IA3"}', None])
def test_an_adapter_directory_that_is_broken_is_refused(
    model: PreTrainedModel, model_directory: Callable[[str], Path], tmp_path: Path, name: str, content: bytes | None
) -> None:
    directory = saved_adapter(model_directory, tmp_path)
    if content is None:
        (directory / name).unlink()
    else:
        (directory / name).write_bytes(content)
    with pytest.raises(HalfbyteError, match=str(directory)):
        load_adapter(model, directory)


def test_an_adapter_of_another_model_is_refused(model: PreTrainedModel, tmp_path: Path) -> None:
    for other in ({"hidden_size": 64}, {"num_hidden_layers": 3}):
        directory = tmp_path / str(len(list(tmp_path.iterdir())))
        get_peft_model(build_model(dtype=torch.float32, **other), settings()).save_pretrained(directory)
        with pytest.raises(HalfbyteError, match="does not fit"):
            load_adapter(copy.deepcopy(model), directory)
    shutil.rmtree(tmp_path)
    with pytest.raises(HalfbyteError, match=r"adapter_config\.json"):
        load_adapter(model, tmp_path)
