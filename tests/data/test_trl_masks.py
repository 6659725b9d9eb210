"""Our mask against TRL's `assistant_only_loss`, live, in the environment that `make` builds for peers (.peers).

TRL needs `{% generation %}` around an answer in the template. It has templates of its own with that mark for some
models, each in the place of the model's, and refuses all others; ours is found without a mark and without a list.
Where both have one they are the same token for token, but for line breaks: some of TRL's marks take in the one after
the end token, which no generation reaches, or the one before the answer, which the generation prompt has written.
"""

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from chat_layouts import CONVERSATIONS, LAYOUTS, Messages, give_tokens

from conftest import build_byte_level
from halfbyte.data import IGNORE_INDEX, NAMED_TEMPLATES, Row, encode_rows, set_chat_template
from halfbyte.errors import HalfbyteError

ROOT = Path(__file__).resolve().parents[2]
PEER = ROOT / ".peers" / "bin" / "python"

pytestmark = pytest.mark.skipif(not PEER.exists(), reason=f"no environment with TRL at {PEER}: make peers")

TALKS = {name: messages for name, messages in CONVERSATIONS.items() if name != "tools"}
ONE_ANSWER = {name for name, said in TALKS.items() if [m["role"] for m in said].index("assistant") == len(said) - 1}
WITH_SYSTEM = {name for name, messages in TALKS.items() if messages[0]["role"] == "system"}


class Known(NamedTuple):
    """A template that TRL comes with, and what it learns beside the answers and their end tokens."""

    bos: str | None
    eos: str
    break_after: bool = False  # a line break after the end token
    break_before: bool = False  # the line break that ends the generation prompt
    system: bool = True  # whether it takes a system message


KNOWN = {
    "cohere": Known("<s>", "<|END_OF_TURN_TOKEN|>"),
    "gemma": Known("<bos>", "<eos>", break_after=True, system=False),
    "lfm2": Known("<s>", "<|im_end|>", break_after=True),
    "llama3": Known("<|begin_of_text|>", "<|eot_id|>"),
    "phi3": Known(None, "<|endoftext|>", break_after=True),
    "phi3_5": Known(None, "<|endoftext|>", break_after=True),
    "qwen2_5": Known(None, "<|im_end|>", break_after=True, break_before=True),
    "qwen3": Known(None, "<|im_end|>", break_after=True),
    "qwen3_instruct_2507": Known(None, "<|im_end|>", break_after=True),
}

REFUSED = {"deepseekv3": Known("<s>", "</s>")}

# Of each template of ours what it writes for an answer, and the three parts of that, of which the second is learned.
ANSWERS = {
    "alpaca": ("message.content + eos_token", "''", "message.content + eos_token", "''"),
    "chatml": (
        r"'<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n'",
        r"'<|im_start|>' + message.role + '\n'",
        "message.content + '<|im_end|>'",
        r"'\n'",
    ),
    "gemma": (
        r"'<start_of_turn>model\n' + message.content | trim + '<end_of_turn>\n'",
        r"'<start_of_turn>model\n'",
        "message.content | trim + '<end_of_turn>'",
        r"'\n'",
    ),
    "guanaco": (
        "'### Assistant: ' + message.content + eos_token",
        "'### Assistant:'",
        "' ' + message.content + eos_token",
        "''",
    ),
    "llama-2": (
        "' ' + message.content | trim + ' ' + eos_token",
        "''",
        "' ' + message.content | trim + ' ' + eos_token",
        "''",
    ),
    "llama-3": (
        r"'<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' + message.content | trim + '<|eot_id|>'",
        r"'<|start_header_id|>' + message.role + '<|end_header_id|>\n\n'",
        "message.content | trim + '<|eot_id|>'",
        "''",
    ),
    "mistral": ("' ' + message.content + eos_token", "''", "' ' + message.content + eos_token", "''"),
    "phi-3": (
        r"'<|' + message.role + '|>\n' + message.content + '<|end|>\n'",
        r"'<|' + message.role + '|>\n'",
        "message.content + '<|end|>'",
        r"'\n'",
    ),
    "vicuna": (
        "'ASSISTANT: ' + message.content + eos_token",
        "'ASSISTANT:'",
        "' ' + message.content + eos_token",
        "''",
    ),
    "zephyr": (
        r"'<|' + message.role + '|>\n' + message.content + eos_token + '\n'",
        r"'<|' + message.role + '|>\n'",
        "message.content + eos_token",
        r"'\n'",
    ),
}


def mark(template: str, name: str) -> str:
    """The template with `{% generation %}` around what its answers are; it writes the same as before."""
    written, header, answer, after = ANSWERS[name]
    marked = f"{{% generation %}}{{{{ {answer} }}}}{{% endgeneration %}}"
    choice = f"{{% if message.role == 'assistant' %}}{marked}{{% else %}}{{{{ {answer} }}}}{{% endif %}}"
    for begins in ("{{- ", "{{ "):
        if template.count(begins + written + " }}") == 1:
            return template.replace(begins + written + " }}", f"{begins}{header} }}}}{choice}{{{{ {after} }}}}")
    raise AssertionError(f"{name} writes its answers in other words now")


