"""TRL's SFTTrainer + bitsandbytes: a whole run over the same rows (workload B)."""

import gc
import json
import math
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peer_model import from_pretrained
from peft import LoraConfig, prepare_model_for_kbit_training
from protocol import Measure, Reply, Request, serve
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer

ROWS_A_STEP = 16


def prepare(settings: Request) -> tuple[Measure, Reply]:
    torch.set_num_threads(settings["threads"])
    tokenizer = AutoTokenizer.from_pretrained(settings["model"])
    rows = [_as_conversation(json.loads(line)) for line in Path(settings["rows"]).read_text().splitlines()]

    def useful_tokens(limit: int) -> int:
        whole = (
            tokenizer.apply_chat_template(row["prompt"] + row["completion"], tokenize=False) for row in rows[:limit]
        )
        return sum(
            min(settings["max_length"], len(tokenizer(text, add_special_tokens=False)["input_ids"])) for text in whole
        )

    def measure(request: Request) -> Reply:
        gc.collect()
        trainer = _trainer(settings, request, tokenizer, rows[: request["limit"]])
        started = time.perf_counter()
        result = trainer.train()
        trainer.save_model(settings["output_dir"])
        seconds = time.perf_counter() - started
        saved = (Path(settings["output_dir"]) / "adapter_model.safetensors").stat().st_size
        shutil.rmtree(settings["output_dir"])
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        return {
            "seconds": seconds,
            "units": useful_tokens(request["limit"]),
            "steps": result.global_step,
            "first_loss": losses[0],
            "loss": losses[-1],
            "sound": saved > 0 and math.isfinite(losses[-1]),
        }

    return measure, {"useful_tokens": useful_tokens(settings["count_rows"])}


def _as_conversation(row: dict[str, str]) -> dict[str, list[dict[str, str]]]:
    """Prompt and completion, so that TRL learns the answers alone, as halfbyte does."""
    asked = f"{row['instruction']}\n\n{row['input']}" if row.get("input") else row["instruction"]
    return {
        "prompt": [{"role": "user", "content": asked}],
        "completion": [{"role": "assistant", "content": row["output"]}],
    }


def _trainer(settings: Request, request: Request, tokenizer: Any, rows: list[dict[str, Any]]) -> SFTTrainer:
    checkpointing, micro_batch = request["checkpointing"], request["micro_batch"]
    model = prepare_model_for_kbit_training(
        from_pretrained(settings["model"], quantize=True), use_gradient_checkpointing=checkpointing
    )
    model.config.use_cache = False
    arguments = SFTConfig(
        output_dir=settings["output_dir"],
        num_train_epochs=1,
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=ROWS_A_STEP // micro_batch,
        gradient_checkpointing=checkpointing,
        packing=request["packing"],
        train_sampling_strategy="group_by_length" if request["group_by_length"] else "random",
        max_length=settings["max_length"],
        optim="adamw_torch_fused",
        learning_rate=2e-4,
        lr_scheduler_type="linear",
        warmup_steps=1,
        max_grad_norm=0.3,
        bf16=request["autocast"],
        use_cpu=True,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=42,
    )
    lora = LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, lora_dropout=0.05, target_modules="all-linear")
    return SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=lora,
    )


if __name__ == "__main__":
    serve(prepare)
