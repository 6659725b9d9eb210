"""The terminal side of a chat: lines in, words out as they come, and commands that begin with a slash.

On a terminal a line can be edited, Ctrl-C stops an answer and Ctrl-D leaves. Where lines come from a pipe, the answers
alone go to standard output, everything else to standard error, and what is wrong with a line ends the program.
"""

import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.cells import cell_len
from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from transformers.utils.logging import disable_progress_bar

from halfbyte.config import ChatConfig, nearest
from halfbyte.errors import HalfbyteError
from halfbyte.recipes.chat import BASE, Answer, Chat, open_chat
from halfbyte.report.terminal import printable

try:
    import readline
except ImportError:  # Windows
    readline = None  # type: ignore[assignment]

_MARGIN = 2
_COMMANDS = {
    "adapter": ("[NAME]", "let another adapter answer, or the base; without a name, list them"),
    "seed": ("[N]", "what decides the tokens that are drawn"),
    "temperature": ("[X]", "0 always takes the likeliest token"),
    "top_p": ("[X]", "draw from the likeliest tokens up to this share"),
    "system": ("[TEXT]", "another system message; it begins anew"),
    "reset": ("", "forget the conversation"),
    "help": ("", "this list"),
    "exit": ("", "leave; so does Ctrl-D"),
}


def run_chat(config: ChatConfig) -> None:
    """What the command line calls: talk until the lines end, or /exit.

    Raises:
        HalfbyteError: whatever `open_chat` refuses; where lines come from a pipe, also what is wrong with one.
    """
    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    console = Console(highlight=False) if interactive else Console(stderr=True, highlight=False)
    if interactive:
        disable_progress_bar()  # it and ours would write over each other
        with console.status("loading", spinner="dots"):
            chat = open_chat(config, console)
    else:
        chat = open_chat(config, console)
    _Terminal(chat, console, interactive, config.compare).run()


class _Terminal:
    def __init__(self, chat: Chat, console: Console, interactive: bool, compare: bool) -> None:
        self.chat = chat
        self.console = console
        self.interactive = interactive
        self.compare = compare

    def run(self) -> None:
        self._say_what_is_loaded()
        for line in self._lines():
            try:
                if line.startswith("/") and not line.startswith("//"):
                    if not self._obey(*line[1:].partition(" ")[::2]):
                        return
                else:
                    self._ask(line.removeprefix("/") if line.startswith("//") else line)
            except HalfbyteError as error:
                if not self.interactive:
                    raise
                self.console.print(Text(printable(str(error)).rstrip("."), style="red"))

    # ── In ───────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _lines(self) -> Iterator[str]:
        """What was typed, blank lines left out; a backslash at the end goes on in the next line."""
        read = self._typed if self.interactive else _piped
        whole: list[str] = []
        while (line := read(bool(whole))) is not None:
            if line.endswith("\\"):
                whole.append(line[:-1])
                continue
            text = "\n".join([*whole, line]).strip()
            whole = []
            if text:
                yield text

    def _typed(self, goes_on: bool) -> str | None:
        if readline is not None:
            readline.set_completer(self._complete)
            readline.set_completer_delims(" ")
            readline.parse_and_bind("tab: complete")
        self.console.print()
        prompt = "…" if goes_on else "you"
        if self.console.color_system is not None:
            prompt = f"\001\033[1;36m\002{prompt}\001\033[0m\002"  # the marks say what takes no room
        try:
            return input(f"{prompt} › ")
        except EOFError:
            self.console.print()
            return None
        except KeyboardInterrupt:
            self.console.print("\n/exit or Ctrl-D leaves", style="dim")
            return ""

    def _complete(self, text: str, state: int) -> str | None:
        assert readline is not None
        if readline.get_line_buffer().startswith("/adapter "):
            found = [name for name in self.chat.voices if name.startswith(text)]
        else:
            found = [f"/{name} " for name in _COMMANDS if f"/{name}".startswith(text) and text]
        return found[state] if state < len(found) else None

    # ── Commands ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def _obey(self, name: str, argument: str) -> bool:
        """Do what a command says; false where it is to leave."""
        argument = argument.strip()
        drawing = self.chat.drawing
        if name in ("exit", "quit"):
            return False
        if name == "help":
            self._show_help()
        elif name == "reset":
            self.chat.reset()
            self._tell("the conversation is forgotten")
        elif name == "adapter" and self.compare and argument:
            raise HalfbyteError("with --compare all answer; leave it out to switch")
        elif name == "adapter":
            if argument:
                self.chat.switch(argument)
            marked = (f"[{voice}]" if voice == self.chat.voice else voice for voice in self.chat.voices)
            self._tell("  ".join(self.chat.voices if self.compare else marked))
        elif name == "system":
            if argument:
                self.chat.system = argument
                self.chat.reset()
            self._tell(f"system message: {self.chat.system or 'none'}")
        elif name == "seed":
            drawing.seed = int(_number(name, argument, drawing.seed, 2**32 - 1, whole=True))
            self._tell(f"seed {drawing.seed}{'' if drawing.temperature else ', which temperature 0 makes no use of'}")
        elif name == "temperature":
            drawing.temperature = _number(name, argument, drawing.temperature, None)
            self._tell(str(drawing))
        elif name == "top_p":
            drawing.top_p = _number(name, argument, drawing.top_p, 1.0) or drawing.top_p
            self._tell(str(drawing))
        else:
            meant = nearest(name, list(_COMMANDS))
            raise HalfbyteError(f"there is no /{name}: {f'did you mean /{meant}?' if meant else '/help lists them'}")
        return True

    def _show_help(self) -> None:
        table = Table.grid(padding=(0, 2))
        for name, (argument, what) in _COMMANDS.items():
            table.add_row(Text(f"/{name} {argument}".strip(), style="cyan"), Text(what, style="dim"))
        table.add_row(
            "", Text("A \\ at the end of a line goes on in the next; // at the beginning is one /.", style="dim")
        )
        table.add_row("", Text("Ctrl-C stops an answer.", style="dim"))
        self.console.print(table)

    # ── Out ──────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _say_what_is_loaded(self) -> None:
        chat, names = self.chat, self.chat.voices[1:]
        line = Text(Path(chat.name).name or chat.name, style="bold")
        line.append(f"  {chat.held}", style="dim")
        if names:
            line.append("  with ", style="dim").append(", ".join(names), style="bold")
        self.console.print(line, soft_wrap=True)
        self._tell(f"{chat.drawing}{'; /help lists the commands' if self.interactive else ''}")

    def _tell(self, sentence: str) -> None:
        self.console.print(Text(printable(sentence), style="dim"), soft_wrap=True)

    def _ask(self, prompt: str) -> None:
        if self.compare:
            self._ask_all(prompt)
        elif not self.interactive:
            answer = self.chat.ask(prompt, lambda text: _write(printable(text, keep="\n\t")))
            _write("\n")
            if answer.stopped:
                raise KeyboardInterrupt
        else:
            self._show_answer(prompt)

    def _show_answer(self, prompt: str) -> None:
        console = self.console
        words: Wrapped | None = None
        waiting = console.status("", spinner="dots")

        def write(text: str) -> None:
            nonlocal words
            if words is None:
                waiting.stop()
                console.print(Text(f"\n{self.chat.voice}", style="bold green"), end="\n")
                words = Wrapped(_write, console.width, _MARGIN)
            words.write(printable(text, keep="\n\t"))

        waiting.start()
        try:
            answer = self.chat.ask(prompt, write)
        finally:
            waiting.stop()
        console.print()
        self.console.print(Text(" " * _MARGIN + _figures(answer), style="dim"))

    def _ask_all(self, prompt: str) -> None:
        if not self.interactive:
            answers = self.chat.ask_all(prompt, lambda _voice, _text: None)
            for voice, answer in answers.items():
                _write(f"[{voice}] {printable(answer.text, keep=chr(10) + chr(9))}\n")
            if any(answer.stopped for answer in answers.values()):
                raise KeyboardInterrupt
            return
        written: dict[str, str] = dict.fromkeys(self.chat.voices, "")

        def write(voice: str, text: str) -> None:
            written[voice] += printable(text, keep="\n\t")
            live.update(side_by_side(written))

        self.console.print()
        with Live(side_by_side(written), console=self.console, transient=True, vertical_overflow="ellipsis") as live:
            answers = self.chat.ask_all(prompt, write)
        self.console.print(side_by_side(written, {voice: _figures(answer) for voice, answer in answers.items()}))


