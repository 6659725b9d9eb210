"""Every template, of the package and in the styles of models, times every conversation and every format: each token's
label against what chat_layouts.py has written down by hand."""

import json
from copy import deepcopy
from functools import cache, partial
from pathlib import Path

import pytest
from chat_layouts import (
    CONVERSATIONS,
    GIVEN,
    LAYOUTS,
    LEARNED,
    TOOLS,
    alpaca_row,
    chat,
    expect,
    give_template,
    give_tokens,
    im_header,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from conftest import build_byte_level, build_sentencepiece
from halfbyte.data import NAMED_TEMPLATES, Piece, Row, encode_prompt, encode_rows, preview, read_rows, set_chat_template
from halfbyte.data.masks import turn_end_ids
from halfbyte.errors import HalfbyteError


@pytest.fixture(scope="session")
def prepared(request):
    """Tokenizers by kind and template, made once: reading a real one takes a while.  Not to be changed."""

    @cache
    def build(kind: str, name: str):
        if kind == "smollm2":
            tokenizer = AutoTokenizer.from_pretrained(request.getfixturevalue("smollm2_directory"))
        else:
            tokenizer = build_byte_level(trim_offsets=kind == "trimmed", template=None)
        give_template(give_tokens(tokenizer, LAYOUTS[name].bos, LAYOUTS[name].eos), name)
        return tokenizer

    return build


@pytest.fixture(params=["byte_level", "trimmed", "smollm2"])
def tokenizer_for(request, prepared):
    return partial(prepared, request.param)


def encode(tokenizer, row: Row, **options):
    examples, statistics = encode_rows(tokenizer, [row], max_length=100_000, **options)
    return [(example.input_ids.tolist(), example.labels.tolist()) for example in examples], statistics


def conversation_row(name: str) -> Row:
    return Row(CONVERSATIONS[name], "rows.jsonl:7", tools=TOOLS if name == "tools" else None)


def test_the_layouts_are_those_of_the_package_and_of_thirteen_families_of_models():
    assert set(NAMED_TEMPLATES) < set(LAYOUTS)
    files = {path.stem for path in (Path(__file__).parent / "templates").iterdir()}
    assert files == set(LAYOUTS) - set(NAMED_TEMPLATES)


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_token_of_every_conversation_has_the_label_it_should(tokenizer_for, name, conversation):
    tokenizer, layout = tokenizer_for(name), LAYOUTS[name]
    row = conversation_row(conversation)
    if conversation in layout.refuses:
        with pytest.raises(HalfbyteError, match=r"^rows\.jsonl:7: the model's chat template (refuses|passes over)"):
            encode(tokenizer, row)
        return
    encoded, statistics = encode(tokenizer, row)
    pieces = layout.expected(row.messages)
    assert encoded == [expect(tokenizer, text) for text in pieces]
    assert statistics.answers_without_end == statistics.without_bos == 0
    assert statistics.supervised_tokens == sum(label != -100 for _, labels in encoded for label in labels) > 0
    for ids, labels in encoded:
        assert labels[-1] != -100 or labels[-2] != -100 or conversation == "no last answer"  # the end is learned
        if layout.bos is not None:
            assert ids[0] == tokenizer.bos_token_id != ids[1]


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_last_turn_alone_or_everything_is_learned_where_that_is_asked_for(tokenizer_for, name):
    tokenizer, layout = tokenizer_for(name), LAYOUTS[name]
    messages = CONVERSATIONS["many turns"]
    encoded, _ = encode(tokenizer, Row(messages, "rows.jsonl:7"), train_on_last_turn=True)
    assert encoded == [expect(tokenizer, layout.write(messages, {len(messages) - 1}))]
    (((ids, labels),), _) = encode(tokenizer, Row(messages, "rows.jsonl:7"), train_on_source=True)
    assert labels == [-100, *ids[1:]]
    if "tools" not in layout.refuses:  # the call of a tool is on the way to the answer
        encoded, _ = encode(tokenizer, conversation_row("tools"), train_on_last_turn=True)
        assert encoded == [expect(tokenizer, text) for text in layout.expected(CONVERSATIONS["tools"])]


TALK = CONVERSATIONS["many turns"]
SPEAKERS = {"user": ("human", "<human>", "Human"), "assistant": ("gpt", "<bot>", "Assistant")}
FORMATS = {
    "messages": {"messages": TALK},
    "sharegpt": {"conversations": [{"from": SPEAKERS[m["role"]][0], "value": m["content"]} for m in TALK]},
    "prompt-completion": {"prompt": TALK[:1], "completion": TALK[1:2]},
    "hh-rlhf": {"chosen": "".join(f"\n\n{SPEAKERS[m['role']][2]}: {m['content']}" for m in TALK[:2])},
    "chip2": {"text": "\n".join(f"{SPEAKERS[m['role']][1]}: {m['content']}" for m in TALK[:2])},
    "alpaca": {"instruction": "hello there", "input": "", "output": "I am well"},
}


@pytest.mark.parametrize("dataset_format", FORMATS)
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_format_in_every_template(tokenizer_for, name, dataset_format, tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps(FORMATS[dataset_format]) + "\n")
    (row,) = read_rows(tmp_path / "rows.jsonl", dataset_format)
    said = TALK if dataset_format in ("messages", "sharegpt") else TALK[:2]
    encoded, _ = encode(tokenizer_for(name), row)
    assert encoded == [expect(tokenizer_for(name), text) for text in LAYOUTS[name].expected(said)]


TEXTS = {
    "prompt-completion": ({"prompt": "two plus two?", "completion": " four"}, [("two plus two?", 0), (" four", 1)]),
    "self-instruct": ({"prompt": "two plus two?\n", "completion": "four"}, [("two plus two?\n", 0), ("four", 1)]),
    "input-output": ({"input": "", "output": "four  "}, [("four  ", 1)]),
    "text": ({"text": "  four five\n"}, [("  four five\n", 1)]),
    "oasst1": ({"text": "### Human: two?### Assistant: four"}, [("### Human: two?### Assistant: four", 1)]),
}


@pytest.mark.parametrize("template", [None, "zephyr"])
@pytest.mark.parametrize("dataset_format", TEXTS)
def test_texts_laid_out_by_their_author_are_used_word_for_word(dataset_format, template, tmp_path):
    record, pieces = TEXTS[dataset_format]
    (tmp_path / "rows.jsonl").write_text(json.dumps(record) + "\n")
    (row,) = read_rows(tmp_path / "rows.jsonl", dataset_format)
    tokenizer = give_tokens(build_byte_level(template=None), "<s>", "</s>")
    set_chat_template(tokenizer, template)
    encoded, statistics = encode(tokenizer, row)
    assert encoded == [expect(tokenizer, [("<s>", GIVEN), *pieces, ("</s>", LEARNED)])]
    assert (statistics.rows_of_text, statistics.warnings()) == (1, [])


@pytest.mark.parametrize("text", ["<s>four</s>", "<s>four</s>\n", "four</s>", "<s>four"])
def test_a_bos_and_an_eos_that_the_author_wrote_are_not_doubled(text, tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": text}) + "\n")
    (row,) = read_rows(tmp_path / "rows.jsonl", "text")
    tokenizer = give_tokens(build_byte_level(template=None), "<s>", "</s>")
    (((ids, labels),), _) = encode(tokenizer, row)
    assert ids.count(tokenizer.bos_token_id) == ids.count(tokenizer.eos_token_id) == 1
    assert ids[0] == tokenizer.bos_token_id
    assert labels[1:] == ids[1:]


@pytest.mark.parametrize("name", ["alpaca", "llama-2", "mistral", "vicuna", "zephyr", "guanaco"])
@pytest.mark.parametrize("conversation", [name for name in CONVERSATIONS if name != "tools"])
def test_a_sentencepiece_vocabulary_as_llama_2s(name, conversation):
    tokenizer = build_sentencepiece()
    set_chat_template(tokenizer, name)
    encoded, _ = encode(tokenizer, conversation_row(conversation))
    assert encoded == [expect(tokenizer, text) for text in LAYOUTS[name].expected(CONVERSATIONS[conversation])]


def test_the_two_classic_alpaca_prompts_with_a_template_and_without(byte_level):
    without_input = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nadd {0}\n\n### Response:\n"
    )
    with_input = (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request."
        "\n\n### Instruction:\nadd {0}\n\n### Input:\n1 and 2\n\n### Response:\n"
    )
    for given_template in (None, "alpaca"):
        tokenizer = byte_level(template=None, eos_token="</s>")
        set_chat_template(tokenizer, given_template)
        for context, prompt in (("", without_input), ("1 and 2", with_input)):
            row = alpaca_row("add {0}", context, "3")
            encoded, statistics = encode(tokenizer, row)
            assert encoded == [expect(tokenizer, [(prompt, GIVEN), ("3</s>", LEARNED)])]
            assert encode_prompt(tokenizer, row) == (tokenizer(prompt, add_special_tokens=False)["input_ids"], "3")
            assert statistics.rows_in_alpaca_prompt == (given_template is None)


@pytest.mark.parametrize("name", LAYOUTS)
def test_generation_stops_where_an_answer_was_learned_to_end(tokenizer_for, name):
    tokenizer = tokenizer_for(name)
    ((_, labels),), _ = encode(tokenizer, conversation_row("one turn"))
    ends = turn_end_ids(tokenizer)
    assert [label for label in labels if label in tokenizer.added_tokens_decoder] == ends[::-1] != []
    if name in NAMED_TEMPLATES:
        assert ends == [tokenizer.eos_token_id]


# ── The system prompt ───────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", [name for name in LAYOUTS if "system" not in LAYOUTS[name].refuses])
def test_a_system_prompt_is_as_if_the_rows_had_it_and_stays_with_the_tokenizer(tokenizer_for, name, tmp_path):
    tokenizer, layout = deepcopy(tokenizer_for(name)), LAYOUTS[name]
    prompt = 'Be "brief", {{ now }}; {% raw %}\\n é 👩‍🚀'
    set_chat_template(tokenizer, None, prompt)
    tokenizer.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    for conversation in ("one turn", "many turns"):
        row = conversation_row(conversation)
        encoded, _ = encode(tokenizer, row)
        messages = [{"role": "system", "content": prompt}, *row.messages]
        assert encoded == [expect(tokenizer, text) for text in layout.expected(messages)]
    own = conversation_row("system")
    assert encode(tokenizer, own)[0] == [expect(tokenizer, text) for text in layout.expected(own.messages)]


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=30))
def test_any_text_can_be_a_system_prompt(prompt):
    tokenizer = build_byte_level(template="{% for m in messages %}\n  {{ m.content }}|{% endfor %}")
    set_chat_template(tokenizer, None, prompt)
    rendered = tokenizer.apply_chat_template(chat("a"), tokenize=False)
    assert rendered == tokenizer.apply_chat_template(chat("a", system=prompt), tokenize=False)
    assert rendered == f"  {prompt}|  a|"


