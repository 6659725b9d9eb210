"""`halfbyte data`: what it shows, what it prints for a script, and its exit codes; and what `finetune` makes of it."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from halfbyte.cli import EXIT_BAD_INPUT, EXIT_FAILED, main
from halfbyte.config import FinetuneConfig
from halfbyte.errors import HalfbyteError
from halfbyte.huggingface import load_tokenizer
from halfbyte.recipes.tokenizing import read_data
from models import build_tokenizer


def turns(*texts: str) -> dict[str, Any]:
    return {"messages": [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]}


CLEAN = [turns("Where is the harbour?", "By the sea."), turns("How deep is it?", "Nine metres."), turns("Why?", "So.")]
HELD_OUT = [turns("Is there a lighthouse?", "There are two."), turns("Are they lit?", "By night.")]
EMPTY = turns("What?", "")


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A directory with a tokenizer, and nothing that weighs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    build_tokenizer().save_pretrained(tmp_path / "model")
    Path("model/config.json").write_text('{"model_type": "llama"}')
    return "model"


def write(name: str, rows: list[Any]) -> str:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return name


def data(model: str, *flags: str) -> int:
    return main(["data", "--model_name_or_path", model, "--dataset", "rows.jsonl", *flags])


def test_clean_data(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    write("rows.jsonl", CLEAN)
    write("held.jsonl", HELD_OUT)
    assert data(model, "--eval_dataset", "held.jsonl", "--rows", "2") == 0
    shown = capsys.readouterr().out
    for words in (
        "the first 2 examples",
        "rows.jsonl:1  ",
        "  <|im_start|>user\n  Where is the harbour?<|im_end|>\n  <|im_start|>assistant\n  ⟦By the sea.<|im_end|>⟧\n",
        "training: rows.jsonl\nrows      3\n",
        "held out: held.jsonl\nrows      2\n",
        "nothing is wrong with these data",
    ):
        assert words in shown
    assert "rows.jsonl:3" not in shown
    assert not [line for line in shown.splitlines() if line != line.rstrip()]


def test_what_would_spoil_a_run_makes_the_exit_code_1(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    write("rows.jsonl", [*CLEAN, EMPTY, turns("Go \x07", "Yes."), EMPTY])
    assert data(model) == EXIT_FAILED
    shown = capsys.readouterr().out
    for words in (
        "rows      4, and 2 that would spoil a run\n",
        "training: would spoil a run\n      2  empty answers\n",
        "         rows.jsonl:4  messages[1]: the assistant turn is empty",
        "         rows.jsonl:6  messages[1]",
        "training: worth knowing\n      1  control characters\n",
        "         rows.jsonl:5  messages[0] holds U+0007 after 'Go'",
        "finetune would stop: 2 rows would spoil a run; mend what is named above, or leave them out with"
        " --skip_bad_rows 2\n",
    ):
        assert words in shown
    assert data(model, "--findings", "1") == EXIT_FAILED
    shown = capsys.readouterr().out
    assert "rows.jsonl:6" not in shown
    assert "and 1 more\n" in shown


def test_rows_that_may_be_left_out_do_not(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    write("rows.jsonl", [*CLEAN, EMPTY])
    assert data(model, "--skip_bad_rows", "1") == 0
    assert "finetune would go on without 1 row, as skip_bad_rows allows" in capsys.readouterr().out
    write("rows.jsonl", [EMPTY])
    assert data(model, "--skip_bad_rows", "1") == EXIT_FAILED  # for nothing is left


def test_what_is_worth_knowing_leaves_the_exit_code_0(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    write("rows.jsonl", [*CLEAN, CLEAN[0]])
    assert data(model) == 0
    shown = capsys.readouterr().out
    assert "rows.jsonl:4  is rows.jsonl:1 again" in shown
    assert "nothing here would spoil a run; what is worth knowing is above" in shown


def test_held_out_rows_that_are_trained_on(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    write("rows.jsonl", CLEAN)
    write("held.jsonl", [*HELD_OUT, CLEAN[1]])
    assert data(model, "--eval_dataset", "held.jsonl") == EXIT_FAILED
    assert "held.jsonl:3  is the training row rows.jsonl:2" in capsys.readouterr().out


def test_bad_input_to_the_command_is_another_exit_code(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert data(model) == EXIT_BAD_INPUT
    assert "no such file" in capsys.readouterr().err
    write("rows.jsonl", CLEAN)
    for flags in (["--rows", "-1"], ["--max_length", "0"], ["--histogram", "absent/lengths.png"]):
        assert data(model, *flags) == EXIT_BAD_INPUT, flags
        assert capsys.readouterr().err.count("\n") == 1


def test_json_for_scripts(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    write("rows.jsonl", [*CLEAN, EMPTY])
    assert data(model, "--json", "--rows", "1") == EXIT_FAILED
    report = json.loads(capsys.readouterr().out)
    (found,) = report["sets"]["training"]["findings"].values()
    assert report["spoiled"] is True
    assert found["count"] == 1
    assert found["first"][0]["source"] == "rows.jsonl:4"
    assert sum(report["sets"]["training"]["lengths"].values()) == report["sets"]["training"]["rows"] == 3
    (first,) = report["first"]
    assert [piece["text"] for piece in first["pieces"] if piece["learned"]] == ["By the sea.<|im_end|>"]
    assert first["supervised_tokens"] == len("By the sea.") + 1  # a token for each byte


def test_a_runs_file_can_be_given_as_it_is(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    write("rows.jsonl", CLEAN)
    lines = ["model_name_or_path: model", "dataset: rows.jsonl", "output_dir: out", "learning_rate: 1e-3"]
    Path("run.yaml").write_text("\n".join(lines))
    assert main(["data", "run.yaml"]) == 0
    assert not Path("out").exists()
    assert "rows      3\n" in capsys.readouterr().out


# ── The same checks before a run ────────────────────────────────────────────────────────────────────────────


def read(model: str, **settings: Any) -> tuple[list[str], list[str], str]:
    """The sources of the examples to learn and of the held-out ones, and what was said."""
    values = {"model_name_or_path": model, "dataset": "rows.jsonl", "output_dir": "out"}
    console = Console(file=io.StringIO(), width=200)
    train, held_out = read_data(FinetuneConfig.model_validate(values | settings), load_tokenizer(model), console)
    said = console.file.getvalue()  # type: ignore[attr-defined]
    return [example.source for example in train], [example.source for example in held_out], said


def test_finetune_stops_at_the_first_row_that_would_spoil_the_run(model: str) -> None:
    write("rows.jsonl", [*CLEAN, EMPTY, EMPTY])
    with pytest.raises(HalfbyteError, match=r"^rows\.jsonl:4: .* \(halfbyte data shows all there are\)$"):
        read(model)
    with pytest.raises(HalfbyteError, match=r"^rows\.jsonl:5: .*; skip_bad_rows allows 1"):
        read(model, skip_bad_rows=1)


def test_finetune_goes_on_without_rows_up_to_a_cap_and_says_so(model: str) -> None:
    write("rows.jsonl", [EMPTY, *CLEAN, CLEAN[0]])
    write("held.jsonl", [CLEAN[1], *HELD_OUT])
    train, held_out, said = read(model, skip_bad_rows=1, eval_dataset="held.jsonl")
    assert train == [f"rows.jsonl:{line}" for line in (2, 3, 4, 5)]
    assert held_out == ["held.jsonl:2", "held.jsonl:3"]
    assert "note: 1 row is left out, as skip_bad_rows allows; the first is rows.jsonl:1: " in said
    assert "note: rows that are there before: 1, the first at rows.jsonl:5" in said
    assert "the first is held.jsonl:1: is the training row rows.jsonl:3" in said


def test_finetune_stops_on_held_out_rows_that_are_trained_on(model: str) -> None:
    write("rows.jsonl", CLEAN)
    write("held.jsonl", [*HELD_OUT, CLEAN[1]])
    with pytest.raises(HalfbyteError, match=r"^held\.jsonl:3: is the training row rows\.jsonl:2 "):
        read(model, eval_dataset="held.jsonl")


def test_finetune_counts_what_the_chat_template_refuses(model: str) -> None:
    refusing = "{% if messages|length > 2 %}{{ raise_exception('two turns only') }}{% endif %}"
    tokenizer = build_tokenizer()
    tokenizer.chat_template = refusing + tokenizer.chat_template
    tokenizer.save_pretrained(model)
    write("rows.jsonl", [EMPTY, CLEAN[0], turns("One?", "Two.", "Three?", "Four."), CLEAN[1]])
    train, _, said = read(model, skip_bad_rows=2)
    assert train == ["rows.jsonl:2", "rows.jsonl:4"]
    assert "2 rows are left out" in said
    with pytest.raises(HalfbyteError, match=r"^rows\.jsonl:3: .*two turns only.*skip_bad_rows allows 1"):
        read(model, skip_bad_rows=1)


def test_finetune_needs_a_row_that_is_left(model: str) -> None:
    write("rows.jsonl", [EMPTY])
    with pytest.raises(HalfbyteError, match=r"rows\.jsonl"):
        read(model, skip_bad_rows=5)
