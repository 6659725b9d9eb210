"""What halfbyte writes as GGUF beside the merged model in transformers: the same greedy tokens from llama.cpp?

    make check-gguf                                       with an adapter that is trained for it, a minute
    python -m benchmarks.llama_cpp --adapter runs/requests --model models/SmolLM2-135M-Instruct-nf4

The model with the adapter merged goes out twice: as a directory in 16 bits, which transformers runs in float32, and as
GGUF, which llama.cpp runs as it does: from the same 16-bit numbers, in float16 with float32 sums. Prompts are ten: rows
of examples/requests that were held out, which the adapter answers, and questions that it was not trained on, which make
for longer answers. Tokens are compared from the first to the end of the answer.

Of a file in other numbers (Q8_0, Q4_0) two figures are told: tokens in common before the two ways part, and agreement
at each place of transformers' own answer, which is what counts as the same token. The adapter as GGUF's LoRA on the
base's own file is compared with the same answers. The exit code is 1 where F16 differs in a token or Q8_0 agrees on
fewer than 95 %.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import halfbyte
from halfbyte.config import FinetuneConfig, load_config
from halfbyte.data import render_chat
from halfbyte.recipes.finetune import finetune

ROOT = Path(__file__).parent.parent
LLAMA = ROOT / ".llama" / "bin" / "python"
WORKER = Path(__file__).parent / "workers" / "llama_cpp_greedy.py"
HELD_OUT = ROOT / "examples" / "requests" / "heldout.jsonl"
QUESTIONS = [
    "What is the capital of France, and what is it known for?",
    "Explain why the sky is blue.",
    "Write three sentences about a dog that lost its ball.",
    "How do I boil an egg?",
    "List the months of the year 2026 that have 31 days.",
]
REQUESTS = 5
LEAST_AGREEMENT = 0.95


def llama_cpp(model: Path, prompts: list[list[int]], python: Path = LLAMA, **task: Any) -> list[list[int]]:
    """What the worker says of a file."""
    given = json.dumps({"model": str(model), "prompts": prompts, **task})
    done = subprocess.run([python, WORKER], input=given, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"llama.cpp could not run {model}: {done.stderr[-500:]}")
    answers: list[list[int]] = json.loads(done.stdout)
    return answers


def agreement(expected: list[list[int]], found: list[list[int]]) -> float:
    """The share of places with the same token."""
    pairs = [(a, b) for ours, theirs in zip(expected, found, strict=True) for a, b in zip(ours, theirs, strict=True)]
    return sum(a == b for a, b in pairs) / len(pairs)


def in_common(expected: list[list[int]], found: list[list[int]]) -> int:
    """Tokens before two answers part, all prompts together."""
    total = 0
    for ours, theirs in zip(expected, found, strict=True):
        for a, b in zip(ours, theirs, strict=False):
            if a != b:
                break
            total += 1
    return total


def train(model: str, directory: Path, steps: int, console: Console) -> Path:
    changes = {"model_name_or_path": model, "output_dir": str(directory), "max_steps": steps, "eval_dataset": None}
    keys = load_config(FinetuneConfig, ROOT / "examples" / "requests.yaml", {}).to_dict() | changes
    finetune(load_config(FinetuneConfig, None, keys | {"num_train_epochs": 1.0}), console)
    return directory


def conversations() -> list[list[dict[str, str]]]:
    rows = [json.loads(line) for line in HELD_OUT.read_text().splitlines()[:REQUESTS]]
    return [row["messages"][:-1] for row in rows] + [[{"role": "user", "content": text}] for text in QUESTIONS]


def greedy(model: PreTrainedModel, prompt: list[int], new_tokens: int, end: int) -> list[int]:
    """The answer in plain transformers, its end included."""
    ids = torch.tensor([prompt])
    keys = {"do_sample": False, "max_new_tokens": new_tokens, "eos_token_id": end, "pad_token_id": end}
    output = model.generate(ids, attention_mask=torch.ones_like(ids), **keys)
    answer: list[int] = output[0, len(prompt) :].tolist()
    return answer


def measure(model: str, adapter: Path, work: Path, python: Path, new_tokens: int) -> list[dict[str, Any]]:
    """A row a file: what llama.cpp answers from it beside transformers."""
    silent = Console(quiet=True)
    halfbyte.merge(model, str(adapter), str(work / "merged"), dtype="float16", console=silent)
    reference = AutoModelForCausalLM.from_pretrained(work / "merged", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(work / "merged")
    texts = [render_chat(tokenizer, messages, "a prompt", add_generation_prompt=True) for messages in conversations()]
    prompts = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    expected = [greedy(reference, prompt, new_tokens, tokenizer.eos_token_id) for prompt in prompts]
    del reference
    rows = []
    for dtype in ("float16", "bfloat16", "q8_0", "q4_0"):
        file = work / f"{dtype}.gguf"
        result = halfbyte.merge(model, str(adapter), str(file), format="gguf", dtype=dtype, console=silent)
        if dtype == "float16":
            said = llama_cpp(file, [], python, texts=texts)
            assert said == prompts, "llama.cpp reads other tokens from the prompts"
        rows.append(_compare(dtype, file, result.bytes, prompts, expected, new_tokens, python))
    base, lora = work / "base.gguf", work / "lora.gguf"
    halfbyte.merge(model, None, str(base), format="gguf", dtype="float16", base="quantized", console=silent)
    size = halfbyte.merge(model, str(adapter), str(lora), format="gguf", adapter_only=True, console=silent).bytes
    rows.append(_compare("LoRA on float16", base, size, prompts, expected, new_tokens, python, lora=str(lora)))
    return rows


def _compare(
    name: str,
    file: Path,
    size: int,
    prompts: list[list[int]],
    expected: list[list[int]],
    new_tokens: int,
    python: Path,
    lora: str | None = None,
) -> dict[str, Any]:
    ends = sorted({answer[-1] for answer in expected if len(answer) < new_tokens})
    own = llama_cpp(file, prompts, python, lora=lora, new_tokens=new_tokens, ends=ends)
    forced = llama_cpp(file, prompts, python, lora=lora, forced=expected)
    return {
        "name": name,
        "bytes": size,
        "same_answers": sum(a == b for a, b in zip(expected, own, strict=True)),
        "answers": len(expected),
        "in_common": in_common(expected, own),
        "tokens": sum(map(len, expected)),
        "agreement": agreement(expected, forced),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="models/SmolLM2-135M-Instruct.Q4_1.gguf")
    parser.add_argument("--adapter", type=Path, help="by default one is trained, on examples/requests")
    parser.add_argument("--steps", type=int, default=20, help="of that training")
    parser.add_argument("--new_tokens", type=int, default=64)
    parser.add_argument("--python", type=Path, default=LLAMA, help="of an environment with llama-cpp-python")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if not arguments.python.exists():
        sys.exit(f"error: there is no {arguments.python}; make .llama builds it")
    console = Console(highlight=False)
    (ROOT / "build").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=ROOT / "build") as work:
        adapter = arguments.adapter or train(arguments.model, Path(work) / "run", arguments.steps, Console(stderr=True))
        rows = measure(arguments.model, adapter, Path(work), arguments.python, arguments.new_tokens)
    if arguments.json:
        print(json.dumps(rows, indent=2))
    else:
        show(rows, console)
    by_name = {row["name"]: row for row in rows}
    exact = all(by_name[name]["same_answers"] == by_name[name]["answers"] for name in ("float16", "LoRA on float16"))
    if not exact or by_name["q8_0"]["agreement"] < LEAST_AGREEMENT:
        sys.exit(1)


def show(rows: list[dict[str, Any]], console: Console) -> None:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    table.add_column("llama.cpp, from")
    for heading in ("MiB", "same answers", "tokens before they part", "same token at each place"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            row["name"],
            f"{row['bytes'] / 2**20:,.1f}",
            f"{row['same_answers']} of {row['answers']}",
            f"{row['in_common']} of {row['tokens']}",
            f"{row['agreement']:.2%}",
        )
    console.print(table)


if __name__ == "__main__":
    main()