# ── What templates are refused for ──────────────────────────────────────────────────────────────────────────────────


def test_a_template_is_ours_or_a_file(byte_level, tmp_path):
    tokenizer = byte_level()
    file = tmp_path / "mine.jinja"
    for text, sentence in (
        ("", r"mine\.jinja is empty"),
        ("\n{% for m in messages %}{{ m.content }}", r"mine\.jinja:2: not a Jinja template: "),
        ("{{ raise_exception('no') }}{% endif %}", r"mine\.jinja:1: not a Jinja template: "),
    ):
        file.write_text(text)
        with pytest.raises(HalfbyteError, match=sentence):
            set_chat_template(tokenizer, str(file))
    file.write_bytes(b"\xff")
    with pytest.raises(HalfbyteError, match="not UTF-8"):
        set_chat_template(tokenizer, str(file))
    with pytest.raises(HalfbyteError, match="cannot be read"):
        set_chat_template(tokenizer, str(tmp_path))
    for name, sentence in (("lama-2", "did you mean llama-2"), ("nothing_of_the_kind", "name one of alpaca, chatml")):
        with pytest.raises(HalfbyteError, match=sentence):
            set_chat_template(tokenizer, name)
    file.write_text("{% for m in messages %}{{ m.role }}:{{ m.content }}</s>{% endfor %}")
    set_chat_template(tokenizer, str(file))
    assert encode(tokenizer, conversation_row("one turn"))[0] == [
        expect(tokenizer, [("user:hello there</s>", GIVEN), ("assistant:I am well</s>", LEARNED)])
    ]


