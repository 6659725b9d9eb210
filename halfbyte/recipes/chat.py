"""A conversation with a model and its adapters: who speaks, what was said, and how tokens are drawn.

One model is in memory, and each adapter beside the others on it: a switch turns layers on and off, and loads nothing.
Each voice has the chat template that it was trained with. Nothing here knows of a terminal.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft import PeftModel
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from halfbyte.config import ChatConfig, nearest
from halfbyte.data import render_chat
from halfbyte.errors import HalfbyteError
from halfbyte.huggingface import load_model, prepare_tokenizer
from halfbyte.huggingface.generate import generate_texts
from halfbyte.huggingface.peft import read_adapter_config
from halfbyte.recipes.fitting import check_tokenizer, put_on
from halfbyte.recipes.provenance import quantization_of

BASE = "base"
Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Answer:
    """What a voice said."""

    text: str
    tokens: int
    seconds: float
    stopped: bool = False  # by the person, before its end


@dataclass
class Drawing:
    """How tokens are drawn."""

    temperature: float
    top_p: float
    seed: int
    max_new_tokens: int

    def __str__(self) -> str:
        if not self.temperature:
            return f"greedy, at most {self.max_new_tokens} tokens"
        nucleus = f", top_p {self.top_p:g}" if self.top_p < 1 else ""
        return f"temperature {self.temperature:g}{nucleus}, seed {self.seed}, at most {self.max_new_tokens} tokens"


@dataclass
class Chat:
    """A model that is loaded, and what it was told."""

    model: PreTrainedModel | PeftModel
    name: str
    tokenizers: dict[str, PreTrainedTokenizerBase]  # of each voice; the base's is the first
    drawing: Drawing
    system: str | None = None
    voice: str = BASE
    _said: dict[str, Messages] = field(default_factory=dict)  # by each voice; "" is the one conversation of all

    @property
    def voices(self) -> list[str]:
        """Who can answer: the base, and adapters by name."""
        return list(self.tokenizers)

    @property
    def held(self) -> str:
        """How the model's layers are in memory."""
        had = quantization_of(self.model)
        return str(had["compute_dtype"] if had["quant_type"] == "none" else had["quant_type"])

    def switch(self, name: str) -> None:
        """Have another voice speak; the conversation goes on.  Raises HalfbyteError where there is none of the name."""
        if name not in self.tokenizers:
            meant = nearest(name, self.voices)
            advice = f"did you mean {meant}?" if meant else f"there are {', '.join(self.voices)}"
            raise HalfbyteError(f"there is no adapter {name!r}: {advice}")
        self.voice = name
        if not isinstance(self.model, PeftModel):
            return
        if name == BASE:
            self.model.base_model.disable_adapter_layers()
        else:
            self.model.base_model.enable_adapter_layers()
            self.model.set_adapter(_inner_name(self.voices.index(name)))

    def ask(self, prompt: str, write: Callable[[str], None]) -> Answer:
        """Put a question to the voice that speaks, and go on from its answer.

        Args:
            write: called with each piece of the answer as it comes.

        Raises:
            HalfbyteError: the template refuses the conversation, or it is longer than the model sees. Then nothing
                was asked.
        """
        said = self._said.setdefault("", [])
        answer = self._answer(said, prompt, write)
        if answer.stopped and not answer.text:
            del said[-2:]  # as if it had not been asked
        return answer

    def ask_all(self, prompt: str, write: Callable[[str, str], None]) -> dict[str, Answer]:
        """Put a question to every voice, each in a conversation of its own, one after another.

        Args:
            write: called with the voice and a piece of its answer.

        Raises:
            HalfbyteError: as in `ask`.
        """
        speaking, answers = self.voice, {}
        try:
            for name in self.voices:
                self.switch(name)
                said = self._said.setdefault(name, [])
                answers[name] = self._answer(said, prompt, lambda text, name=name: write(name, text))  # type: ignore[misc]
                if answers[name].stopped:
                    break
        finally:
            self.switch(speaking)
        for name in self.voices[len(answers) :]:  # so that all go on from the same questions
            self._said[name] = [*self._said.setdefault(name, []), *_turn(prompt, "")]
        return answers

    def reset(self) -> None:
        """Forget what was said."""
        self._said.clear()

    def _answer(self, said: Messages, prompt: str, write: Callable[[str], None]) -> Answer:
        tokenizer = self.tokenizers[self.voice]
        system = [{"role": "system", "content": self.system}] if self.system else []
        messages = [*system, *said, {"role": "user", "content": prompt}]
        text = render_chat(tokenizer, messages, "the conversation", add_generation_prompt=True)
        ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        room = self._room(len(ids))
        pieces: list[str] = []

        def stream(piece: str) -> None:
            pieces.append(piece)
            write(piece)

        torch.manual_seed(self.drawing.seed)
        started = time.perf_counter()
        stopped = False
        try:
            generate_texts(
                self.model, tokenizer, [ids], room, self.drawing.temperature, self.drawing.top_p, stream=stream
            )
        except KeyboardInterrupt:
            stopped = True
        seconds = time.perf_counter() - started
        answer = "".join(pieces)
        said.extend(_turn(prompt, answer))
        return Answer(answer, len(tokenizer(answer, add_special_tokens=False)["input_ids"]), seconds, stopped)

    def _room(self, length: int) -> int:
        """How long an answer may be.  Raises HalfbyteError where there is no room for one."""
        longest = getattr(self.model.config, "max_position_embeddings", None)
        if longest is not None and length >= longest:
            raise HalfbyteError(
                f"the conversation is {length:,} tokens, and the model sees {longest:,}: begin anew with /reset"
            )
        return self.drawing.max_new_tokens if longest is None else min(self.drawing.max_new_tokens, longest - length)


