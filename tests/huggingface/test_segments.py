"""Packed rows: the loss and the gradients of each text are those it has alone, or the model is not given them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn

from halfbyte.data import IGNORE_INDEX, Example, collate, pack
from halfbyte.huggingface import add_lora, load_model
from halfbyte.huggingface.segments import keeps_packed_apart
from halfbyte.nn import supervised_loss
from models import ARCHITECTURES, VOCABULARY_SIZE, build_model

# Those whose positions or state go on from one text into the next.
LEAKING: dict[str, dict[str, Any]] = {
    "opt": {},
    "falcon": {},
    "bloom": {"n_layer": 2, "n_head": 4},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2},
    "mamba": {},
    "recurrent_gemma": {"lru_width": 32, "num_hidden_layers": 3},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("model_type", [name for name in ARCHITECTURES if name not in LEAKING])
def test_models_that_take_packed_rows(model_type: str, dtype: torch.dtype) -> None:
    assert keeps_packed_apart(build_model(model_type, dtype))


@pytest.mark.filterwarnings("ignore")  # of kernels that these models have on other devices
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("model_type", LEAKING)
def test_models_that_do_not(model_type: str, dtype: torch.dtype) -> None:
    model = build_model(model_type, dtype, **LEAKING[model_type]).train()
    assert not keeps_packed_apart(model)
    assert model.training


def test_a_model_that_knows_no_position_ids() -> None:
    model = build_model("llama")
    forward = model.forward
    model.forward = lambda input_ids, use_cache: forward(input_ids=input_ids, use_cache=use_cache)
    assert not keeps_packed_apart(model)


@pytest.fixture(params=["llama", "mistral", "gemma2", "gpt_neox"], scope="module")
def trained(request: pytest.FixtureRequest, model_directory: Callable[[str], Path]) -> nn.Module:
    """A small random model in 4 bits, computing in float32, with halfbyte's kernels and adapters that do something."""
    model, _ = load_model(str(model_directory(request.param)), compute_dtype=torch.float32)
    lora = add_lora(model, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear"))
    generator = torch.Generator().manual_seed(1)
    for parameter in lora.parameters():
        if parameter.requires_grad:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return lora.train()


def random_examples(seed: int, number: int, longest: int) -> list[Example]:
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for _ in range(number):
        length = int(torch.randint(2, longest + 1, (), generator=generator))
        ids = torch.randint(VOCABULARY_SIZE, (length,), generator=generator, dtype=torch.int32)
        learned = torch.rand(length, generator=generator) < 0.5
        learned[0], learned[-1] = False, True
        examples.append(Example(ids, torch.where(learned, ids, IGNORE_INDEX)))
    return examples


def loss_and_gradients(model: nn.Module, batch: dict[str, Tensor]) -> tuple[float, dict[str, Tensor]]:
    model.zero_grad()
    loss = supervised_loss(model, batch)
    loss.backward()
    return loss.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def only(batch: dict[str, Tensor], row: int, begin: int, end: int) -> dict[str, Tensor]:
    """The same batch, in which one text alone is learned."""
    labels = torch.full_like(batch["labels"], IGNORE_INDEX)
    labels[row, begin:end] = batch["labels"][row, begin:end]
    return {**batch, "labels": labels}


@pytest.mark.parametrize("seed", range(3))
def test_packed_and_padded_are_the_same_row_for_row(trained: nn.Module, seed: int) -> None:
    """Losses to 1e-5 and gradients to 1e-4, both relative, of every text of a random packing."""
    examples = random_examples(seed, 11, 40)
    packed = pack(examples, 64)
    padded_batch, packed_batch = collate(examples, pad_token_id=0), collate(packed, pad_token_id=0)
    assert len(packed) < len(examples) / 2
    place_of = {
        tuple(packed_batch["input_ids"][row, begin : begin + len(example.input_ids)].tolist()): (row, begin)
        for example in examples
        for row in range(len(packed))
        for begin in range(packed_batch["input_ids"].shape[1] - len(example.input_ids) + 1)
        if packed_batch["position_ids"][row, begin] == 0
    }
    whole = [0.0, 0.0]
    for number, example in enumerate(examples):
        row, begin = place_of[tuple(example.input_ids.tolist())]
        length = len(example.input_ids)
        want, want_gradients = loss_and_gradients(trained, only(padded_batch, number, 0, length))
        got, gradients = loss_and_gradients(trained, only(packed_batch, row, begin, begin + length))
        assert got == pytest.approx(want, rel=1e-5)
        assert gradients.keys() == want_gradients.keys()
        for name, gradient in want_gradients.items():
            assert (gradients[name] - gradient).norm() <= 1e-4 * gradient.norm(), name
        whole[0] += want
        whole[1] += got
    want, want_gradients = loss_and_gradients(trained, padded_batch)
    got, gradients = loss_and_gradients(trained, packed_batch)
    assert [want, got] == pytest.approx(whole, rel=1e-5)
    for name, gradient in want_gradients.items():
        assert (gradients[name] - gradient).norm() <= 1e-4 * gradient.norm(), name
