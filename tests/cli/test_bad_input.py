"""Whatever is wrong with what a person hands over is told in one sentence, with exit code 2 and no traceback.

Every case runs the command line in a process of its own, forked from one that has done the imports (forks.py);
two tests at the end start a process from nothing.
"""

import gzip
import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from models import CHATML, build_tokenizer, save_model

ROW = {"messages": [{"role": "user", "content": "Good morning"}, {"role": "assistant", "content": "Good day"}]}
FINETUNE = "finetune --model_name_or_path model --dataset rows.jsonl --output_dir out --max_steps 1 --report_to none"
EVALUATE = "evaluate --model_name_or_path model --dataset rows.jsonl --max_new_tokens 2"
GENERATE = "generate --model_name_or_path model --prompt Hello --max_new_tokens 2"
PLAN = "plan --model_name_or_path model --no_time"
MERGE = "merge model --adapter adapter --output out"
GGUF = "merge model --adapter adapter --output out.gguf --format gguf"
CHAT = "chat model --max_new_tokens 2"
QUANTIZE = "quantize --model_name_or_path model --output_dir out"


@pytest.fixture(scope="session")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in shards and four rows: a directory in which everything is right."""
    folder = tmp_path_factory.mktemp("good")
    save_model(folder / "model", max_shard_size="20KB")
    (folder / "rows.jsonl").write_text("".join(json.dumps(ROW) + "\n" for _ in range(4)))
    return folder


@pytest.fixture
def work(good: Path, tmp_path: Path) -> Path:
    """A copy of it that a case may break."""
    shutil.copytree(good, tmp_path, dirs_exist_ok=True)
    return tmp_path


Run = Callable[[Path, str], tuple[int, str, str]]


@pytest.fixture(scope="session")
def run() -> Iterator[Run]:
    """Runs a command line in a folder; gives exit code, standard output and standard error."""
    command = [sys.executable, str(Path(__file__).with_name("forks.py"))]
    offline = os.environ | {"HF_HUB_OFFLINE": "1"}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=offline) as forks:

        def run(folder: Path, command: str) -> tuple[int, str, str]:
            assert forks.stdin is not None and forks.stdout is not None  # noqa: PT018
            forks.stdin.write(json.dumps([str(folder), command.split()]) + "\n")
            forks.stdin.flush()
            code = int(forks.stdout.readline())
            return code, (folder / ".stdout").read_text(), (folder / ".stderr").read_text()

        yield run


def refused(run: Run, folder: Path, command: str) -> str:
    """The sentence with which a command refuses."""
    code, shown, complaint = run(folder, command)
    assert "Traceback" not in complaint, complaint
    assert code == 2, (code, shown, complaint)
    assert complaint.startswith("error: "), complaint
    assert complaint.count("\n") == 1, complaint
    return complaint


# ── Ways to break the model's directory ─────────────────────────────────────────────────────────────────────


Break = Callable[[Path], object]


def write(name: str, content: str | bytes) -> Break:
    def change(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)

    return change


def remove(pattern: str) -> Break:
    return lambda folder: [path.unlink() for path in sorted(folder.glob(pattern))]


def truncate(pattern: str, keep: float) -> Break:
    def change(folder: Path) -> None:
        path = sorted(folder.glob(pattern))[0]
        path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])

    return change


def configure(**settings: Any) -> Break:
    def change(folder: Path) -> None:
        path = folder / "model" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | settings))

    return change


def replace_weights(change_tensors: Callable[[dict[str, torch.Tensor]], Any]) -> Break:
    def change(folder: Path) -> None:
        shards = sorted((folder / "model").glob("*.safetensors"))
        tensors = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
        for path in (*shards, folder / "model" / "model.safetensors.index.json"):
            path.unlink()
        change_tensors(tensors)
        save_file(tensors, folder / "model" / "model.safetensors", {"format": "pt"})

    return change


def spoil(value: float) -> Callable[[dict[str, torch.Tensor]], Any]:
    return lambda tensors: tensors["model.layers.1.mlp.up_proj.weight"].view(-1)[17].fill_(value)


def only_pickle(folder: Path) -> None:
    remove("model/*.safetensors*")(folder)
    (folder / "model" / "pytorch_model.bin").write_bytes(b"not read")


def lying_header(folder: Path) -> None:
    path = sorted(folder.glob("model/*.safetensors"))[0]
    path.write_bytes(struct.pack("<Q", 2**60) + path.read_bytes()[8:])


def rename_model(name: str) -> Break:
    return lambda folder: (folder / "model").rename(folder / name)


def adapter(**settings: Any) -> Break:
    """A LoRA adapter of width 32 for one layer, with `settings` put over its configuration."""
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}

    def change(folder: Path) -> None:
        width = settings.get("width", 32)
        (folder / "adapter").mkdir()
        text = json.dumps(config | {key: value for key, value in settings.items() if key != "width"})
        (folder / "adapter" / "adapter_config.json").write_text(text)
        tensors = {}
        for layer in (0, 1):
            prefix = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
            tensors[f"{prefix}.lora_A.weight"] = torch.zeros(2, width)
            tensors[f"{prefix}.lora_B.weight"] = torch.zeros(32, 2)
        save_file(tensors, folder / "adapter" / "adapter_model.safetensors")

    return change


def both(*changes: Break) -> Break:
    return lambda folder: [change(folder) for change in changes]


def nothing(folder: Path) -> None:
    pass


RUN_FILE = json.dumps({"versions": {"halfbyte": "0.1.0"}})
BAD_ROWS = "rows.jsonl"


def rename_tensor(before: str, after: str | None, shape: tuple[int, ...] | None = None) -> Break:
    """Another name, or none, or another shape for a tensor of the adapter."""

    def change(folder: Path) -> None:
        file = folder / "adapter" / "adapter_model.safetensors"
        tensors = load_file(file)
        tensor = tensors.pop(f"base_model.model.model.layers.1.self_attn.{before}.weight")
        if after is not None:
            name = f"base_model.model.model.layers.1.self_attn.{after}.weight"
            tensors[name] = tensor if shape is None else torch.zeros(shape)
        save_file(tensors, file)

    return change


def other_tokenizer(folder: Path) -> None:
    tokenizer = build_tokenizer()
    tokenizer.add_tokens(["<one more>"])
    tokenizer.save_pretrained(folder / "adapter")


# what is broken, the command, and the words that the sentence must have: the file or key, and what is wrong with it
CASES: dict[str, tuple[Break, str, list[str]]] = {
    # The model
    "no such directory": (nothing, FINETUNE + " --model_name_or_path /no/such/model", ["/no/such/model"]),
    "no such relative path": (nothing, FINETUNE + " --model_name_or_path mdoel", ["mdoel"]),
    "no such gguf": (nothing, FINETUNE + " --model_name_or_path a/b.gguf", ["a/b.gguf"]),
    "no such hub id": (nothing, FINETUNE + " --model_name_or_path nobody/nothing", ["nobody/nothing"]),
    "a hub id of wrong form": (nothing, FINETUNE + " --model_name_or_path no--body/x..y", ["no--body/x..y"]),
    "a file that is no model": (nothing, FINETUNE + " --model_name_or_path rows.jsonl", ["rows.jsonl", ".gguf"]),
    "not a gguf": (write("x.gguf", b"GGUF" + b"\0" * 40), FINETUNE + " --model_name_or_path x.gguf", ["x.gguf"]),
    "a gguf of zero bytes": (write("x.gguf", b""), FINETUNE + " --model_name_or_path x.gguf", ["x.gguf"]),
    "text named gguf": (write("x.gguf", "hello\n" * 99), FINETUNE + " --model_name_or_path x.gguf", ["x.gguf"]),
    "no config": (remove("model/config.json"), FINETUNE, ["model", "config.json"]),
    "config is no JSON": (write("model/config.json", "{"), FINETUNE, ["config.json"]),
    "config is a list": (write("model/config.json", "[]"), FINETUNE, ["config.json"]),
    "config is empty": (write("model/config.json", ""), FINETUNE, ["config.json"]),
    "config without a type": (write("model/config.json", "{}"), FINETUNE, ["config.json", "model_type"]),
    "unknown architecture": (configure(model_type="llamaa"), FINETUNE, ["config.json", "llamaa"]),
    "not a language model": (configure(model_type="vit"), FINETUNE, ["config.json", "vit", "causal language model"]),
    "config of wrong size": (configure(hidden_size=64, head_dim=16), FINETUNE, ["model", "config.json"]),
    "config with more layers": (configure(num_hidden_layers=3), FINETUNE, ["model", "layers.2."]),
    "config with a text for a number": (configure(hidden_size="x"), FINETUNE, ["config.json", "hidden_size"]),
    "a missing shard": (remove("model/model-00002-*"), FINETUNE, ["model-00002-of-", "missing"]),
    "an index that is no JSON": (write("model/model.safetensors.index.json", "{"), FINETUNE, ["index.json"]),
    "an index without a map": (write("model/model.safetensors.index.json", "{}"), FINETUNE, ["index.json"]),
    "a truncated shard": (truncate("model/*.safetensors", 0.6), FINETUNE, ["model-00001-of-", "safetensors"]),
    "a shard of zero bytes": (truncate("model/*.safetensors", 0.0), FINETUNE, ["model-00001-of-", "safetensors"]),
    "a header that lies": (lying_header, FINETUNE, ["model-00001-of-", "safetensors"]),
    "no weights": (remove("model/*.safetensors*"), FINETUNE, ["model", "model.safetensors"]),
    "weights as pickle only": (only_pickle, FINETUNE, ["model", "pickle"]),
    "a tensor is missing": (
        replace_weights(lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight")),
        FINETUNE,
        ["model", "model.layers.1.mlp.up_proj.weight"],
    ),
    "a tensor of another shape": (
        replace_weights(lambda t: t.update({"model.layers.1.mlp.up_proj.weight": torch.zeros(8, 8)})),
        FINETUNE,
        ["model", "model.layers.1.mlp.up_proj.weight"],
    ),
    "a weight that is NaN": (
        replace_weights(spoil(float("nan"))),
        FINETUNE,
        ["model", "model.layers.1.mlp.up_proj.weight", "NaN"],
    ),
    "a weight that is infinite": (
        replace_weights(spoil(float("inf"))),
        FINETUNE,
        ["model", "model.layers.1.mlp.up_proj.weight"],
    ),
    "no tokenizer": (remove("model/*token*"), FINETUNE, ["model", "tokenizer"]),
    "a tokenizer that is no JSON": (write("model/tokenizer.json", "{"), FINETUNE, ["model", "tokenizer"]),
    "a chat template with an error": (
        write("model/chat_template.jinja", "{% for m in messages %}{{ m.role }"),
        FINETUNE,
        ["rows.jsonl:1", "template"],
    ),
    # The data
    "no such data": (nothing, FINETUNE + " --dataset absent.jsonl", ["absent.jsonl", "no such file"]),
    "data of another kind": (write("rows.doc", "x"), FINETUNE + " --dataset rows.doc", ["rows.doc", ".jsonl"]),
    "a directory without data": (write("folder/x.py", ""), FINETUNE + " --dataset folder", ["folder", "no data file"]),
    "a split that is not there": (nothing, FINETUNE + " --dataset_split test", ["rows.jsonl", "test"]),
    "a split that is none": (nothing, FINETUNE + " --dataset_split train[:x]", ["train[:x]"]),
    "a slice without a row": (
        nothing,
        FINETUNE + " --dataset_split train[900:]",
        ["rows.jsonl train[900:]", "no rows"],
    ),
    "columns that are not there": (nothing, FINETUNE + " --columns messages=chat", ["rows.jsonl:1", "chat", "columns"]),
    "a table with a short row": (
        write("rows.csv", "instruction,output\na,b\nc\n"),
        FINETUNE + " --dataset rows.csv",
        ["rows.csv:3", "1 cells"],
    ),
    "a compressed file that is cut off": (
        write("rows.jsonl.gz", gzip.compress(json.dumps(ROW).encode())[:-4]),
        FINETUNE + " --dataset rows.jsonl.gz",
        ["rows.jsonl.gz:1", "decompressed"],
    ),
    "a Parquet file that is none": (
        write("rows.parquet", "PAR1"),
        FINETUNE + " --dataset rows.parquet",
        ["rows.parquet", "Parquet"],
    ),
    "data in a directory": (nothing, FINETUNE + " --dataset model", ["model"]),
    "an empty file": (write(BAD_ROWS, ""), FINETUNE, ["rows.jsonl", "empty"]),
    "blank lines only": (write(BAD_ROWS, "\n\n\n"), FINETUNE, ["rows.jsonl", "empty"]),
    "an empty list": (write("rows.json", "[]"), FINETUNE + " --dataset rows.json", ["rows.json"]),
    "a malformed line": (
        write(BAD_ROWS, json.dumps(ROW) + "\n" + json.dumps(ROW)[:-2] + "\n"),
        FINETUNE,
        ["rows.jsonl:2"],
    ),
    "a line that is no object": (write(BAD_ROWS, json.dumps(ROW) + "\n[1]\n"), FINETUNE, ["rows.jsonl:2"]),
    "a row without an answer": (
        write(BAD_ROWS, json.dumps({"messages": ROW["messages"][:1]})),
        FINETUNE,
        ["rows.jsonl:1", "assistant"],
    ),
    "a row of unknown keys": (write(BAD_ROWS, '{"words": "Hello"}'), FINETUNE, ["rows.jsonl:1", "messages"]),
    "a row of the other format": (nothing, FINETUNE + " --dataset_format alpaca", ["rows.jsonl:1", "instruction"]),
    "not UTF-8": (
        write(BAD_ROWS, json.dumps(ROW).encode() + b"\n" + b'{"messages": "\xff"}'),
        FINETUNE,
        ["rows.jsonl:2", "UTF-8"],
    ),
    "malformed held-out rows": (
        write("heldout.jsonl", "\n{}\n"),
        FINETUNE + " --eval_dataset heldout.jsonl",
        ["heldout.jsonl:2"],
    ),
    # What is asked for
    "a module that is not there": (nothing, FINETUNE + " --target_modules q_prj", ["q_prj"]),
    "a pattern that matches nothing": (nothing, FINETUNE + " --target_modules .*zzz", ["zzz"]),
    "a pattern that is none": (nothing, FINETUNE + " --target_modules (((", ["((("]),
    "a tracker that is not installed": (nothing, FINETUNE + " --report_to mlflow", ["report_to", "mlflow"]),
    "output_dir is a file": (write("out", ""), FINETUNE, ["output_dir", "out"]),
    "output_dir is below a file": (write("out", ""), FINETUNE + " --output_dir out/run", ["output_dir", "out/run"]),
    "output_dir cannot be written": (nothing, FINETUNE + " --output_dir /proc/run", ["output_dir", "/proc/run"]),
    "output_dir holds something else": (write("out/thesis.tex", "!"), FINETUNE, ["output_dir", "out"]),
    "output_dir is not emptied on request": (
        write("out/thesis.tex", "!"),
        FINETUNE + " --overwrite_output_dir",
        ["output_dir", "out"],
    ),
    "output_dir holds a run": (write("out/run.json", RUN_FILE), FINETUNE, ["output_dir", "--overwrite_output_dir"]),
    "nothing to resume": (nothing, FINETUNE + " --resume_from_checkpoint", ["out", "resume"]),
    "no checkpoint to resume": (
        write("out/run.json", RUN_FILE),
        FINETUNE + " --resume_from_checkpoint",
        ["out", "checkpoint"],
    ),
    "no such checkpoint": (
        write("out/run.json", RUN_FILE),
        FINETUNE + " --resume_from_checkpoint out/checkpoint-9",
        ["out/checkpoint-9"],
    ),
    "an empty checkpoint": (
        both(write("out/run.json", RUN_FILE), write("out/checkpoint-9/x", "")),
        FINETUNE + " --resume_from_checkpoint out/checkpoint-9",
        ["out/checkpoint-9"],
    ),
    # The other commands
    "evaluate: no such adapter": (nothing, EVALUATE + " --adapter absent", ["absent"]),
    "evaluate: a directory that is no adapter": (nothing, EVALUATE + " --adapter model", ["model"]),
    "evaluate: another model's adapter": (adapter(width=16), EVALUATE + " --adapter adapter", ["adapter"]),
    "evaluate: an adapter that is no JSON": (
        both(adapter(), write("adapter/adapter_config.json", "{")),
        EVALUATE + " --adapter adapter",
        ["adapter_config.json"],
    ),
    "evaluate: an adapter of unknown type": (
        adapter(peft_type="LORAA"),
        EVALUATE + " --adapter adapter",
        ["adapter", "LORAA"],
    ),
    "evaluate: a truncated adapter": (
        both(adapter(), truncate("adapter/*.safetensors", 0.5)),
        EVALUATE + " --adapter adapter",
        ["adapter"],
    ),
    "evaluate: an adapter without weights": (
        both(adapter(), remove("adapter/*.safetensors")),
        EVALUATE + " --adapter adapter",
        ["adapter"],
    ),
    "evaluate: an adapter for modules that are not there": (
        adapter(target_modules=["zzz"]),
        EVALUATE + " --adapter adapter",
        ["adapter", "zzz"],
    ),
    "finetune: a page directory that is not there": (
        nothing,
        FINETUNE + " --optim paged_adamw_8bit --page_dir pages",
        ["page_dir", "pages"],
    ),
    "finetune: a page directory that cannot be written": (
        nothing,
        FINETUNE + " --optim paged_adamw_8bit --page_dir /proc",
        ["page_dir", "/proc"],
    ),
    "finetune: a page directory for what is not paged": (
        nothing,
        FINETUNE + " --page_dir model",
        ["page_dir", "paged_adamw_32bit"],
    ),
    "finetune: more than the memory there is": (
        nothing,
        FINETUNE + " --max_memory 50MB",
        ["max_memory is 50MB", "it fits with a max_memory of", "over_budget"],
    ),
    "plan: no such model": (rename_model("m"), PLAN, ["model"]),
    "plan: config is no JSON": (write("model/config.json", "{"), PLAN, ["config.json"]),
    "plan: adapters for modules that are not there": (
        nothing,
        PLAN + " --target_modules zzz",
        ["target_modules", "zzz"],
    ),
    "plan: a key of the wrong kind": (nothing, PLAN + " --max_memory lots", ["max_memory", "8GB"]),
    "evaluate: output cannot be written": (nothing, EVALUATE + " --output /proc/x.json", ["/proc/x.json"]),
    "evaluate: a malformed line": (write(BAD_ROWS, "{"), EVALUATE, ["rows.jsonl:1"]),
    "generate: no such model": (rename_model("m"), GENERATE, ["model"]),
    "generate: no such adapter": (nothing, GENERATE + " --adapter absent", ["absent"]),
    "merge: a name of a GGUF that is none": (adapter(), MERGE + " --output out.gguf", ["out.gguf", "--format gguf"]),
    "merge: a GGUF without its name": (adapter(), MERGE + " --format gguf", ["out", ".gguf"]),
    "merge: a kind of GGUF's": (adapter(), MERGE + " --dtype q8_0", ["q8_0", "--format gguf"]),
    "merge: a GGUF in nf4": (adapter(), GGUF + " --dtype nf4", ["nf4", "q8_0"]),
    "merge: no adapter": (nothing, "merge model --output out", ["adapter", "--adapter"]),
    "merge: an adapter alone as safetensors": (adapter(), MERGE + " --adapter_only", ["adapter_only", "--format gguf"]),
    "merge: an audit of a GGUF with nothing merged": (
        nothing,
        "merge model --output out.gguf --format gguf --audit",
        ["audit", "nothing is merged"],
    ),
    "merge: a GGUF that exists": (both(adapter(), write("out.gguf", "!")), GGUF, ["output", "out.gguf", "exists"]),
    "merge: a Modelfile that exists": (
        both(adapter(), write("out.Modelfile", "!")),
        GGUF,
        ["output", "out.Modelfile", "exists"],
    ),
    "merge: a GGUF onto another model's adapter": (adapter(width=16), GGUF, ["adapter", "model", "lora_A", "16", "32"]),
    "merge: a GGUF that cannot be written": (adapter(), GGUF + " --output /proc/x.gguf", ["output", "/proc/x.gguf"]),
    "merge: a type that GGUF is not written of": (
        configure(model_type="granite"),
        "merge model --output out.gguf --format gguf",
        ["model", "granite"],
    ),
    "chat: no such model": (rename_model("m"), CHAT, ["model"]),
    "chat: no such adapter": (nothing, CHAT + " --adapter absent", ["absent"]),
    "chat: another model's adapter": (adapter(width=16), CHAT + " --adapter adapter", ["adapter", "lora_A"]),
    "chat: one adapter twice": (adapter(), CHAT + " --adapter adapter,adapter", ["adapter", "twice"]),
    "chat: nothing to compare": (nothing, CHAT + " --compare", ["compare", "--adapter"]),
    "chat: no template": (remove("model/chat_template.jinja"), CHAT, ["model", "chat_template"]),
    "merge: no such adapter": (nothing, MERGE, ["adapter", "adapter_config.json"]),
    "merge: no such model": (both(adapter(), rename_model("m")), MERGE, ["model"]),
    "merge: onto nothing": (adapter(), "merge --adapter adapter --output out", ["model_name_or_path"]),
    "merge: an output that exists": (both(adapter(), write("out/thesis.tex", "!")), MERGE, ["output", "out", "exists"]),
    "merge: an output that is a file": (both(adapter(), write("out", "!")), MERGE, ["output", "out", "exists"]),
    "merge: cannot be written": (adapter(), MERGE + " --output /proc/x", ["output", "/proc/x"]),
    "merge: another model's adapter": (adapter(width=16), MERGE, ["adapter", "model", "lora_A", "16", "32"]),
    "merge: an adapter for modules that are not there": (adapter(target_modules=["zzz"]), MERGE, ["adapter", "zzz"]),
    "merge: an adapter of more layers": (
        both(adapter(), rename_tensor("q_proj.lora_B", "k_proj.lora_B")),
        MERGE,
        ["adapter", "layers.1.self_attn.q_proj.lora_B", "layers.1.self_attn.k_proj.lora_B"],
    ),
    "merge: an adapter that lacks a tensor": (
        both(adapter(), rename_tensor("q_proj.lora_B", None)),
        MERGE,
        ["adapter", "lacks", "layers.1.self_attn.q_proj.lora_B"],
    ),
    "merge: an adapter of another shape": (
        both(adapter(), rename_tensor("q_proj.lora_B", "q_proj.lora_B", (16, 2))),
        MERGE,
        ["adapter", "layers.1.self_attn.q_proj.lora_B", "(16, 2)", "(32, 2)"],
    ),
    "merge: an adapter that changed its base": (
        adapter(init_lora_weights="pissa"),
        MERGE,
        ["adapter", "init_lora_weights", "pissa"],
    ),
    "merge: a truncated adapter": (both(adapter(), truncate("adapter/*.safetensors", 0.5)), MERGE, ["adapter"]),
    "merge: a truncated shard": (
        both(adapter(), truncate("model/*.safetensors", 0.6)),
        MERGE,
        ["model-00001-of-", "safetensors"],
    ),
    "merge: a base that lacks a tensor": (
        both(adapter(), replace_weights(lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))),
        MERGE,
        ["model", "model.layers.1.mlp.up_proj.weight"],
    ),
    "merge: a base of another shape": (
        both(adapter(), replace_weights(lambda t: t.update({"model.norm.weight": torch.zeros(8)}))),
        MERGE,
        ["model", "model.norm.weight", "(8,)", "(32,)"],
    ),
    "merge: a base with a NaN": (
        both(adapter(), replace_weights(spoil(float("nan")))),
        MERGE,
        ["model", "model.layers.1.mlp.up_proj.weight", "NaN"],
    ),
    "merge: two adapters and three weights": (
        adapter(),
        MERGE + " --adapter adapter,adapter --weights 1,2,3",
        ["weights", "3", "2"],
    ),
    "merge: onto codes of a base in 16 bits": (
        adapter(),
        MERGE + " --base quantized --quant_type none",
        ["quant_type", "original"],
    ),
    "generate: another tokenizer": (
        both(adapter(), other_tokenizer),
        GENERATE + " --adapter adapter",
        ["adapter", "tokenizer", "model"],
    ),
    "evaluate: another tokenizer": (
        both(adapter(), other_tokenizer),
        EVALUATE + " --adapter adapter",
        ["adapter", "tokenizer", "model"],
    ),
    "merge: another tokenizer": (
        both(adapter(), other_tokenizer),
        MERGE,
        ["adapter", "tokenizer", "model"],
    ),
    "inspect: nothing there": (nothing, "inspect absent", ["absent"]),
    "inspect: a file of another kind": (nothing, "inspect rows.jsonl", ["rows.jsonl", ".safetensors"]),
    "inspect: a directory of another kind": (write("out/thesis.tex", "!"), "inspect out", ["out", "config.json"]),
    "inspect: a truncated shard": (
        truncate("model/*.safetensors", 0.6),
        "inspect model",
        ["model-00001-of-", "safetensors"],
    ),
    "inspect: a gguf that is none": (write("x.gguf", b"GGUF" + b"\0" * 40), "inspect x.gguf", ["x.gguf"]),
    "quantize: no such model": (rename_model("m"), QUANTIZE, ["model"]),
    "quantize: to no quantization": (nothing, QUANTIZE + " --quant_type none", ["quant_type", "none"]),
    "quantize: over something else": (write("out/thesis.tex", "!"), QUANTIZE, ["output_dir", "out"]),
    "quantize: cannot be written": (nothing, QUANTIZE + " --output_dir /proc/x", ["output_dir", "/proc/x"]),
}


@pytest.mark.parametrize("case", CASES)
def test_it_is_told_in_one_sentence(case: str, work: Path, run: Run) -> None:
    change, command, words = CASES[case]
    change(work)
    before = sorted(path for path in work.rglob("*"))
    sentence = refused(run, work, command)
    for word in words:
        assert word in sentence, sentence
    # Nothing is left behind, and nothing that was there is gone.
    written = {work / ".stdout", work / ".stderr"}
    assert [path for path in sorted(work.rglob("*")) if path not in written] == before


@pytest.mark.parametrize(
    "command",
    [
        FINETUNE,
        FINETUNE + " --dry_run",
        EVALUATE,
        EVALUATE + " --adapter adapter --output result.json",
        GENERATE,
        PLAN,
        QUANTIZE,
    ],
    ids=["finetune", "dry run", "evaluate", "evaluate with an adapter", "generate", "plan", "quantize"],
)
def test_what_is_not_broken_runs(command: str, work: Path, run: Run) -> None:
    """The table above would be worth nothing if its commands were refused for another reason."""
    adapter()(work)
    code, shown, complaint = run(work, command)
    assert (code, complaint) == (0, ""), (shown, complaint)


def test_a_process_of_its_own_says_the_same(work: Path, run: Run) -> None:
    remove("model/model-00002-*")(work)
    command = [sys.executable, "-m", "halfbyte.cli", *FINETUNE.split()]
    done = subprocess.run(command, cwd=work, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, refused(run, work, FINETUNE))


def test_a_forced_kernel_that_cannot_run(work: Path) -> None:
    command = [sys.executable, "-m", "halfbyte.cli", *FINETUNE.split()]
    forced = os.environ | {"HALFBYTE_IMPLEMENTATION": "abacus"}
    done = subprocess.run(command, cwd=work, capture_output=True, text=True, check=False, env=forced)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ")
    assert "HALFBYTE_IMPLEMENTATION=abacus" in done.stderr.splitlines()[-1]


def test_a_base_model_without_a_template_takes_no_chats(work: Path, run: Run) -> None:
    (work / "model" / "chat_template.jinja").unlink()
    assert CHATML not in (work / "model" / "tokenizer_config.json").read_text()
    build_tokenizer(chat_template=None).save_pretrained(work / "model")
    assert "rows.jsonl:1" in refused(run, work, FINETUNE)