def open_chat(config: ChatConfig, console: Console) -> Chat:
    """Load a model and its adapters, ready to talk.

    Raises:
        HalfbyteError: whatever `load_model` and `load_adapter` refuse; no chat template.
    """
    adapters = config.adapter or []
    for adapter in adapters:  # before the model is loaded, which takes its time
        read_adapter_config(adapter)
        check_tokenizer(adapter, config.model_name_or_path)
    names = adapter_names(adapters)
    tokenizers = {BASE: prepare_tokenizer(config.model_name_or_path, None, config.chat_template)}
    for name, adapter in zip(names, adapters, strict=True):
        tokenizers[name] = prepare_tokenizer(config.model_name_or_path, adapter, config.chat_template)
    _check_templates(tokenizers, config.model_name_or_path)
    dtype = getattr(torch, config.compute_dtype)
    model, _ = load_model(config.model_name_or_path, config.quant_type, config.block_size, config.double_quant, dtype)
    for index, adapter in enumerate(adapters):
        model = put_on(model, adapter, config.model_name_or_path, console, _inner_name(index + 1))
    drawing = Drawing(config.temperature, config.top_p, config.seed, config.max_new_tokens)
    chat = Chat(model, config.model_name_or_path, tokenizers, drawing, config.system)
    chat.switch(names[0] if names else BASE)
    return chat


def adapter_names(adapters: Sequence[str]) -> list[str]:
    """The last part of each path, and more of it where that is a checkpoint's or not the only one."""
    parts = [Path(adapter).absolute().parts for adapter in adapters]
    for count in range(1, max(map(len, parts), default=1) + 1):
        names = ["/".join(path[-count - path[-1].startswith("checkpoint-") :]) for path in parts]
        if len({*names, BASE}) == len(names) + 1:
            return names
    raise HalfbyteError(f"adapter {adapters[0]} is named twice, or called {BASE!r} as the model without one is.")


def _check_templates(tokenizers: dict[str, PreTrainedTokenizerBase], model: str) -> None:
    """An adapter's template serves its base where that has none.  Raises HalfbyteError where there is none at all."""
    having = next((tokenizer for tokenizer in reversed(tokenizers.values()) if tokenizer.chat_template), None)
    if having is None:
        raise HalfbyteError(
            f"{model} has no chat template, so it goes on with text and does not answer; set chat_template, or use"
            " halfbyte generate."
        )
    tokenizers |= {name: having for name, tokenizer in tokenizers.items() if not tokenizer.chat_template}


def _turn(prompt: str, answer: str) -> Messages:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


def _inner_name(index: int) -> str:
    return f"adapter_{index}"  # PEFT makes module names of it, which have no dots and no slashes
