"""How good a model is on held-out rows: loss, perplexity, and answers that match word for word."""

import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from halfbyte.checkpoint.files import write_json
from halfbyte.checkpoint.output import check_writable
from halfbyte.config import EvaluateConfig
from halfbyte.data import Row, encode_prompt, encode_rows, read_sources
from halfbyte.huggingface import load_model, prepare_tokenizer
from halfbyte.huggingface.generate import generate_texts
from halfbyte.huggingface.peft import read_adapter_config
from halfbyte.recipes.data_sources import training_sources
from halfbyte.recipes.fitting import check_tokenizer, put_on
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
        HalfbyteError: whatever the readers, `load_model` and `load_adapter` refuse; an adapter of another tokenizer.
    """
    console = console or Console(stderr=True)
    if config.adapter is not None:
        read_adapter_config(config.adapter)
        check_tokenizer(config.adapter, config.model_name_or_path)
    if config.output is not None:
        check_writable(Path(config.output), "output")
    tokenizer = prepare_tokenizer(config.model_name_or_path, config.adapter, config.chat_template, config.system_prompt)
    rows = list(islice(read_sources(training_sources(config)), config.limit))
    examples, _ = encode_rows(tokenizer, rows, config.max_length, truncation=config.truncation)
    model, _ = load_model(
        config.model_name_or_path,
        config.quant_type,
        config.block_size,
        config.double_quant,
        getattr(torch, config.compute_dtype),
    )
    if config.adapter is not None:
        model = put_on(model, config.adapter, config.model_name_or_path, console)
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
        prompts, answers = zip(*(encode_prompt(tokenizer, row) for row in batch), strict=True)
        texts = generate_texts(model, tokenizer, list(prompts), config.max_new_tokens)
        for row, answer, text in zip(batch, answers, texts, strict=True):
            yield Sample(_asked(row), answer.strip(), text.strip())


def _asked(row: Row) -> str:
    """The last thing that was said before the answer."""
    if not row.messages:
        return "".join(piece.text for piece in (row.pieces or ())[:-1])
    last = max(index for index, message in enumerate(row.messages) if message["role"] == "assistant")
    asked: str = row.messages[last - 1]["content"]
    return asked