def build_known(name: str, template: str | None = None) -> Any:
    known = (KNOWN | REFUSED)[name]
    tokenizer = give_tokens(build_byte_level(template=None), known.bos, known.eos)
    tokenizer.chat_template = template
    return tokenizer


def build_own(name: str, marked: bool = False) -> Any:
    tokenizer = give_tokens(build_byte_level(template=None), LAYOUTS[name].bos, LAYOUTS[name].eos)
    set_chat_template(tokenizer, name)
    if marked:
        tokenizer.chat_template = mark(tokenizer.chat_template, name)
    return tokenizer


def talks_of(name: str) -> dict[str, Messages]:
    return {talk: said for talk, said in TALKS.items() if KNOWN[name].system or talk not in WITH_SYSTEM}


@pytest.fixture(scope="module")
def trl(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    """What TRL made of everything that is asked below, by one process: importing it takes longer than the work."""
    folder = tmp_path_factory.mktemp("trl")

    def job(name: str, tokenizer: Any, talks: dict[str, Messages], known: str | None = None) -> None:
        tokenizer.save_pretrained(folder / name)
        (folder / name / "job").write_text(json.dumps({"known": known, "conversations": list(talks.values())}))

    for name in KNOWN:
        job(name, build_known(name), talks_of(name), name)
    for name in REFUSED:
        job(name, build_known(name), {"one turn": TALKS["one turn"]}, name)
    for name in NAMED_TEMPLATES:
        job(f"{name} as it is", build_own(name), {"one turn": TALKS["one turn"]})
        job(f"{name} marked", build_own(name, marked=True), TALKS)
    command = [str(PEER), str(Path(__file__).with_name("trl_peer.py")), str(folder)]
    offline = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "cache")}
    ran = subprocess.run(command, capture_output=True, text=True, check=False, env=offline)
    assert ran.returncode == 0, ran.stderr
    return lambda name: json.loads((folder / name / "result").read_text())


def ours(tokenizer: Any, messages: Messages) -> list[tuple[list[int], list[int]]]:
    examples, _ = encode_rows(tokenizer, [Row(messages, "rows.jsonl:7")], max_length=100_000)
    return [(example.input_ids.tolist(), example.labels.tolist()) for example in examples]


@pytest.mark.parametrize("name", NAMED_TEMPLATES)
def test_a_template_without_marks_has_the_mask_that_trl_finds_with_them(
    trl: Callable[[str], dict[str, Any]], name: str
) -> None:
    as_it_is, marked = trl(f"{name} as it is"), trl(f"{name} marked")
    assert (as_it_is["masks"], as_it_is["rows"]) == ([0], [])
    assert "patching is not supported for this template" in as_it_is["refused"]
    assert (marked["patched"], marked["refused"]) == (None, None)
    for messages, row in zip(TALKS.values(), marked["rows"], strict=True):
        wanted = (row["input_ids"], row["labels"])
        assert any(label != IGNORE_INDEX for label in row["labels"])
        assert ours(build_own(name), messages) == [wanted]
        assert ours(build_own(name, marked=True), messages) == [wanted]


@pytest.mark.parametrize("name", KNOWN)
def test_models_templates_have_the_mask_that_trl_patches_into_them(
    trl: Callable[[str], dict[str, Any]], name: str
) -> None:
    known, result = KNOWN[name], trl(name)
    original, patched = build_known(name, result["template"]), build_known(name, result["patched"])
    assert result["refused"] is None
    assert not any(result["masks"])  # of the model's own template: there is no mark in it
    found = set()
    for (talk, messages), row in zip(talks_of(name).items(), result["rows"], strict=True):
        ((ids, labels),) = ours(patched, messages)
        assert ids == row["input_ids"]
        if name != "qwen3" or talk in ONE_ANSWER:  # TRL's Qwen 3 writes the reasoning's place in every answer
            assert ours(original, messages) == [(ids, labels)], talk
        learned = [label != IGNORE_INDEX for label in labels]
        theirs = [label != IGNORE_INDEX for label in row["labels"]]
        for place in range(len(ids)):
            if learned[place] == theirs[place]:
                continue
            # What TRL learns besides: never the other way round, and never anything else.
            assert theirs[place]
            assert original.decode([ids[place]]) == "\n"
            found.add("after" if learned[place - 1] else "before")
            assert learned[place - 1] or learned[place + 1]
    assert ("after" in found, "before" in found) == (known.break_after, known.break_before)


def test_a_template_that_prompts_with_reasoning_is_refused_where_trl_passes_over_it(
    trl: Callable[[str], dict[str, Any]],
) -> None:
    """DeepSeek V3's prompt ends with `<think>`; TRL learns answers that do not follow it, and the mark before them."""
    (row,), template = trl("deepseekv3")["rows"], trl("deepseekv3")["template"]
    tokenizer = build_known("deepseekv3", template)
    learned = [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label != IGNORE_INDEX]
    assert tokenizer.decode(learned[:1]) == "<｜Assistant｜>"
    with pytest.raises(HalfbyteError, match="does not render this answer as a continuation of its generation prompt"):
        ours(tokenizer, TALKS["one turn"])
