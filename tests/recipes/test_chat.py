"""halfbyte chat: who answers, what is remembered, what a terminal shows, and what a pipe gets."""

import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from adapters import random_adapter
from halfbyte import HalfbyteError, load_model
from halfbyte.cli import main
from halfbyte.config import ChatConfig, load_config
from halfbyte.data import render_chat
from halfbyte.huggingface.generate import generate_texts
from halfbyte.huggingface.peft import load_adapter
from halfbyte.recipes import chat as recipe
from halfbyte.recipes.chat import BASE, Chat, adapter_names, open_chat
from halfbyte.recipes.chat_terminal import Wrapped
from halfbyte.report.terminal import printable
from models import build_model, build_tokenizer, save_model

TOKENS = 12


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A base and two adapters, each of which changes it much."""
    root = tmp_path_factory.mktemp("chat")
    save_model(root / "model")
    for name, rank in (("formal", 4), ("terse", 8)):
        random_adapter(build_model("llama"), root / name, r=rank, lora_alpha=32)
    build_tokenizer().save_pretrained(root / "terse")
    return root / "model", root / "formal", root / "terse"


def opened(places: tuple[Path, ...], **keys: Any) -> Chat:
    model, *adapters = map(str, places)
    given = {"model_name_or_path": model, "adapter": adapters or None, "max_new_tokens": TOKENS, **keys}
    return open_chat(load_config(ChatConfig, None, given), Console(file=io.StringIO()))


def silent(_text: str) -> None: ...


def alone(model: Path, adapter: Path | None, messages: list[dict[str, str]]) -> str:
    """The answer of a model that has this adapter and no other."""
    loaded, tokenizer = load_model(str(model))
    text = render_chat(tokenizer, messages, "", add_generation_prompt=True)
    adapted = loaded if adapter is None else load_adapter(loaded, adapter)
    (answer,) = generate_texts(adapted, tokenizer, [text], TOKENS)
    return answer


# ── Who answers ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_each_voice_answers_as_it_does_alone(places: tuple[Path, Path, Path]) -> None:
    model, formal, terse = places
    chat = opened(places)
    assert (chat.voices, chat.voice) == ([BASE, "formal", "terse"], "formal")
    asked = [{"role": "user", "content": "hello"}]
    expected = {name: alone(model, path, asked) for name, path in ((BASE, None), ("formal", formal), ("terse", terse))}
    assert len(set(expected.values())) == 3
    for name in ("formal", BASE, "terse", "formal", BASE):  # in place, there and back
        chat.switch(name)
        chat.reset()
        assert chat.ask("hello", silent).text == expected[name], name
    answers = chat.ask_all("hello", lambda _voice, _text: None)
    assert {name: answer.text for name, answer in answers.items()} == expected
    assert chat.voice == BASE


def test_a_switch_goes_on_with_the_conversation(places: tuple[Path, Path, Path]) -> None:
    model, _, terse = places
    chat = opened(places)
    first = chat.ask("hello", silent).text
    chat.switch("terse")
    said = [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": first},
        {"role": "user", "content": "and?"},
    ]
    assert chat.ask("and?", silent).text == alone(model, terse, said)
    chat.reset()
    assert chat.ask("and?", silent).text == alone(model, terse, said[-1:])


def test_side_by_side_each_has_its_own_conversation(
    places: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    def record(model: Any, tokenizer: Any, prompts: list[list[int]], *_: Any, stream: Callable[[str], None]) -> None:
        seen.append(tokenizer.decode(prompts[0]))
        stream(f"answer {len(seen)}")

    chat = opened(places[:2])
    monkeypatch.setattr(recipe, "generate_texts", record)
    chat.ask_all("one", lambda _voice, _text: None)
    chat.ask_all("two", lambda _voice, _text: None)
    assert "answer 1" in seen[2]
    assert "answer 2" not in seen[2]
    assert "answer 2" in seen[3]


def test_the_seed_decides_and_is_begun_anew(places: tuple[Path, Path, Path]) -> None:
    chat = opened(places, temperature=1.5)
    first = chat.ask("hello", silent).text
    torch.rand(7)
    chat.reset()
    assert chat.ask("hello", silent).text == first
    chat.drawing.seed = 7
    chat.reset()
    assert chat.ask("hello", silent).text != first
    assert str(chat.drawing) == f"temperature 1.5, seed 7, at most {TOKENS} tokens"


def test_the_system_message_stands_first(places: tuple[Path, Path, Path]) -> None:
    model, formal, _ = places
    said = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]
    assert opened(places, system="be brief").ask("hello", silent).text == alone(model, formal, said)


def test_pieces_are_the_answer(places: tuple[Path, Path, Path]) -> None:
    pieces: list[str] = []
    answer = opened(places[:1]).ask("hello", pieces.append)
    assert "".join(pieces) == answer.text
    assert not answer.stopped


def test_an_interrupted_answer_is_kept_as_far_as_it_came(places: tuple[Path, Path, Path]) -> None:
    chat = opened(places[:1])

    def interrupt(text: str) -> None:
        if text:
            raise KeyboardInterrupt

    answer = chat.ask("hello", interrupt)
    assert answer.stopped
    assert chat._said[""] == [{"role": "user", "content": "hello"}, {"role": "assistant", "content": answer.text}]


def test_what_was_stopped_before_a_word_was_not_asked(
    places: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    chat = opened(places[:1])
    monkeypatch.setattr(recipe, "generate_texts", interrupt)
    assert chat.ask("hello", silent).stopped
    assert chat._said[""] == []


def test_a_conversation_that_is_too_long_says_so_and_changes_nothing(places: tuple[Path, Path, Path]) -> None:
    chat = opened(places[:1])
    with pytest.raises(HalfbyteError, match=r"the model sees 256: begin anew with /reset"):
        chat.ask("word " * 60, silent)
    assert chat._said[""] == []
    chat.ask("hello", silent)


def test_a_base_without_a_template_speaks_in_its_adapters(places: tuple[Path, ...], tmp_path: Path) -> None:
    save_model(tmp_path / "model", chat_template=None)
    with pytest.raises(HalfbyteError, match="has no chat template"):
        opened((tmp_path / "model",))
    chat = opened((tmp_path / "model", places[2]))
    chat.switch(BASE)
    assert chat.ask("hello", silent).text


def test_names_are_the_shortest_that_differ() -> None:
    assert adapter_names(["runs/a", "runs/b/"]) == ["a", "b"]
    assert adapter_names(["x/run", "y/run"]) == ["x/run", "y/run"]
    assert adapter_names(["runs/a/checkpoint-10", "runs/a"]) == ["a/checkpoint-10", "a"]
    assert adapter_names(["runs/base"]) == ["runs/base"]
    with pytest.raises(HalfbyteError, match="named twice"):
        adapter_names(["runs/a", "runs/a"])


# ── A pipe ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def piped(places: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: Any) -> Callable[..., Any]:
    def talk(lines: str, *flags: str) -> tuple[int, str, str]:
        model, *adapters = map(str, places)
        monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
        given = ["chat", model, "--adapter", ",".join(adapters), "--max_new_tokens", str(TOKENS), *flags]
        code = main(given)
        out, err = capsys.readouterr()
        return code, out, err

    return talk


def test_a_pipe_gets_the_answers_alone(places: tuple[Path, Path, Path], piped: Callable[..., Any]) -> None:
    code, out, err = piped("hello\n\n/reset\n/adapter base\nhello\\\nthere\n")
    chat = opened(places)
    first = chat.ask("hello", silent).text
    chat.reset()
    chat.switch(BASE)
    second = chat.ask("hello\nthere", silent).text
    assert code == 0
    assert [word in err for word in ("model", "formal, terse", "greedy", "[base]")] == [True] * 4
    assert out == "".join(f"{printable(text, keep=chr(10) + chr(9))}\n" for text in (first, second))


def test_a_pipe_compares(piped: Callable[..., Any]) -> None:
    code, out, _ = piped("hello\n", "--compare")
    assert code == 0
    assert re.findall(r"^\[(\w+)\] ", out, re.M) == [BASE, "formal", "terse"]


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("/adaptr x", "did you mean /adapter?"),
        ("/adapter former", "did you mean formal?"),
        ("/temperature hot", "/temperature is 'hot', but it must be a number of at least 0"),
        ("/seed 1.5", "/seed is '1.5', but it must be a whole number"),
        ("/top_p 2", "from 0 to 1"),
    ],
)
def test_what_is_wrong_in_a_pipe_ends_it(piped: Callable[..., Any], line: str, told: str) -> None:
    code, out, err = piped(f"{line}\nhello\n")
    assert (code, out) == (2, "")
    assert told in err
    assert "Traceback" not in err


def test_after_exit_nothing_is_asked(piped: Callable[..., Any]) -> None:
    assert piped("/exit\nhello\n")[:2] == (0, "")


# ── A terminal ──────────────────────────────────────────────────────────────────────────────────────────────────────


class Terminal:
    """A program on a terminal of its own, and what it has shown."""

    def __init__(self, *arguments: str) -> None:
        master, slave = pty.openpty()
        environment = os.environ | {"TERM": "xterm", "COLUMNS": "80", "LINES": "24"}
        command = [sys.executable, "-m", "halfbyte.cli", *arguments]
        # A session of its own, so that a Ctrl-C is the terminal's and not the tests'.
        self.process = subprocess.Popen(
            command, stdin=slave, stdout=slave, stderr=slave, env=environment, start_new_session=True
        )
        os.close(slave)
        self.master = master
        self.shown = b""

    def until(self, words: str, seconds: float = 120) -> str:
        """What came up to these words, which are awaited."""
        end = time.monotonic() + seconds
        while words not in (plain := re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", self.shown.decode(errors="replace"))):
            assert time.monotonic() < end, f"{words!r} did not come: {plain[-1000:]}"
            if select.select([self.master], [], [], 1)[0]:
                self.shown += os.read(self.master, 65536)
        before, _, rest = plain.partition(words)
        self.shown = rest.encode()
        return before

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def interrupt(self) -> None:
        os.killpg(self.process.pid, signal.SIGINT)


def test_on_a_terminal(places: tuple[Path, Path, Path]) -> None:
    model, formal, terse = map(str, places)
    terminal = Terminal("chat", model, "--adapter", f"{formal},{terse}", "--max_new_tokens", "200")
    try:
        head = terminal.until("you › ")
        assert "formal, terse" in head
        assert "greedy, at most 200 tokens" in head
        terminal.type("/adaptr x\r")
        assert "did you mean /adapter?" in terminal.until("you › ")
        terminal.type("/adapter terse\r")
        assert "base  formal  [terse]" in terminal.until("you › ")
        terminal.type("/temperature 1.5\r")
        assert "temperature 1.5, seed 42" in terminal.until("you › ")
        terminal.interrupt()  # at the prompt: it stays
        assert "/exit or Ctrl-D leaves" in terminal.until("you › ")
        terminal.type("hello\r")
        terminal.until("\nterse")
        terminal.until("tokens/s")
        terminal.until("you › ")
        terminal.type("/exit\r")
        assert terminal.process.wait(60) == 0
    finally:
        terminal.process.kill()
        terminal.process.wait()
        os.close(terminal.master)


# ── Words into a column ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_lines_are_broken_between_words(size: int) -> None:
    text = "one two three four\n  indented 日本 語 and-a-word-that-is-longer-than-the-line\n\nlast"
    words = re.findall(r"\S+\s*|\s+", text)
    out: list[str] = []
    column = Wrapped(out.append, 16, 2)
    for begin in range(0, len(words), size):
        column.write("".join(words[begin : begin + size]))
    lines = [line.rstrip() for line in "".join(out).split("\n")]
    long = "and-a-word-that-is-longer-than-the-line"
    assert lines == ["  one two three", "  four", "    indented", "  日本 語", f"  {long}", "", "  last"]


def test_the_json_of_a_run_is_no_chat(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "chat.yaml").write_text(json.dumps({"model_name_or_path": "m", "compare": True}))
    assert main(["chat", str(tmp_path / "chat.yaml")]) == 2
    assert "name one with --adapter" in capsys.readouterr().err
