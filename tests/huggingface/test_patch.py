"""What accelerate_model replaces in which architecture, and that nothing but speed changes by it."""

import copy
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn
from transformers import PreTrainedModel

from halfbyte.huggingface import Replacement, accelerate_model, add_lora, describe_replacements, replacements_of
from halfbyte.nn import LogitTransform, logit_transform, supervised_loss
from models import ARCHITECTURES, VOCABULARY_SIZE, build_model

pytestmark = [
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False"),  # PEFT finds Conv1D and says so
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys"),  # and what it prepares for experts
]
Result = dict[str, Tensor]

# model_type -> what must be replaced, and how many modules of it there are in a model of two layers.
LLAMA = {"rms_norm": 5, "gated_mlp": 2, "rotary": 1, "attention": 2, "loss": 1}
EXPECTED: dict[str, dict[str, int]] = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA | {"rms_norm": 9},
    "gemma2": LLAMA | {"rms_norm": 9},
    "gemma3_text": LLAMA | {"rms_norm": 13},
    "phi3": LLAMA,
    "gpt_neox": {"layer_norm": 5, "rotary": 1, "attention": 2, "loss": 1},
    "gpt2": {"layer_norm": 5, "attention": 2, "loss": 1},
    "opt": {"layer_norm": 5, "attention": 2, "loss": 1},
    "falcon": {"layer_norm": 3, "rotary": 1, "loss": 1},  # takes no other attention
    "granite": LLAMA,
    "mixtral": {"rms_norm": 5, "rotary": 1, "attention": 2, "loss": 1},  # its experts are tensors, not modules
    "cohere": {"layer_norm": 3, "gated_mlp": 2, "attention": 2, "loss": 1},  # rotates neighbours, not halves
    "olmo2": LLAMA | {"rms_norm": 9},
    "glm4": LLAMA | {"rms_norm": 9, "rotary": 0},  # likewise
}
TRANSFORMS = {"gemma2": LogitTransform(1.0, 5.0), "granite": LogitTransform(0.25, 0.0)}


@pytest.fixture(autouse=True)
def modelling_modules_as_they_were() -> Iterator[None]:
    """The rotary embedding is exchanged in transformers' own modules; every test begins without."""
    yield
    for module in list(sys.modules.values()):
        function = vars(module).get("apply_rotary_pos_emb")
        if hasattr(function, "halfbyte_name"):
            module.apply_rotary_pos_emb = function.__closure__[0].cell_contents  # type: ignore[attr-defined]


def batch() -> Result:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(VOCABULARY_SIZE - 3, (3, 11), generator=generator)
    labels = ids.clone()
    labels[:, :4] = -100
    labels[1, 6:] = -100
    mask = torch.ones_like(ids)
    mask[2, 8:] = 0
    labels[2, 8:] = -100
    positions = torch.arange(11).expand(3, 11).contiguous()
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "labels": labels}


def measure(model: PreTrainedModel) -> Result:
    """Logits, the loss, and its gradients to every trainable weight."""
    data = batch()
    logits = model(**{key: value for key, value in data.items() if key != "labels"}, use_cache=False).logits
    loss = supervised_loss(model, data)
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    gradients = torch.autograd.grad(loss, [p for _, p in trained])
    named = {name: gradient for (name, _), gradient in zip(trained, gradients, strict=True)}
    # What stands at a position of padding is nobody's business: one attention averages there, another has zeros.
    return {"logits": logits.detach()[data["attention_mask"].bool()], "loss": loss.detach(), **named}


