"""Run by the interpreter of another environment, which has TRL (test_trl_masks.py): what its trainer learns.

    python trl_peer.py FOLDER

Each sub-folder holds a tokenizer and a `job`, JSON: `conversations`, and `known`, a template that TRL comes with and
that the tokenizer is given (or null). `result` is left beside it:

    template   the tokenizer's
    patched    what TRL trains with in its place, or null
    rows       a conversation each: the `input_ids` and `labels` that SFTTrainer with assistant_only_loss has made
    refused    the sentence with which it refuses the template instead, or null
    masks      how many tokens transformers tells as the assistant's in each, by the template as it is
"""

import json
import sys
from pathlib import Path
from typing import Any

import trl
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer
from trl.chat_template_utils import get_training_chat_template

TEMPLATES = Path(trl.__file__).parent / "chat_templates"


def prepare(folder: Path, tokenizer: Any, conversations: list[Any]) -> list[dict[str, Any]]:
    size = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    trainer = SFTTrainer(
        LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **size)),
        SFTConfig(
            output_dir=str(folder / "out"),
            assistant_only_loss=True,
            max_length=None,
            report_to="none",
            use_cpu=True,
            bf16=False,
        ),
        train_dataset=Dataset.from_list([{"messages": messages} for messages in conversations]),
        processing_class=tokenizer,
    )
    return [{key: row[key] for key in ("input_ids", "labels")} for row in trainer.train_dataset]


def work(folder: Path, known: str | None, conversations: list[Any]) -> dict[str, Any]:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    if known is not None:
        tokenizer.chat_template = (TEMPLATES / f"{known}.jinja").read_text(encoding="utf-8")
    result: dict[str, Any] = {"template": tokenizer.chat_template, "patched": None, "rows": [], "refused": None}
    told = [
        tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        for messages in conversations
    ]
    result["masks"] = [sum(one["assistant_masks"]) for one in told]
    try:
        result["patched"] = get_training_chat_template(tokenizer)
        result["rows"] = prepare(folder, tokenizer, conversations)
    except ValueError as error:
        result["refused"] = str(error)
    return result


for path in sorted(Path(sys.argv[1]).glob("*/job")):
    (path.parent / "result").write_text(json.dumps(work(path.parent, **json.loads(path.read_text()))))
