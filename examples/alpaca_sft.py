"""The QLoRA listing that tutorials repeat, on halfbyte: a 4-bit base, LoRA on attention, Alpaca rows, TRL's SFTTrainer.

    python examples/alpaca_sft.py --model mistralai/Mistral-7B-v0.1 --dataset alpaca_data.json --output_dir runs/alpaca

Against the usual listing it has one import more, `halfbyte.QuantizationConfig` where that has BitsAndBytesConfig, and
the paged optimizer as a class instead of `optim="paged_adamw_32bit"`, which names bitsandbytes' own.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import halfbyte as hb

PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
PROMPT_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)


def format_row(row: dict[str, str]) -> dict[str, str]:
    """Alpaca's prompt and its answer; the trainer learns the answer alone, and adds the end of text to it."""
    prompt = PROMPT_WITH_INPUT if row.get("input") else PROMPT
    return {"prompt": prompt.format(**row), "completion": row["output"]}


def main(model_name: str, dataset: Path, output_dir: Path, **changes: Any) -> None:
    """Train, and write the adapter and the tokenizer into `output_dir`; `changes` are SFTConfig's."""
    quantization = hb.QuantizationConfig(quant_type="nf4", double_quant=True, compute_dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(
        model_name, quantization_config=quantization, dtype=torch.bfloat16, device_map="auto"
    )
    model.config.use_cache = False
    tokenizer = AutoTokenizer.from_pretrained(model_name)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # TRL masks padding by its place, so the end is learned all the same

    model = prepare_model_for_kbit_training(model)
    lora = LoraConfig(
        r=64,
        lora_alpha=16,
        lora_dropout=0.1,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        bias="none",
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(model, lora)
    model.print_trainable_parameters()

    output_dir.mkdir(parents=True, exist_ok=True)
    settings = {
        "output_dir": str(output_dir),
        "num_train_epochs": 1,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 4,
        "gradient_checkpointing": True,
        "learning_rate": 2e-4,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.03,  # below one, a share of the steps: the listings' warmup_ratio
        "max_grad_norm": 0.3,
        "weight_decay": 0.001,
        "bf16": True,
        "use_cpu": not torch.cuda.is_available(),  # or the trainer refuses bf16
        "logging_steps": 10,
        "save_steps": 100,
        "max_length": 512,
        "report_to": "none",
    }
    rows = Dataset.from_list(json.loads(dataset.read_text()))
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(**settings | changes),
        train_dataset=rows.map(format_row, remove_columns=rows.column_names),
        processing_class=tokenizer,
        optimizer_cls_and_kwargs=(hb.optim.AdamW, {"lr": 2e-4, "paged": True, "page_dir": output_dir}),
    )
    trainer.train()
    trainer.model.save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a directory or hub id, in 16 bits")
    parser.add_argument("--dataset", type=Path, required=True, help="a JSON list of instruction, input and output")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--max_steps", type=int, default=-1, help="steps to take; by default one epoch")
    arguments = parser.parse_args()
    main(arguments.model, arguments.dataset, arguments.output_dir, max_steps=arguments.max_steps)
