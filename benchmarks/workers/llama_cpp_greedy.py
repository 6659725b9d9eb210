"""Greedy tokens of a .gguf file by llama.cpp; runs in .llama, an environment without halfbyte.

Reads one JSON object from standard input: model, lora (or null), prompts (lists of ids), new_tokens, ends (ids), forced
(for each prompt the tokens to go along, or null). Writes one: tokens, a list a prompt. With `forced` they are what
llama.cpp would take at each place of the given tokens, and not of its own. With `texts` those are tokenized instead,
and with `logits` each prompt is read and the logits of all its places come out.
"""

import json
import sys

from llama_cpp import Llama


def main() -> None:
    task = json.load(sys.stdin)
    if "texts" in task:
        model = Llama(task["model"], vocab_only=True, verbose=False)
        json.dump([model.tokenize(text.encode(), add_bos=False, special=True) for text in task["texts"]], sys.stdout)
        return
    model = Llama(
        task["model"],
        lora_path=task.get("lora"),
        n_ctx=task.get("context", 1024),
        n_threads=task.get("threads", 2),
        logits_all=True,
        verbose=False,
    )
    if task.get("logits"):
        json.dump([read(model, prompt) for prompt in task["prompts"]], sys.stdout)
        return
    forced = task.get("forced") or [None] * len(task["prompts"])
    pairs = zip(task["prompts"], forced, strict=True)
    json.dump([greedy(model, prompt, given, task) for prompt, given in pairs], sys.stdout)


def read(model: Llama, prompt: list) -> list:
    model.reset()
    model.eval(prompt)
    return [[float(value) for value in row] for row in model.scores[: len(prompt)]]


def greedy(model: Llama, prompt: list, given: "list | None", task: dict) -> list:
    model.reset()
    if given is not None:
        model.eval(prompt + given)
        first = len(prompt) - 1
        return [int(row.argmax()) for row in model.scores[first : first + len(given)]]
    model.eval(prompt)
    tokens = []
    while len(tokens) < task["new_tokens"]:
        tokens.append(int(model.scores[model.n_tokens - 1].argmax()))
        if tokens[-1] in task["ends"]:
            break
        model.eval(tokens[-1:])
    return tokens


if __name__ == "__main__":
    main()
