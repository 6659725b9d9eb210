"""The short QLoRA listing, on halfbyte: rank 16 on queries and values, and the trainer puts the adapter on.

    python examples/short_sft.py --model meta-llama/Llama-3.2-1B --dataset rows.jsonl --output_dir runs/short

Each row is `{"text": "..."}`.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import halfbyte as hb


def main(model_name: str, dataset: Path, output_dir: Path, **changes: Any) -> None:
    """Train, and write the adapter and the tokenizer into `output_dir`; `changes` are SFTConfig's."""
    model = AutoModelForCausalLM.from_pretrained(
        model_name, quantization_config=hb.QuantizationConfig(quant_type="nf4"), dtype=torch.bfloat16
    )
    tokenizer = AutoTokenizer.from_pretrained(model_name)
    settings = {
        "output_dir": str(output_dir),
        "max_length": 512,
        "report_to": "none",
        "use_cpu": not torch.cuda.is_available(),  # or the trainer refuses bf16, which is its default
    }
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(**settings | changes),
        train_dataset=Dataset.from_list([json.loads(line) for line in dataset.read_text().splitlines()]),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
        optimizer_cls_and_kwargs=(hb.optim.AdamW, {"lr": 2e-4}),
    )
    trainer.train()
    trainer.save_model(str(output_dir))
    tokenizer.save_pretrained(output_dir)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a directory or hub id, in 16 bits")
    parser.add_argument("--dataset", type=Path, required=True, help="JSON lines of text")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--max_steps", type=int, default=-1, help="steps to take; by default three epochs")
    arguments = parser.parse_args()
    main(arguments.model, arguments.dataset, arguments.output_dir, max_steps=arguments.max_steps)
