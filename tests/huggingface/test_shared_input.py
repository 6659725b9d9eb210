"""Layers that read one tensor are found, computed at once, and give what each of them alone would."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel
from torch import Tensor, nn

import halfbyte
from halfbyte import add_lora, ops
from halfbyte.huggingface import peft as peft_module
from halfbyte.huggingface.peft import LoraLinear4bit
from halfbyte.huggingface.shared_input import SharedInput, find_shared_inputs

INPUT_IDS = torch.arange(2 * 9).view(2, 9) * 7 % 200


def adapt(directory: Path, **changes: object) -> PeftModel:
    model, _ = halfbyte.load_model(str(directory), compute_dtype=torch.float32)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "init_lora_weights": False} | changes
    return add_lora(model, LoraConfig(task_type="CAUSAL_LM", **settings))  # type: ignore[arg-type]


def groups_of(model: nn.Module) -> set[tuple[str, ...]]:
    """The names of the layers of each group, in the order in which they are called."""
    names = {module: name.rpartition(".")[2] for name, module in model.named_modules()}
    shared = {m.shared_input for m in model.modules() if isinstance(m, LoraLinear4bit) and m.shared_input}
    return {tuple(names[layer] for layer in group.layers) for group in shared}


@pytest.mark.parametrize(
    ("model_type", "expected"),
    [
        ("llama", {("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")}),
        ("qwen2", {("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")}),
        ("gpt2", set()),
    ],
)
def test_who_shares(model_type: str, expected: set[tuple[str, ...]], model_directory: Callable[[str], Path]) -> None:
    assert groups_of(adapt(model_directory(model_type))) == expected


def test_looking_for_them_changes_nothing(model_directory: Callable[[str], Path]) -> None:
    model = adapt(model_directory("llama"), lora_dropout=0.5).train()
    model.base_model.model.model.layers[1].eval()
    modes, state = [module.training for module in model.modules()], torch.get_rng_state()
    assert len(find_shared_inputs(model, LoraLinear4bit)) == 4
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert not any("forward" in vars(m) for m in model.modules() if isinstance(m, LoraLinear4bit))


def test_a_group_is_no_larger_than_a_sum_may_be(
    model_directory: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peft_module, "MOST_TERMS", 2)
    assert groups_of(adapt(model_directory("llama"))) == {("q_proj", "k_proj"), ("v_proj",), ("gate_proj", "up_proj")}


class _NeedsMore(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, input_ids: Tensor, image: Tensor) -> Tensor:
        raise NotImplementedError


def test_a_model_that_needs_more_than_ids_has_none() -> None:
    model = _NeedsMore()
    assert find_shared_inputs(model, nn.Linear) == []
    assert "forward" not in vars(model.layer)


def losses_and_gradients(model: PeftModel) -> tuple[Tensor, list[Tensor]]:
    torch.manual_seed(5)
    loss = model(input_ids=INPUT_IDS, labels=INPUT_IDS).loss
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return loss.detach(), list(torch.autograd.grad(loss, parameters))


@pytest.mark.parametrize(
    "changes",
    [{}, {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"v_proj": 4}}, {"target_modules": ["q_proj"]}],
    ids=str,
)
def test_together_as_alone(changes: dict[str, object], model_directory: Callable[[str], Path]) -> None:
    together = adapt(model_directory("llama"), **changes)
    alone = copy.deepcopy(together)
    for module in alone.modules():
        if isinstance(module, LoraLinear4bit):
            module.shared_input = None
    (loss, gradients), (expected_loss, expected) = losses_and_gradients(together), losses_and_gradients(alone)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-6, atol=0)
    for mine, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6 * float(other.abs().max()) + 1e-9)


def test_one_call_for_the_group(model_directory: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapt(model_directory("llama"))
    calls = []
    original = ops.matmul_dense
    monkeypatch.setattr(ops, "matmul_dense", lambda *a, **k: calls.append(a[1].shape[0]) or original(*a, **k))
    with torch.no_grad():
        model(input_ids=INPUT_IDS)
    assert calls == [12, 4, 8, 4] * 2  # ranks of q, k and v; of o; of gate and up; of down


def test_a_layer_that_differs_is_computed_alone(model_directory: Callable[[str], Path]) -> None:
    model = adapt(model_directory("llama"))
    layer = model.base_model.model.model.layers[0].self_attn
    layer.v_proj.set_scale("default", 3.0)
    alone = copy.deepcopy(model)
    for module in alone.modules():
        if isinstance(module, LoraLinear4bit):
            module.shared_input = None
    with torch.no_grad():
        assert torch.equal(model(INPUT_IDS).logits, alone(INPUT_IDS).logits)


def test_what_waits_belongs_to_one_input_in_one_state() -> None:
    first, second, made = nn.Identity(), nn.Identity(), []

    def compute_all(layers: object, x: Tensor) -> list[Tensor]:
        made.append(x)
        return [x + 1, x + 2]

    group, x = SharedInput([first, second]), torch.zeros(2)
    assert torch.equal(group.output_of(first, x, compute_all), torch.ones(2))
    assert torch.equal(group.output_of(second, x, compute_all), torch.full((2,), 2.0))
    assert len(made) == 1
    group.output_of(first, x, compute_all)
    x += 1  # what waits for the second is of another value
    assert torch.equal(group.output_of(second, x, compute_all), torch.full((2,), 3.0))
    assert len(made) == 3
    group.output_of(first, x, compute_all)
    assert len(made) == 3
    group.output_of(first, x, compute_all)
    with torch.no_grad():  # what waits for it has a gradient to take
        group.output_of(second, x, compute_all)
    assert len(made) == 5