def test_a_template_of_ours_needs_the_tokens_that_it_is_made_of(sentencepiece, byte_level):
    with pytest.raises(HalfbyteError, match=r"chat_template phi-3 .* does not have \(<\|system\|>\).* \(alpaca, "):
        set_chat_template(byte_level(), "phi-3")
    tokenizer = byte_level(template=None, eos_token="</s>")
    set_chat_template(tokenizer, "chatml")
    assert tokenizer.eos_token == "<|im_end|>"  # so that every program stops there
    tokenizer = byte_level(template=None)
    tokenizer.eos_token = None
    with pytest.raises(HalfbyteError, match="EOS"):
        set_chat_template(tokenizer, "zephyr")
    with pytest.raises(HalfbyteError, match="system_prompt needs a chat template"):
        set_chat_template(sentencepiece(), None, "be brief")


def test_nothing_of_a_row_is_passed_over_in_silence(tokenizer_for):
    tools = CONVERSATIONS["tools"]
    thought = [*chat("How warm?"), {"role": "assistant", "content": "20", "reasoning_content": "a city"}]
    cases = {
        ("smollm2", "tools"): Row(chat("a", "b"), "r:1", tools=TOOLS),
        ("smollm2", "'tool_calls'"): Row([tools[0], tools[1] | {"content": "wait"}, *tools[2:]], "r:1"),
        ("smollm2", "'reasoning_content'"): Row(thought, "r:1"),
    }
    for (name, what), row in cases.items():
        with pytest.raises(HalfbyteError, match=f"^r:1: the model's chat template passes over {what}"):
            encode(tokenizer_for(name), row)
    deaf = deepcopy(tokenizer_for("deepseek-v3"))
    deaf.chat_template = deaf.chat_template.replace("message.role == 'tool' %}", "false %}")
    with pytest.raises(HalfbyteError, match="passes over messages of the role 'tool'"):
        encode(deaf, Row(tools, "r:1"))
    reasoned = [*thought, *chat("two?"), thought[1] | {"content": "four"}]
    encoded, _ = encode(tokenizer_for("qwen3"), Row(reasoned, "r:1"))
    assert encoded == [expect(tokenizer_for("qwen3"), text) for text in LAYOUTS["qwen3"].expected(reasoned)]