def with_adapter(model: PreTrainedModel) -> PreTrainedModel:
    torch.manual_seed(0)
    adapted: PreTrainedModel = add_lora(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    return adapted


def slow(model: PreTrainedModel) -> Result:
    """The model as transformers and PEFT run it, its loss from logits."""
    unpatched = with_adapter(copy.deepcopy(model))
    hook = unpatched.get_output_embeddings().register_forward_hook(
        lambda *_: None
    )  # with it the loss takes the slow way
    assert logit_transform(unpatched) is None
    result = measure(unpatched)
    hook.remove()
    return result


def distance(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm())


@pytest.mark.parametrize("model_type", EXPECTED)
def test_the_same_numbers_in_float32_and_no_worse_ones_in_bfloat16(model_type: str) -> None:
    wide = build_model(model_type, torch.float32)
    narrow = copy.deepcopy(wide).bfloat16()
    exact_inputs = copy.deepcopy(narrow).float()  # the bfloat16 model's own weights
    exact, reference, expected = slow(exact_inputs), slow(narrow), slow(wide)
    for model in (wide, narrow):
        replacements = accelerate_model(model)
        assert counts(replacements) == {k: v for k, v in EXPECTED[model_type].items() if v}
        assert replacements_of(with_adapter(copy.deepcopy(model))) == replacements
    ours = measure(with_adapter(wide))
    assert ours.keys() == expected.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, expected[name], rtol=2e-4, atol=2e-4 * float(expected[name].abs().max()))
    in_bfloat16 = measure(with_adapter(narrow))
    # Over a whole model the two take different paths through the same rounding noise: from batch to batch the ratio
    # of the gradients' distances is anything from 0.7 to 1.9, around a mean of 1.0. Each op is held to less by itself.
    for names, bound in ((["logits"], 1.25), ([name for name in ours if "lora" in name], 2.0)):
        theirs = sum(distance(reference[name], exact[name]) ** 2 for name in names) ** 0.5
        mine = sum(distance(in_bfloat16[name], exact[name]) ** 2 for name in names) ** 0.5
        assert mine <= bound * theirs
    assert abs(in_bfloat16["loss"] - exact["loss"]) <= abs(reference["loss"] - exact["loss"]) + 0.01 * exact["loss"]


def counts(replacements: list[Replacement]) -> dict[str, int]:
    found: dict[str, int] = {}
    for replacement in replacements:
        if replacement.status == "replaced":
            found[replacement.name] = found.get(replacement.name, 0) + replacement.count
    return found


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_what_is_done_to_the_logits_is_found_out(model_type: str) -> None:
    model = build_model(model_type, torch.float32)
    assert logit_transform(model) == TRANSFORMS.get(model_type, LogitTransform(1.0, 0.0))


def test_twice_is_once() -> None:
    model = build_model(dtype=torch.float32)
    first = accelerate_model(model)
    forwards = [vars(module).get("forward") for module in model.modules()]
    second = accelerate_model(model)
    assert [vars(module).get("forward") for module in model.modules()] == forwards
    assert [(r.name, r.count, r.status) for r in first] == [(r.name, r.count, r.status) for r in second]


def test_a_copy_runs_on_its_own_weights() -> None:
    model = build_model(dtype=torch.float32)
    accelerate_model(model)
    twin = copy.deepcopy(model)
    before = model(batch()["input_ids"]).logits
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert torch.equal(model(batch()["input_ids"]).logits, before)
    assert not twin(batch()["input_ids"]).logits.any()


class OddNorm(nn.Module):
    """Everything that an RMSNorm has, and something else computed."""

    def __init__(self, weight: nn.Parameter, behaviour: str) -> None:
        super().__init__()
        self.weight, self.eps, self.behaviour = weight, 1e-6, behaviour

    def forward(self, x: Tensor) -> Tensor:
        if self.behaviour == "raises":
            raise KeyError("no such thing")
        if self.behaviour == "other epsilon":
            return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-3)
        if self.behaviour == "other shape":
            return x[..., :-1]
        return self.weight * x / x.norm(dim=-1, keepdim=True)


