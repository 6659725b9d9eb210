"""halfbyte generate: what goes into the model, what comes out, and when it stops."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import processors
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from halfbyte import HalfbyteError, load_model
from halfbyte.huggingface.generate import generate_texts
from halfbyte.recipes import generate as recipe
from halfbyte.recipes.generate import generate
from models import build_tokenizer, save_model

Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase]


@pytest.fixture
def source(model_directory: Callable[[str], Path]) -> str:
    return str(model_directory("llama"))


@pytest.fixture
def loaded(source: str) -> Loaded:
    return load_model(source, compute_dtype=torch.float32)


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What is handed on to be generated from."""
    seen: dict[str, Any] = {}

    def record(model: object, tokenizer: object, prompts: list[str], *rest: object) -> list[str]:
        seen.update(prompt=prompts[0], rest=rest)
        return ["answer"]

    monkeypatch.setattr(recipe, "generate_texts", record)
    return seen


def greedy(model: PreTrainedModel, ids: list[int], steps: int, ends: set[int]) -> list[int]:
    """One token after another from the whole text, without a cache."""
    new: list[int] = []
    for _ in range(steps):
        with torch.no_grad():
            token = int(model(torch.tensor([ids + new])).logits[0, -1].argmax())
        new.append(token)
        if token in ends:
            break
    return new


def test_the_prompt_is_rendered_by_the_template(source: str, given: dict[str, Any]) -> None:
    assert generate(source, "hello") == "answer"
    assert given["prompt"] == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    generate(source, "hello", system="be brief", max_new_tokens=3, temperature=0.5, top_p=0.9)
    assert given["prompt"].startswith("<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\n")
    assert given["rest"][:3] == (3, 0.5, 0.9)


def test_without_a_template_the_text_is_gone_on_from(tmp_path: Path, given: dict[str, Any]) -> None:
    source = str(save_model(tmp_path, chat_template=None))
    generate(source, "Once upon a time")
    assert given["prompt"] == "Once upon a time"
    with pytest.raises(HalfbyteError, match="system message"):
        generate(source, "Once upon a time", system="be brief")


def test_greedy_is_the_likeliest_token_each_time(loaded: Loaded) -> None:
    model, tokenizer = loaded
    prompts = ["hello", "a much longer prompt than the other one", "x"]
    texts = generate_texts(model, tokenizer, prompts, 12)
    for prompt, text in zip(prompts, texts, strict=True):  # padding on the left changes nothing
        new = greedy(model, tokenizer(prompt)["input_ids"], 12, {tokenizer.eos_token_id})
        assert text == tokenizer.decode(new, skip_special_tokens=True)
    assert generate_texts(model, tokenizer, prompts[:1], 12) == texts[:1]


def test_drawing_is_decided_by_the_seed(source: str) -> None:
    drawn = [generate(source, "hello", temperature=5.0, max_new_tokens=12, seed=seed) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    likeliest = generate(source, "hello", max_new_tokens=12)
    assert generate(source, "hello", temperature=1.0, top_p=1e-6, max_new_tokens=12) == likeliest


def test_what_is_streamed_is_the_answer(source: str) -> None:
    pieces: list[str] = []
    answer = generate(source, "hello", max_new_tokens=20, stream=pieces.append)
    assert "".join(pieces) == answer


@pytest.mark.parametrize("own", [None, 3, [3, 5]])
def test_the_tokenizers_end_token_ends_it_whatever_the_models_is(loaded: Loaded, own: int | list[int] | None) -> None:
    model, tokenizer = loaded
    model.generation_config.eos_token_id = own
    tokens = greedy(model, tokenizer("hello")["input_ids"], 10, set())
    assert not {3, 5} & set(tokens)
    assert tokens[5] not in tokens[:5]
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(tokens[5])
    (text,) = generate_texts(model, tokenizer, ["hello"], 10)
    assert text == tokenizer.decode(tokens[:6])


def test_the_models_end_token_ends_it_too(loaded: Loaded) -> None:
    model, tokenizer = loaded
    tokens = greedy(model, tokenizer("hello")["input_ids"], 10, set())
    model.generation_config.eos_token_id = [3, tokens[5]]
    (text,) = generate_texts(model, tokenizer, ["hello"], 10)
    assert text == tokenizer.decode(tokens[:6])


def test_a_base_models_text_begins_as_in_training(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = loaded
    seen: list[list[int]] = []

    def record(input_ids: torch.Tensor, **_: object) -> torch.Tensor:
        seen.append(input_ids[0].tolist())
        return input_ids

    monkeypatch.setattr(model, "generate", record)
    for template, begins in ((None, True), (None, False), ("{{ messages }}", True)):
        tokenizer = build_tokenizer(template)
        bos = tokenizer.bos_token_id
        if begins:
            tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
                single="<|im_start|> $A", special_tokens=[("<|im_start|>", bos)]
            )
        generate_texts(model, tokenizer, ["hi"], 1)
        alone = tokenizer("hi", add_special_tokens=False)["input_ids"]
        assert seen.pop() == ([bos, *alone] if begins and template is None else alone)


def test_an_empty_prompt_is_refused(loaded: Loaded) -> None:
    with pytest.raises(HalfbyteError, match="empty"):
        generate_texts(*loaded, [""], 4)


def test_generating_leaves_the_weights_and_the_gradients_alone(loaded: Loaded) -> None:
    model, tokenizer = loaded
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    generate_texts(model, tokenizer, ["hello"], 5)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_an_adapter_that_is_not_there_is_found_before_the_model_is_loaded(
    source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recipe, "load_model", lambda *_: pytest.fail("the model was loaded"))
    with pytest.raises(HalfbyteError, match="/nowhere"):
        generate(source, "hello", adapter="/nowhere")


def test_the_output_layer_reads_the_last_positions_of_a_batch_as_one_matrix(loaded: Loaded) -> None:
    """torch copies the layer's weight for each row where they are a slice of all positions."""
    model, tokenizer = loaded
    strides: list[bool] = []
    hook = model.get_output_embeddings().register_forward_hook(
        lambda _, inputs, output: strides.append(inputs[0].is_contiguous())
    )
    texts = ["a b c", "hello", "one more of them"]
    together = generate_texts(model, tokenizer, texts, 3)
    hook.remove()
    assert len(strides) >= 1
    assert all(strides)
    assert not model.get_output_embeddings()._forward_pre_hooks
    assert together == [generate_texts(model, tokenizer, [text], 3)[0] for text in texts]
