"""How good a model is on held-out rows: loss, perplexity, and answers that match word for word."""

import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from halfbyte.checkpoint.files import write_json
from halfbyte.checkpoint.output import check_writable
from halfbyte.config import EvaluateConfig
from halfbyte.data import Row, encode_rows, read_rows, render_alpaca_prompt, render_chat
from halfbyte.huggingface import load_model, load_tokenizer
from halfbyte.huggingface.generate import generate_texts
from halfbyte.huggingface.peft import load_adapter, read_adapter_config
from halfbyte.recipes.training import evaluate_loss, evaluation_batches


@dataclass(frozen=True)
class Sample:
    """A row, and what the model made of it."""

    prompt: str  # the last thing that was said before the answer
    expected: str
    got: str


@dataclass(frozen=True)
class EvaluationResult:
    rows: int
    supervised_tokens: int
    loss: float  # mean over the supervised tokens
    perplexity: float  # exp(loss)
    exact_match: float | None  # share of rows answered word for word, 0 to 1; None without generation
    samples: list[Sample]  # every row's answer, in the data's order; empty without generation
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def evaluate(config: EvaluateConfig, console: Console | None = None) -> EvaluationResult:
    """Measure a model, with an adapter or without, on the rows of a file.

    Raises:
        HalfbyteError: whatever the readers, `load_model` and `load_adapter` refuse.
    """
    console = console or Console(stderr=True)
    if config.adapter is not None:
        read_adapter_config(config.adapter)
    if config.output is not None:
        check_writable(Path(config.output), "output")
    tokenizer = load_tokenizer(config.model_name_or_path)
    rows = list(read_rows(config.dataset, config.dataset_format))[: config.limit]
    examples, _ = encode_rows(tokenizer, rows, config.max_length)
    model, _ = load_model(
        config.model_name_or_path,
        config.quant_type,
        config.block_size,
        config.double_quant,
        getattr(torch, config.compute_dtype),
    )
    if config.adapter is not None:
        model = load_adapter(model, config.adapter)
    started = time.perf_counter()
    batches = evaluation_batches(examples, config.per_device_eval_batch_size, tokenizer.pad_token_id)
    loss, supervised_tokens = evaluate_loss(model, batches, model.device)
    samples = list(_answers(config, model, tokenizer, rows, console)) if config.generate else []
    result = EvaluationResult(
        rows=len(rows),
        supervised_tokens=supervised_tokens,
        loss=loss,
        perplexity=math.exp(min(loss, 700.0)),
        exact_match=sum(s.got == s.expected for s in samples) / len(samples) if samples else None,
        samples=samples,
        seconds=time.perf_counter() - started,
    )
    if config.output is not None:
        write_json(Path(config.output), {"config": config.to_dict(), "result": result.to_dict()})
    return result


def _answers(
    config: EvaluateConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[Row],
    console: Console,
) -> Iterator[Sample]:
    size = config.per_device_eval_batch_size
    for start in track(range(0, len(rows), size), "answering", console=console, disable=not console.is_terminal):
        batch = rows[start : start + size]
        prompts, answers = zip(*(_prompt_and_answer(tokenizer, row) for row in batch), strict=True)
        texts = generate_texts(model, tokenizer, list(prompts), config.max_new_tokens)
        for row, answer, text in zip(batch, answers, texts, strict=True):
            yield Sample(row.messages[_last_answer(row) - 1]["content"], answer.strip(), text.strip())


def _prompt_and_answer(tokenizer: PreTrainedTokenizerBase, row: Row) -> tuple[str, str]:
    """What comes before the row's last answer, rendered as in training, and that answer."""
    if not tokenizer.chat_template and row.alpaca is not None:
        return render_alpaca_prompt(row.alpaca), row.alpaca.output
    last = _last_answer(row)
    prompt = render_chat(tokenizer, row.messages[:last], row.source, add_generation_prompt=True)
    return prompt, row.messages[last]["content"]


def _last_answer(row: Row) -> int:
    """Where in the row's messages it is; never the first, which no row begins with."""
    return max(index for index, message in enumerate(row.messages) if message["role"] == "assistant")
