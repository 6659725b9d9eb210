"""The template that a run was told is in its directory, and is what the adapter is asked in later."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from halfbyte import HalfbyteError
from halfbyte.config import EvaluateConfig
from halfbyte.recipes import generate as recipe
from halfbyte.recipes.evaluate import evaluate
from halfbyte.recipes.generate import generate
from models import save_model
from runs import configure, run, write_rows


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A model whose tokenizer has no chat template."""
    return save_model(tmp_path / "base", chat_template=None)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The prompts that are generated from."""
    prompts: list[str] = []

    def record(_model: object, _tokenizer: object, given: list[str], *_: object) -> list[str]:
        prompts.extend(given)
        return ["answer"]

    monkeypatch.setattr(recipe, "generate_texts", record)
    return prompts


def test_a_base_model_takes_a_named_template_and_its_adapter_keeps_it(
    base: Path, tmp_path: Path, asked: list[str]
) -> None:
    rows = write_rows(tmp_path / "rows.jsonl")
    settings = configure(base, rows, tmp_path / "run", chat_template="zephyr", system_prompt="be brief", max_steps=2)
    run(settings)
    for adapter in (tmp_path / "run", tmp_path / "run" / "checkpoint-2"):
        generate(str(base), "hello", adapter=str(adapter))
        generate(str(base), "hello", adapter=str(adapter), system="be long")
        generate(str(base), "hello", adapter=str(adapter), chat_template="chatml")
        assert asked == [
            "<|system|>\nbe brief<|im_end|>\n<|user|>\nhello<|im_end|>\n<|assistant|>\n",
            "<|system|>\nbe long<|im_end|>\n<|user|>\nhello<|im_end|>\n<|assistant|>\n",
            "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n",
        ]
        asked.clear()
    saved = AutoTokenizer.from_pretrained(tmp_path / "run")
    shown = saved.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False)
    assert shown == "<|system|>\nbe brief<|im_end|>\n<|user|>\nhello<|im_end|>\n"
    values: dict[str, Any] = {"model_name_or_path": str(base), "dataset": str(rows), "max_length": 256}
    with_adapter = EvaluateConfig.model_validate(values | {"adapter": str(tmp_path / "run"), "generate": False})
    assert evaluate(with_adapter).supervised_tokens > 0
    with pytest.raises(HalfbyteError, match="no chat template"):
        evaluate(EvaluateConfig.model_validate(values))


def test_what_alpaca_rows_were_written_in_is_kept_too(base: Path, tmp_path: Path, asked: list[str]) -> None:
    row = {"instruction": "Say it.", "output": "yes"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    run(configure(base, tmp_path / "rows.jsonl", tmp_path / "run", max_steps=1, save_steps=None, max_length=300))
    generate(str(base), "Say it.", adapter=str(tmp_path / "run"))
    assert asked == [
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nSay it.\n\n### Response:\n"
    ]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"truncation": "drop", "max_length": 8}, "all have more than max_length"),
        ({"truncation": "error", "max_length": 8}, r"rows\.jsonl:1: this row has"),
        ({"chat_template": "zefyr"}, "did you mean zephyr"),
        ({"chat_template": None, "system_prompt": "be brief"}, "system_prompt needs a chat template"),
        ({"chat_template": None}, "no chat template"),
    ],
)
def test_what_cannot_be_is_told_before_a_model_is_loaded(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], sentence: str
) -> None:
    monkeypatch.setattr("halfbyte.recipes.finetune.load_model", lambda *_: pytest.fail("the model was loaded"))
    rows = write_rows(tmp_path / "rows.jsonl")
    with pytest.raises(HalfbyteError, match=sentence):
        run(configure(base, rows, tmp_path / "run", **{"chat_template": "zephyr"} | changes))


def test_a_system_prompt_that_no_row_has_a_place_for_is_refused(base: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": "four five"}) + "\n")
    settings = configure(
        base, tmp_path / "rows.jsonl", tmp_path / "run", chat_template="zephyr", system_prompt="be brief"
    )
    with pytest.raises(HalfbyteError, match="holds texts with no place for it"):
        run(settings)
