"""A chat template in Go's language renders what Jinja renders, or is refused in a sentence."""

import random
from itertools import product
from pathlib import Path

import pytest
from go_renderer import render_go

from halfbyte import HalfbyteError
from halfbyte.data import NAMED_TEMPLATES, render_chat, set_chat_template
from halfbyte.data.go_template import go_template
from models import CHATML, build_tokenizer
from tokenizers_like import build_byte_level, build_sentencepiece_like

TEMPLATES = Path(__file__).parent / "templates"
TOKENS = ("<|im_start|>", "<|im_end|>", "<end_of_turn>", "<start_of_turn>", "<|eot_id|>", "<|start_header_id|>")
MORE = ("<|end_header_id|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>")
SAID = ["Hi", 'a "quoted" \\n text', "{{ .Content }} {% if %}", "two\n\nlines\tand tab", "日本語 🎈 é", "</s>x", "-"]
ORDERS = [
    ("user",),
    ("system", "user"),
    ("user", "assistant", "user"),
    ("system", "user", "assistant", "user", "assistant", "user"),
    ("user", "assistant") * 4 + ("user",),
]
EXPRESSED = ["deepseek-v3", "gemma-2", "granite", "llama-3.1", "phi-3.5", "qwen2.5", "qwen3", "smollm2"]


def tokenizer_with(template: str | None):
    return build_sentencepiece_like(template, (*TOKENS, *MORE))


def check(tokenizer, orders: list[tuple[str, ...]] = ORDERS) -> None:
    template = str(go_template(tokenizer))
    chooser = random.Random(0)
    for order, _ in product(orders, range(3)):
        said = [{"role": role, "content": chooser.choice(SAID)} for role in order]
        messages = [{"Role": message["role"], "Content": message["content"]} for message in said]
        expected = render_chat(tokenizer, said, "here", add_generation_prompt=True)
        assert render_go(template, {"Messages": messages}) == expected


@pytest.mark.parametrize("name", NAMED_TEMPLATES)
def test_templates_of_ours(name: str) -> None:
    tokenizer = tokenizer_with(None)
    set_chat_template(tokenizer, name)
    check(tokenizer)


@pytest.mark.parametrize("name", EXPRESSED)
def test_templates_of_models(name: str) -> None:
    tokenizer = tokenizer_with((TEMPLATES / f"{name}.jinja").read_text())
    takes_system = name != "gemma-2"
    check(tokenizer, [order for order in ORDERS if takes_system or "system" not in order])
    assert any("no system message" in note for note in go_template(tokenizer).notes) == (not takes_system)


def test_a_system_message_of_the_run_is_written() -> None:
    tokenizer = build_tokenizer()
    set_chat_template(tokenizer, "chatml", system_prompt='Answer in "one" word.')
    check(tokenizer)


def test_the_bos_is_left_to_ollama_where_it_puts_one() -> None:
    tokenizer = build_byte_level("{{ bos_token }}" + CHATML, ("<|bos|>", "<|im_end|>", "<|im_start|>"))
    assert "<|bos|>" in str(go_template(tokenizer))  # nobody else would write it
    from tokenizers.processors import TemplateProcessing

    begins = TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", tokenizer.bos_token_id)])
    tokenizer.backend_tokenizer.post_processor = begins
    template = str(go_template(tokenizer))
    messages = [{"Role": "user", "Content": "hi"}]
    expected = render_chat(tokenizer, [{"role": "user", "content": "hi"}], "", add_generation_prompt=True)
    assert "<|bos|>" + render_go(template, {"Messages": messages}) == expected
    tokenizer.chat_template = CHATML
    with pytest.raises(HalfbyteError, match=r"begins without <\|bos\|>"):
        go_template(tokenizer)


@pytest.mark.parametrize("role", ["user", "system"])
def test_a_message_without_its_place_is_refused(role: str) -> None:
    template = f"{{% for m in messages if m.role != '{role}' %}}{{{{ m.content }}}}{{% endfor %}}"
    with pytest.raises(HalfbyteError, match="not where it was said"):
        go_template(tokenizer_with(template))


@pytest.mark.parametrize(
    ("template", "told"),
    [
        ("{% for m in messages %}[{{ loop.index }} {{ m.role }}] {{ m.content }}\n{% endfor %}", "not always the same"),
        ("{% for m in messages %}{{ m.role }}: {{ m.content | upper }}\n{% endfor %}", "not where it was said"),
        (CHATML + "{% if messages | length > 5 %}!{% endif %}", "of 8 messages comes out otherwise"),
        (CHATML.replace("{{ m.content }}", "{{ m.content.replace('\\t', ' ') }}"), "comes out otherwise"),
        ("{{ strftime_now('%d %b %Y') }}" + CHATML, "the day's date"),
        ("{{ raise_exception('never') }}", "refuses a plain conversation"),
        ((TEMPLATES / "mistral-v0.3.jinja").read_text(), "not where it was said"),
        (None, "no chat template"),
    ],
)
def test_what_cannot_be_said_is_refused(template: str | None, told: str) -> None:
    with pytest.raises(HalfbyteError, match=told) as caught:
        go_template(tokenizer_with(template))
    assert "\n" not in str(caught.value)


def test_that_spaces_stay_is_noted() -> None:
    stripping = CHATML.replace("{{ m.content }}", "{{ m.content | trim }}")
    (note,) = go_template(tokenizer_with(stripping)).notes
    assert "spaces" in note
    assert go_template(tokenizer_with(CHATML)).notes == ()


def test_a_late_system_message_is_left_out_where_the_template_would_put_it_elsewhere() -> None:
    tokenizer = tokenizer_with((TEMPLATES / "deepseek-v3.jinja").read_text())
    made = go_template(tokenizer)
    assert any("at the beginning alone" in note for note in made.notes)
    said = [("user", "a"), ("assistant", "b"), ("system", "LATE"), ("user", "c")]
    rendered = render_go(str(made), {"Messages": [{"Role": role, "Content": text} for role, text in said]})
    assert "LATE" not in rendered
    without = [{"role": role, "content": text} for role, text in said if role != "system"]
    assert rendered == render_chat(tokenizer, without, "", add_generation_prompt=True)