@pytest.mark.parametrize("behaviour", ["raises", "other epsilon", "other shape", "other scale"])
def test_what_computes_something_else_is_kept(behaviour: str) -> None:
    model = build_model(dtype=torch.float32)
    model.model.norm = OddNorm(model.model.norm.weight, behaviour)
    (odd,) = (r for r in accelerate_model(model) if r.target == "OddNorm")
    assert odd.status == "kept"
    assert odd.reason
    assert "forward" not in vars(model.model.norm)


class ReluGate(nn.Module):
    def __init__(self, mlp: Any) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(torch.relu(self.gate_proj(x)) * self.up_proj(x))  # type: ignore[no-any-return]


class Swapped(ReluGate):
    """The names say one thing, the arithmetic another."""

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(nn.functional.silu(self.up_proj(x)) * self.gate_proj(x))  # type: ignore[no-any-return]


def test_an_mlp_is_known_by_what_it_computes() -> None:
    model = build_model(dtype=torch.float32)
    model.model.layers[0].mlp = ReluGate(model.model.layers[0].mlp)
    model.model.layers[1].mlp = Swapped(model.model.layers[1].mlp)
    expected = slow(model)
    replaced = {r.target: r for r in accelerate_model(model)}
    assert replaced["ReluGate"].status == "kept"
    assert replaced["Swapped"].status == "replaced"
    assert "kept: unknown (ReluGate ×1)" in describe_replacements(list(replaced.values()))
    for name, value in measure(with_adapter(model)).items():
        torch.testing.assert_close(value, expected[name], rtol=2e-4, atol=2e-4 * float(expected[name].abs().max()))


def test_an_unusual_call_reaches_the_original() -> None:
    """Another dtype, another shape of the tables: the functions that were there are still there underneath."""
    model = build_model(dtype=torch.float32)
    accelerate_model(model)
    norm = model.model.norm
    x = torch.randn(2, 3, 32)
    assert norm(x.bfloat16()).dtype == torch.float32  # what LlamaRMSNorm makes of a float32 weight
    assert torch.equal(norm(hidden_states=x), type(norm).forward(norm, x))
    rotate = sys.modules[type(model).__module__].apply_rotary_pos_emb  # type: ignore[attr-defined]
    q, tables = torch.randn(2, 4, 5, 8), torch.randn(5, 8)
    assert rotate(q, q, tables[None].double(), tables[None].double())[0].dtype == torch.float64
    assert rotate(q, q, torch.ones(4, 5, 8), torch.zeros(4, 5, 8), unsqueeze_dim=0)[0].shape == q.shape


def test_a_model_that_needs_more_than_ids_keeps_its_loss() -> None:
    model = build_model(dtype=torch.float32)
    original = type(model).forward

    def forward(*args: Any, must: int, **kwargs: Any) -> Any:
        return original(model, *args, **kwargs)

    model.forward = forward
    (loss,) = (r for r in accelerate_model(model) if r.name == "loss")
    assert loss.status == "kept"


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
def test_checkpointing_recomputes_the_same() -> None:
    model = build_model(dtype=torch.float32)
    expected = slow(model)
    accelerate_model(model)
    adapted = with_adapter(model)
    adapted.base_model.model.gradient_checkpointing_enable({"use_reentrant": False})
    adapted.train()
    for name, value in measure(adapted).items():
        torch.testing.assert_close(value, expected[name], rtol=2e-4, atol=2e-4 * float(expected[name].abs().max()))


def test_generation_says_the_same() -> None:
    model = build_model(dtype=torch.float32)
    ids = batch()["input_ids"][:1]
    settings = {"max_new_tokens": 12, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    before = model.generate(ids, **settings)
    accelerate_model(model)
    assert torch.equal(model.generate(ids, **settings), before)


def test_the_random_numbers_of_the_run_are_not_moved() -> None:
    torch.manual_seed(7)
    before = torch.get_rng_state()
    model = build_model(dtype=torch.float32)
    torch.set_rng_state(before)
    accelerate_model(model)
    assert torch.equal(torch.get_rng_state(), before)
