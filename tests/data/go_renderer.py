"""Go's text/template, as much of it as a chat template for Ollama is made of: an oracle that shares no code with ours.

https://pkg.go.dev/text/template: actions between braces, `-` at a brace strips the white space beside it, a pipeline of
a function and its arguments, variables, if, else if, else, range, end.
"""

import json
import re
from typing import Any

_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[()]|:=|=|[^\s()"]+')


def render_go(template: str, data: dict[str, Any]) -> str:
    nodes, rest = _parse(_split(template))
    assert not rest
    out: list[str] = []
    _execute(nodes, data, {}, out)
    return "".join(out)


def _split(template: str) -> list[tuple[str, list[str]]]:
    """("text", [text]) and ("action", its words), one after another."""
    parts, place = [], 0
    for match in re.finditer(r"\{\{(- )?((?:\"(?:[^\"\\]|\\.)*\"|[^\"])*?)( -)?\}\}", template, re.DOTALL):
        text = template[place : match.start()]
        if parts and parts[-1] == ("strip", []):
            text, _ = text.lstrip(), parts.pop()
        parts.append(("text", [text.rstrip() if match[1] else text]))
        parts.append(("action", _TOKEN.findall(match[2])))
        if match[3]:
            parts.append(("strip", []))
        place = match.end()
    parts.append(("text", [template[place:]]))
    return parts


def _parse(parts: list[tuple[str, list[str]]]) -> tuple[list[Any], list[tuple[str, list[str]]]]:
    nodes: list[Any] = []
    while parts:
        (kind, words), parts = parts[0], parts[1:]
        if kind == "text":
            nodes.append(("text", words[0]))
        elif words[0] in ("end", "else"):
            return nodes, [(kind, words), *parts]
        elif words[0] == "range":
            body, parts = _parse(parts)
            nodes.append(("range", words[1:], body))
            assert parts[0][1] == ["end"]
            parts = parts[1:]
        elif words[0] == "if":
            node, parts = _parse_if(words[1:], parts)
            nodes.append(node)
        else:
            nodes.append(("action", words))
    return nodes, []


def _parse_if(condition: list[str], parts: list[tuple[str, list[str]]]) -> tuple[Any, list[tuple[str, list[str]]]]:
    body, parts = _parse(parts)
    (_, words), parts = parts[0], parts[1:]
    otherwise: list[Any] = []
    if words[:2] == ["else", "if"]:
        node, parts = _parse_if(words[2:], parts)
        otherwise = [node]
    elif words == ["else"]:
        otherwise, parts = _parse(parts)
        assert parts[0][1] == ["end"]
        parts = parts[1:]
    else:
        assert words == ["end"]
    return ("if", condition, body, otherwise), parts


def _execute(nodes: list[Any], dot: Any, variables: dict[str, Any], out: list[str]) -> None:
    for node in nodes:
        if node[0] == "text":
            out.append(node[1])
        elif node[0] == "range":
            for item in _value(node[1], dot, variables):
                _execute(node[2], item, variables, out)
        elif node[0] == "if":
            _execute(node[2] if _value(node[1], dot, variables) else node[3], dot, variables, out)
        elif len(node[1]) > 1 and node[1][1] in (":=", "="):
            assert (node[1][1] == "=") == (node[1][0] in variables), "declared once, and before it is set"
            variables[node[1][0]] = _value(node[1][2:], dot, variables)
        else:
            out.append(str(_value(node[1], dot, variables)))


def _value(words: list[str], dot: Any, variables: dict[str, Any]) -> Any:
    arguments, place = [], 0
    while place < len(words):
        if words[place] == "(":
            depth, end = 1, place + 1
            while depth:
                depth += {"(": 1, ")": -1}.get(words[end], 0)
                end += 1
            arguments.append(_value(words[place + 1 : end - 1], dot, variables))
            place = end
        else:
            arguments.append(_word(words[place], dot, variables))
            place += 1
    if callable(arguments[0]):
        return arguments[0](*arguments[1:])
    assert len(arguments) == 1
    return arguments[0]


def _word(word: str, dot: Any, variables: dict[str, Any]) -> Any:
    if word.startswith('"'):
        return json.loads(word)  # Go's literals, as far as JSON's are the same
    if word.startswith("$"):
        return variables[word]
    if word.startswith("."):
        return dot[word[1:]]
    return {"eq": lambda a, *others: a in others, "ne": lambda a, b: a != b, "and": lambda *all_: all(all_)}[word]
