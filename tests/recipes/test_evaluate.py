"""halfbyte evaluate: loss and perplexity by hand, answers against what was expected."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from halfbyte import HalfbyteError, load_model
from halfbyte.config import EvaluateConfig
from halfbyte.recipes import evaluate as recipe
from halfbyte.recipes.evaluate import evaluate
from models import save_model
from runs import configure, run, write_rows


@pytest.fixture
def model(model_directory: Callable[[str], Path]) -> Path:
    return model_directory("llama")


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "rows.jsonl")


def settings(model: Path, rows: Path, **changes: Any) -> EvaluateConfig:
    values = {"model_name_or_path": str(model), "dataset": str(rows), "max_length": 128, "max_new_tokens": 8}
    return EvaluateConfig.model_validate(values | changes)


def test_the_loss_is_that_of_the_answers_alone(model: Path, rows: Path) -> None:
    loaded, tokenizer = load_model(str(model), compute_dtype=torch.float32)
    total, supervised = 0.0, 0
    for line in rows.read_text().splitlines():
        question, answer = json.loads(line)["messages"]
        prompt = tokenizer.apply_chat_template([question], tokenize=False, add_generation_prompt=True)
        before, learned = (tokenizer(text)["input_ids"] for text in (prompt, f"{answer['content']}<|im_end|>"))
        with torch.no_grad():
            logits = loaded(torch.tensor([before + learned])).logits[0, len(before) - 1 : -1]
        total += F.cross_entropy(logits, torch.tensor(learned), reduction="sum").item()
        supervised += len(learned)
    result = evaluate(settings(model, rows, generate=False, compute_dtype="float32"))
    assert (result.rows, result.supervised_tokens) == (12, supervised)
    assert result.loss == pytest.approx(total / supervised, rel=1e-4)
    assert result.perplexity == pytest.approx(math.exp(result.loss))
    assert result.exact_match is None
    assert result.samples == []


@pytest.mark.parametrize("size", [1, 5, 100])
def test_answers_and_how_many_match(
    model: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    asked: list[str] = []

    def answer(_model: object, tokenizer: Any, prompts: list[list[int]], max_new_tokens: int) -> list[str]:
        assert max_new_tokens == 8
        asked.extend(map(tokenizer.decode, prompts))
        return [" yes\n" for _ in prompts]

    monkeypatch.setattr(recipe, "generate_texts", answer)
    result = evaluate(settings(model, rows, per_device_eval_batch_size=size, output=str(tmp_path / "result.json")))
    assert result.exact_match == 3 / 12
    assert [sample.expected for sample in result.samples[:2]] == ["yes", "no, not at all"]
    assert result.samples[3].prompt == "Is 3 very very very very good?"
    assert {sample.got for sample in result.samples} == {"yes"}
    assert asked[0] == "<|im_start|>user\nIs 0 good?<|im_end|>\n<|im_start|>assistant\n"
    saved = json.loads((tmp_path / "result.json").read_text())
    assert saved["result"]["samples"][0] == {"prompt": "Is 0 good?", "expected": "yes", "got": "yes"}
    assert saved["result"]["loss"] == result.loss
    assert saved["config"]["per_device_eval_batch_size"] == size


def test_a_conversation_is_asked_for_its_last_answer(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns = [("system", "be brief"), ("user", "one?"), ("assistant", "1"), ("user", "two?"), ("assistant", "2")]
    turns += [("user", "thanks")]
    row = {"messages": [{"role": role, "content": content} for role, content in turns]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    asked: list[str] = []
    monkeypatch.setattr(
        recipe, "generate_texts", lambda m, t, prompts, n: asked.extend(map(t.decode, prompts)) or ["2"]
    )
    (sample,) = evaluate(settings(model, tmp_path / "rows.jsonl")).samples
    assert (sample.prompt, sample.expected) == ("two?", "2")
    assert asked[0].endswith("<|im_start|>user\ntwo?<|im_end|>\n<|im_start|>assistant\n")
    assert "1<|im_end|>" in asked[0]


def test_a_trained_adapter_answers_what_it_has_learned(model: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    row = {"messages": [{"role": "user", "content": "say it"}, {"role": "assistant", "content": "yes"}]}
    rows.write_text((json.dumps(row) + "\n") * 4)
    steps = {"max_steps": 15, "save_steps": None, "gradient_accumulation_steps": 1, "learning_rate": 3e-2}
    run(configure(model, rows, tmp_path / "run", lora_dropout=0.0, lora_r=16, **steps))
    before = evaluate(settings(model, rows))
    after = evaluate(settings(model, rows, adapter=str(tmp_path / "run")))
    assert after.loss < before.loss / 3
    assert (before.exact_match, after.exact_match) == (0.0, 1.0)
    assert after.samples[0].got == "yes"  # and stops there


def test_the_first_rows_only(model: Path, rows: Path) -> None:
    assert evaluate(settings(model, rows, limit=5, generate=False)).rows == 5
    assert evaluate(settings(model, rows, limit=500, generate=False)).rows == 12


def test_alpaca_rows_without_a_template_are_asked_as_they_were_learned(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", chat_template=None)
    (tmp_path / "rows.jsonl").write_text(json.dumps({"instruction": "Say it.", "output": "yes"}) + "\n")
    (sample,) = evaluate(settings(model, tmp_path / "rows.jsonl")).samples
    assert (sample.prompt, sample.expected) == ("Say it.", "yes")


@pytest.mark.parametrize("change", [{"adapter": "/nowhere"}, {"output": "/proc/nowhere/result.json"}])
def test_bad_input_is_found_before_the_model_is_loaded(
    model: Path, rows: Path, change: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recipe, "load_model", lambda *_: pytest.fail("the model was loaded"))
    with pytest.raises(HalfbyteError, match=next(iter(change.values()))):
        evaluate(settings(model, rows, **change))