class Wrapped:
    """Words into a column, as they come: a line is broken where the next word has no room."""

    def __init__(self, write: Callable[[str], None], width: int, margin: int) -> None:
        """
        Args:
            width: of the terminal, in cells.
            margin: cells to the left of each line.
        """
        self._write = write
        self._width = width - 1
        self._margin = " " * margin
        self._column = 0  # 0 is before the margin
        self._broken = False

    def write(self, text: str) -> None:
        """Write a piece; a word is whole, or it may be broken between the pieces."""
        out = []
        for part in re.findall(r"\n|[^\S\n]+|\S+", text.expandtabs(4)):
            if part == "\n":
                out.append("\n")
                self._column, self._broken = 0, False
                continue
            wide = cell_len(part)
            if self._column and self._column + wide > self._width:
                out.append("\n")
                self._column, self._broken = 0, True
            if not self._column:
                if part.isspace() and self._broken:
                    continue  # the space at which the line was broken
                out.append(self._margin)
                self._column = len(self._margin)
            out.append(part)
            self._column += wide
        self._write("".join(out))


def side_by_side(texts: dict[str, str], figures: dict[str, str] | None = None) -> Table:
    """Columns of answers, a panel each."""
    grid = Table.grid(expand=True, padding=(0, 1, 0, 0))
    for _ in texts:
        grid.add_column(ratio=1)
    panels = [
        Panel(
            Text(text.strip("\n"), overflow="fold"),
            title=Text(voice, style="bold green" if voice != BASE else "bold"),
            title_align="left",
            subtitle=Text(figures[voice], style="dim") if figures and voice in figures else None,
            subtitle_align="right",
            border_style="dim",
        )
        for voice, text in texts.items()
    ]
    grid.add_row(*panels)
    return grid


def _figures(answer: Answer) -> str:
    if not answer.tokens:
        return "stopped" if answer.stopped else "no answer"
    rate = f"{answer.tokens / answer.seconds:.1f} tokens/s"
    return f"{answer.tokens} tokens, {rate}{', stopped' if answer.stopped else ''}"


def _number(name: str, text: str, now: float, most: float | None, whole: bool = False) -> float:
    if not text:
        return now
    try:
        value = int(text) if whole else float(text)
    except ValueError:
        value = -1
    if not 0 <= value <= (float("1e9") if most is None else most):
        kind = "a whole number" if whole else "a number"
        bounds = f"from 0 to {most:g}" if most is not None and most < 2**31 else "of at least 0"
        raise HalfbyteError(f"/{name} is {text!r}, but it must be {kind} {bounds}")
    return value


def _piped(_goes_on: bool) -> str | None:
    line = sys.stdin.readline()
    return line.rstrip("\n") if line else None


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
