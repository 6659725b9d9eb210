"""The loss at the supervised positions alone is the loss that transformers computes at all of them."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from halfbyte.nn import count_supervised, supervised_loss
from models import ARCHITECTURES, VOCABULARY_SIZE, build_model

Batch = dict[str, Tensor]


def build_batch(padding: int = 0) -> Batch:
    """Three rows of 12, 7 and 9 tokens, of which an answer is supervised, in one row two answers."""
    generator = torch.Generator().manual_seed(1)
    lengths, width = (12, 7, 9), 12 + padding
    input_ids = torch.full((3, width), VOCABULARY_SIZE - 1)
    labels, attention_mask = torch.full_like(input_ids, -100), torch.zeros_like(input_ids)
    for row, length in enumerate(lengths):
        attention_mask[row, :length] = 1
        input_ids[row, :length] = torch.randint(VOCABULARY_SIZE - 3, (length,), generator=generator)
        labels[row, 4:length] = input_ids[row, 4:length]
    labels[0, 6:9] = -100
    position_ids = torch.arange(width).expand(3, width).contiguous()
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "position_ids": position_ids,
        "labels": labels,
    }


def transformers_loss(model: nn.Module, batch: Batch) -> Tensor:
    """The mean, as every causal language model of transformers computes it from the logits of all positions."""
    loss: Tensor = model(**batch, use_cache=False).loss
    return loss


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_loss_and_gradient_equal_those_of_transformers(model_type: str) -> None:
    model = build_model(model_type, torch.float32).requires_grad_(False)
    batch = build_batch()
    embeddings = model.get_input_embeddings().weight.requires_grad_()
    ours = supervised_loss(model, batch) / count_supervised(batch)
    (our_gradient,) = torch.autograd.grad(ours, embeddings)
    theirs = transformers_loss(model, batch)
    (their_gradient,) = torch.autograd.grad(theirs, embeddings)
    assert count_supervised(batch) == 5 + 3 + 5
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(our_gradient, their_gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("model_type", "settings"), [("gemma2", {"final_logit_softcapping": None}), ("granite", {"logits_scaling": 1.0})]
)
def test_what_a_model_does_to_its_logits_is_in_the_loss(model_type: str, settings: dict[str, float | None]) -> None:
    batch = build_batch()
    plain = supervised_loss(build_model(model_type, torch.float32, **settings), batch)
    assert not torch.allclose(plain, supervised_loss(build_model(model_type, torch.float32), batch), rtol=1e-3)


def test_logits_are_computed_at_supervised_positions_only() -> None:
    model, batch = build_model(dtype=torch.float32), build_batch()
    seen: list[tuple[int, ...]] = []
    model.lm_head.register_forward_hook(lambda module, args, output: seen.append(tuple(output.shape)))
    supervised_loss(model, batch)
    assert seen == [(1, count_supervised(batch), VOCABULARY_SIZE)]


def test_the_model_is_left_as_it_was_even_after_an_error() -> None:
    model, batch = build_model(dtype=torch.float32), build_batch()
    before = model(batch["input_ids"]).logits
    supervised_loss(model, batch)
    with pytest.raises((RuntimeError, IndexError)):
        supervised_loss(model, batch | {"input_ids": batch["input_ids"] + VOCABULARY_SIZE})
    assert torch.equal(model(batch["input_ids"]).logits, before)
    assert model(batch["input_ids"]).logits.shape == (3, 12, VOCABULARY_SIZE)


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gpt2", "opt", "falcon"])
def test_padding_changes_nothing(model_type: str) -> None:
    model = build_model(model_type, torch.float32)
    short, long = supervised_loss(model, build_batch()), supervised_loss(model, build_batch(padding=20))
    rows = [{key: value[row : row + 1] for key, value in build_batch(padding=3).items()} for row in range(3)]
    alone = sum(supervised_loss(model, row) for row in rows)
    torch.testing.assert_close(short, long, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(short, alone, rtol=1e-5, atol=1e-5)


def test_a_wrong_label_in_the_prompt_or_the_padding_changes_nothing_and_one_in_the_answer_does() -> None:
    model, batch = build_model(dtype=torch.float32), build_batch()
    before = supervised_loss(model, batch)
    # Not counted: nothing predicts the first token.
    first = batch["labels"].clone()
    first[:, 0] = 5
    assert torch.equal(supervised_loss(model, batch | {"labels": first}), before)
    answer = batch["labels"].clone()
    answer[1, 6] += 1
    assert not torch.allclose(supervised_loss(model, batch | {"labels": answer}), before, rtol=1e-4)


def test_without_supervised_tokens_the_loss_is_zero() -> None:
    batch = build_batch()
    nothing = batch | {"labels": torch.full_like(batch["labels"], -100)}
    assert count_supervised(nothing) == 0
    assert supervised_loss(build_model(dtype=torch.float32), nothing).item() == 0


def test_the_loss_of_a_16_bit_model_is_float32() -> None:
    assert supervised_loss(build_model(dtype=torch.bfloat16), build_batch()).dtype == torch.float32


@pytest.mark.parametrize("target_modules", ["all-linear", ["lm_head"]])
def test_an_adapter_may_be_on_the_model_and_on_its_output_layer(target_modules: str | list[str]) -> None:
    settings = LoraConfig(r=2, target_modules=target_modules, init_lora_weights=False)
    model = get_peft_model(build_model(dtype=torch.float32), settings)
    batch = build_batch()
    ours = supervised_loss(model, batch) / count_supervised(batch)
    torch.testing.assert_close(ours, transformers_loss(model, batch), rtol=1e-5, atol=1e-6)