def test_calls_without_a_list_of_tools_are_learned_where_the_template_writes_them(tokenizer_for):
    tokenizer = tokenizer_for("deepseek-v3")
    encoded, _ = encode(tokenizer, Row(CONVERSATIONS["tools"], "r:1"))
    call = (
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n"
        '{"city": "Paris"}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜></s>'
    )
    pieces = [
        ("<s><｜User｜>How warm is Paris?<｜Assistant｜>", GIVEN),
        (call, LEARNED),
        ("<｜tool▁output▁begin｜>20<｜tool▁output▁end｜><｜Assistant｜>", GIVEN),
        ("20 degrees</s>", LEARNED),
    ]
    assert encoded == [expect(tokenizer, pieces)]


def test_a_template_that_forgets_the_bos_is_counted(byte_level):
    tokenizer = give_tokens(byte_level(template=None), "<s>", "</s>")
    tokenizer.chat_template = LAYOUTS_WITHOUT_BOS
    _, statistics = encode(tokenizer, conversation_row("one turn"))
    assert statistics.without_bos == 1
    assert "without a BOS" in statistics.warnings()[0]
    # A template of ours writes it where the tokenizer would, and only there.
    plain = byte_level(template=None, eos_token="</s>")
    set_chat_template(plain, "zephyr")
    (((ids, _),), _) = encode(plain, conversation_row("one turn"))
    assert plain.bos_token_id not in ids


LAYOUTS_WITHOUT_BOS = "{% for m in messages %}{{ m.role }}:{{ m.content }}</s>{% endfor %}"


def test_the_prompt_to_answer_is_the_one_that_was_learned_from(tokenizer_for):
    for name in ("qwen3", "phi-3.5", "llama-2"):
        tokenizer = tokenizer_for(name)
        row = conversation_row("many turns")
        ids, labels = encode(tokenizer, row)[0][-1]
        prompt, answer = encode_prompt(tokenizer, row)
        assert (ids[: len(prompt)], answer) == (prompt, "four")
        assert labels[len(prompt) - 1] == -100 != labels[len(prompt)]
    with pytest.raises(HalfbyteError, match="no prompt to answer"):
        encode_prompt(tokenizer, Row([], "r:1", pieces=(Piece("four", True),)))


def test_the_preview_marks_the_answers(tokenizer_for):
    tokenizer = tokenizer_for("chatml")
    (example,), _ = encode_rows(tokenizer, [conversation_row("one turn")], max_length=1000)
    head = im_header("user") + "hello there<|im_end|>\n" + im_header("assistant")
    assert preview(tokenizer, example) == [(head, False), ("I am well<|im_end|>", True), ("\n", False)]
