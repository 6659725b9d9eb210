"""transformers' Trainer and TRL's on a 4-bit model, unchanged: the same steps as on a dense model of its weights."""

import copy
import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from dense_models import adapter_of, dense_base, logits, settings
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, Trainer, TrainingArguments

from halfbyte import QuantizationConfig, optim
from halfbyte.checkpoint.fingerprint import weights_sha256
from halfbyte.huggingface.peft import LoraLinear4bit
from models import VOCABULARY_SIZE

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
needs_trl = pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="trl is not installed: make setup")

# What transformers, accelerate and TRL say while they train is theirs.
pytestmark = pytest.mark.filterwarnings("ignore")


class Rows(Dataset):  # type: ignore[type-arg]
    """Sixteen rows of nine tokens, each row counting in steps of its own."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        ids = (torch.arange(9) * (i + 1) + 3 * i) % (VOCABULARY_SIZE - 3)
        return {"input_ids": ids, "labels": ids}


def in_4_bits(source: Path, dtype: torch.dtype = torch.float32, fast: bool = True) -> PreTrainedModel:
    config = QuantizationConfig(compute_dtype=dtype, fast=fast)
    return AutoModelForCausalLM.from_pretrained(source, quantization_config=config, dtype=dtype)


def train(model: nn.Module, directory: Path, resume: bool = False, paged: bool = False, **changes: Any) -> Trainer:
    values = {"max_steps": 6, "per_device_train_batch_size": 4, "logging_steps": 1, "save_strategy": "no"} | changes
    arguments = TrainingArguments(str(directory), use_cpu=True, report_to="none", disable_tqdm=True, **values)
    chosen = {"lr": 1e-2, "paged": paged} | ({"page_dir": directory} if paged else {})
    directory.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(
        model,
        arguments,
        train_dataset=Rows(),
        eval_dataset=Rows(),
        optimizer_cls_and_kwargs=(optim.AdamW, chosen),
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def losses_of(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def assert_equal_adapters(one: nn.Module, other: nn.Module) -> None:
    for (name, mine), their in zip(adapter_of(one).items(), adapter_of(other).values(), strict=True):
        assert torch.equal(mine, their), name


@pytest.fixture
def source(model_directory: Callable[[str], Path]) -> Path:
    return model_directory("llama")


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gemma3_text"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_trainers_losses_are_those_of_the_dense_model(
    model_directory: Callable[[str], Path], tmp_path: Path, model_type: str, checkpointing: bool
) -> None:
    base = in_4_bits(model_directory(model_type))
    theirs = get_peft_model(dense_base(base), settings())
    ours = get_peft_model(base, settings())
    with torch.no_grad():
        for mine, other in zip(adapter_of(ours).values(), adapter_of(theirs).values(), strict=True):
            other.copy_(mine)
    before = weights_sha256(ours)
    trainers = [
        train(model, tmp_path / name, gradient_checkpointing=checkpointing)
        for name, model in (("ours", ours), ("theirs", theirs))
    ]
    losses = [losses_of(trainer) for trainer in trainers]
    assert losses[0] == pytest.approx(losses[1], rel=2e-3)
    assert losses[0][-1] < losses[0][0]
    assert weights_sha256(ours) == before
    assert all(isinstance(m, LoraLinear4bit) for n, m in ours.named_modules() if n.endswith("q_proj"))


def test_a_trainer_with_autocast_and_paged_state(source: Path, tmp_path: Path) -> None:
    ours = get_peft_model(in_4_bits(source, torch.bfloat16), settings(lora_dropout=0.1))
    trainer = train(ours, tmp_path, paged=True, bf16=True, gradient_accumulation_steps=2)
    losses = losses_of(trainer)
    assert losses[-1] < losses[0]
    assert type(trainer.optimizer.optimizer) is optim.AdamW
    assert all(parameter.dtype == torch.float32 for parameter in adapter_of(ours).values())


def test_a_resumed_run_is_the_run(source: Path, tmp_path: Path) -> None:
    base = in_4_bits(source)
    torch.manual_seed(1)
    start = get_peft_model(base, settings())
    whole, part = copy.deepcopy(start), copy.deepcopy(start)
    train(whole, tmp_path / "whole")
    train(part, tmp_path / "part", save_strategy="steps", save_steps=3)
    kept = tmp_path / "part" / "checkpoint-6"
    assert {"adapter_config.json", "adapter_model.safetensors", "optimizer.pt"} <= {p.name for p in kept.iterdir()}
    shutil.rmtree(kept)
    resumed = copy.deepcopy(start)
    train(resumed, tmp_path / "part", resume=True, save_strategy="no")
    assert_equal_adapters(resumed, whole)


def test_evaluating_and_saving_on_the_way_change_nothing(source: Path, tmp_path: Path) -> None:
    torch.manual_seed(1)
    quiet = get_peft_model(in_4_bits(source), settings())
    watched = copy.deepcopy(quiet)
    train(quiet, tmp_path / "quiet")
    trainer = train(watched, tmp_path / "watched", eval_strategy="steps", eval_steps=1, save_strategy="steps")
    assert sum("eval_loss" in entry for entry in trainer.state.log_history) == 6
    assert_equal_adapters(quiet, watched)


# ── TRL ─────────────────────────────────────────────────────────────────────────────────────────────────────


ROWS = [
    {"instruction": f"Count to {n}.", "input": "" if n % 2 else "in words", "output": " ".join(map(str, range(n)))}
    for n in range(1, 9)
]


def listing(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_listing(name: str, model: Path, directory: Path, **changes: Any) -> set[str]:
    """The names of the files that it writes."""
    rows = directory / "rows"
    texts = [{"text": f"{row['instruction']} {row['output']}"} for row in ROWS]
    rows.write_text(json.dumps(ROWS) if name == "alpaca_sft" else "\n".join(map(json.dumps, texts)))
    small = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "disable_tqdm": True}
    # A token is a byte here, and Alpaca's prompt has some 300: a shorter row would have no answer left to learn.
    values = small | {"max_length": 512, "max_steps": 2, "save_steps": 1, "logging_steps": 1} | changes
    listing(name).main(str(model), rows, directory / "out", **values)
    return {path.name for path in (directory / "out").iterdir() if path.is_file()}


KINDS_OF_FILE = {"adapter_config.json", "adapter_model.safetensors", "README.md", "tokenizer.json"}
KINDS_OF_FILE |= {"tokenizer_config.json"}


@needs_trl
@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gemma3_text"])
@pytest.mark.parametrize("name", ["alpaca_sft", "short_sft"])
def test_a_listing_runs_and_what_it_writes_opens_in_plain_peft(
    name: str, model_type: str, model_directory: Callable[[str], Path], tmp_path: Path
) -> None:
    source = model_directory(model_type)
    assert run_listing(name, source, tmp_path) >= KINDS_OF_FILE
    assert (tmp_path / "out" / "checkpoint-2").is_dir()
    AutoTokenizer.from_pretrained(tmp_path / "out")

    base = in_4_bits(source, fast=False)
    dense = PeftModel.from_pretrained(dense_base(base), tmp_path / "out")
    ours = PeftModel.from_pretrained(base, tmp_path / "out")
    torch.testing.assert_close(logits(dense), logits(ours), rtol=1e-4, atol=1e-4)
    trained = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert all(tensor.abs().max() > 0 for name, tensor in trained.items() if "lora_B" in name)
    rank = 64 if name == "alpaca_sft" else 16
    assert {t.shape[0] for name, t in trained.items() if "lora_A" in name} == {rank}
    assert len(trained) == (16 if name == "alpaca_sft" else 8)


@needs_trl
@pytest.mark.parametrize("name", ["alpaca_sft", "short_sft"])
def test_a_listing_runs_on_the_real_model(name: str, smollm2_directory: Path, tmp_path: Path) -> None:
    assert run_listing(name, smollm2_directory, tmp_path) >= KINDS_OF_FILE


@needs_trl
def test_dpo(source: Path, tmp_path: Path) -> None:
    from datasets import Dataset as Table
    from trl import DPOConfig, DPOTrainer

    rows = [{"prompt": f"{n} ", "chosen": "yes", "rejected": "no"} for n in range(8)]
    model, tokenizer = in_4_bits(source, torch.bfloat16), AutoTokenizer.from_pretrained(source)
    base = logits(model)
    arguments = DPOConfig(
        str(tmp_path),
        max_steps=6,
        per_device_train_batch_size=4,
        logging_steps=1,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = DPOTrainer(
        model,
        args=arguments,
        train_dataset=Table.from_list(rows),
        processing_class=tokenizer,
        peft_config=settings(init_lora_weights=True),
    )
    trainer.optimizer_cls_and_kwargs = optim.AdamW, {"lr": 1e-2}  # trl 1.16's DPOTrainer has no argument for it
    trainer.train()
    assert type(trainer.optimizer.optimizer) is optim.AdamW
    losses = losses_of(trainer)
    # At first the model is its own reference, and the loss is that of a coin.
    assert losses[0] == pytest.approx(0.6931, abs=1e-3)
    assert losses[-1] < 0.5
    with trainer.model.disable_adapter():
        assert torch.equal(logits(trainer.model), base)
