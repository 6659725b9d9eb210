"""Recomputation: the same gradients at every level, less kept, and what is kept as predicted."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn

from halfbyte import HalfbyteError, add_lora, load_model
from halfbyte.huggingface.recompute import (
    LEVELS,
    choose_recomputation,
    measure_activation_bytes,
    set_recomputation,
)
from halfbyte.nn import supervised_loss
from halfbyte.ops import _memory
from models import ARCHITECTURES, VOCABULARY_SIZE, build_model


@pytest.fixture
def adapted(model_directory: Callable[[str], Path]) -> Callable[..., nn.Module]:
    def made(model_type: str = "llama", **loading: Any) -> nn.Module:
        torch.manual_seed(0)
        model, _ = load_model(str(model_directory(model_type)), **loading)
        # PEFT has no dropout for experts, and takes `all-linear` to mean them in some models.
        dropout = 0.0 if model_type in ("mixtral", "qwen3_moe") else 0.2
        lora = LoraConfig(r=4, lora_dropout=dropout, target_modules="all-linear", task_type="CAUSAL_LM")
        model = add_lora(model, lora)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.1)
        return model.train()

    return made


def batch(packed: bool, rows: int = 3, length: int = 24) -> dict[str, Tensor]:
    ids = torch.randint(VOCABULARY_SIZE - 3, (rows, length), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(length).repeat(rows, 1)
    if packed:
        positions[:, 10:] -= 10
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": positions, "labels": ids}


def gradients(model: nn.Module, level: str, packed: bool = False) -> dict[str, Tensor]:
    set_recomputation(model, level)
    model.zero_grad(set_to_none=True)
    torch.manual_seed(5)
    loss = supervised_loss(model, batch(packed))
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), "random": torch.get_rng_state(), **found}


@contextlib.contextmanager
def counted_allocations() -> Iterator[Callable[[], int]]:
    """Bytes that live tensors' storages hold more than before, at their most, by torch's own account."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        yield lambda: peak

    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("model_type", sorted(ARCHITECTURES))
def test_the_gradients_are_the_same_bits_at_every_level(
    adapted: Callable[..., nn.Module], model_type: str, packed: bool
) -> None:
    model = adapted(model_type)
    levels = measure_activation_bytes(model).keys()
    # Falcon adds to what its products put out in place, so that they cannot be kept.
    assert levels == ({"none", "full"} if model_type == "falcon" else set(LEVELS))
    expected = gradients(model, "none", packed)
    assert len(expected) > 5
    for level in levels - {"none"}:
        found = gradients(model, level, packed)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected), level


@pytest.mark.parametrize(
    "settings", [{"quant_type": "none"}, {"fast": False}, {"compute_dtype": torch.float32}], ids=str
)
def test_so_it_is_for_models_that_are_loaded_otherwise(
    adapted: Callable[..., nn.Module], settings: dict[str, Any]
) -> None:
    model = adapted(**settings)
    expected = gradients(model, "none")
    for level in LEVELS[1:]:
        found = gradients(model, level)
        assert all(torch.equal(found[name], expected[name]) for name in expected), level


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "gemma2"])
def test_what_is_kept_is_what_was_predicted(
    adapted: Callable[..., nn.Module], model_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_memory, "_SMALL_BYTES", 1 << 40)  # so that torch gives all memory and can count it
    model = adapted(model_type)
    predicted = measure_activation_bytes(model)
    assert predicted.keys() == set(LEVELS)
    tokens = 8 * 128
    rows = batch(False, 8, 128)
    for level in LEVELS:
        set_recomputation(model, level)
        supervised_loss(model, rows).backward()  # gradients are there from here on
        with counted_allocations() as peak:
            supervised_loss(model, rows).backward()
        # Of two layers one is half: what is allowed for the backward of a layer weighs most where all is recomputed.
        most = 1.6 if level == "full" else 1.25
        assert 0.8 * peak() < predicted[level] * tokens < most * peak(), level


def test_the_probe_leaves_no_trace(adapted: Callable[..., nn.Module]) -> None:
    model = adapted().eval()
    torch.manual_seed(3)
    state = torch.get_rng_state()
    measure_activation_bytes(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert not model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_fastest_level_that_fits_is_chosen() -> None:
    bytes_a_token = {"none": 100.0, "elementwise": 60.0, "full": 10.0}
    for budget, level in ((1000, "none"), (999, "elementwise"), (600, "elementwise"), (599, "full"), (-1, "full")):
        assert choose_recomputation(bytes_a_token, 10, budget) == level
    assert choose_recomputation({"none": 100.0}, 10, 0) == "none"
    assert choose_recomputation({"none": 100.0, "full": 10.0}, 10, 700) == "full"


def test_a_model_whose_layers_cannot_be_recomputed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_model(dtype=torch.float32)
    monkeypatch.setattr(type(model), "supports_gradient_checkpointing", False)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    assert list(measure_activation_bytes(model)) == ["none"]
    with pytest.raises(HalfbyteError, match="gradient_checkpointing is true"):
        set_recomputation(model, "full")
