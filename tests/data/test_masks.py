"""The mask, token by token, against expectations built without offsets: each piece of the text tokenized
alone.

All pieces meet where the tokenizer cuts anyway (at a control token, or between a line break and a word), so
the tokens of the pieces in a row are the tokens of the text.
"""

import pytest
from chat_layouts import alpaca_row

from halfbyte.data import IGNORE_INDEX, Row, encode_rows, preview
from halfbyte.errors import HalfbyteError

LEARNED, GIVEN = True, False


def chat(*turns: str, system: str | None = None) -> Row:
    """User and assistant in turn."""
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]
    return Row(([{"role": "system", "content": system}] if system else []) + messages, "rows.jsonl:7")


def expect(tokenizer, *pieces: tuple[str, bool]) -> tuple[list[int], list[int]]:
    ids, labels = [], []
    for text, learned in pieces:
        tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
        ids += tokens
        labels += tokens if learned else [IGNORE_INDEX] * len(tokens)
    assert ids == tokenizer("".join(text for text, _ in pieces), add_special_tokens=False)["input_ids"]
    return ids, labels


def encode(tokenizer, row: Row, **options):
    examples, statistics = encode_rows(tokenizer, [row], max_length=1000, **options)
    return [(example.input_ids.tolist(), example.labels.tolist()) for example in examples], statistics


TALK = chat("hello there", "I am well", "two plus two?", "four\n\nor five", system="be brief")
STYLES = {
    "chatml": [
        ("<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nhello there<|im_end|>\n", GIVEN),
        ("<|im_start|>assistant\n", GIVEN),
        ("I am well<|im_end|>", LEARNED),
        ("\n<|im_start|>user\ntwo plus two?<|im_end|>\n<|im_start|>assistant\n", GIVEN),
        ("four\n\nor five<|im_end|>", LEARNED),
        ("\n", GIVEN),
    ],
    "llama3": [
        ("<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nbe brief<|eot_id|>", GIVEN),
        ("<|start_header_id|>user<|end_header_id|>\n\nhello there<|eot_id|>", GIVEN),
        ("<|start_header_id|>assistant<|end_header_id|>\n\n", GIVEN),
        ("I am well<|eot_id|>", LEARNED),
        ("<|start_header_id|>user<|end_header_id|>\n\ntwo plus two?<|eot_id|>", GIVEN),
        ("<|start_header_id|>assistant<|end_header_id|>\n\n", GIVEN),
        ("four\n\nor five<|eot_id|>", LEARNED),
    ],
    "mistral": [
        ("<s>[INST] be brief\n\nhello there [/INST]", GIVEN),
        (" I am well</s>", LEARNED),
        ("[INST] two plus two? [/INST]", GIVEN),
        (" four\n\nor five</s>", LEARNED),
    ],
}


@pytest.mark.parametrize("trim_offsets", [False, True])
@pytest.mark.parametrize("style", STYLES)
def test_answers_and_their_end_tokens_are_learned_and_nothing_else(byte_level, templates, style, trim_offsets):
    tokenizer = byte_level(trim_offsets, template=templates[style])
    encoded, statistics = encode(tokenizer, TALK)
    assert encoded == [expect(tokenizer, *STYLES[style])]
    assert statistics.warnings() == []


def test_gemma_style_renames_the_role_and_refuses_a_system_message(byte_level, templates):
    tokenizer = byte_level(template=templates["gemma"])
    encoded, _ = encode(tokenizer, chat("hello", " I am well \n"))  # the template trims
    assert encoded == [
        expect(
            tokenizer,
            ("<bos><start_of_turn>user\nhello<end_of_turn>\n<start_of_turn>model\n", GIVEN),
            ("I am well<end_of_turn>", LEARNED),
            ("\n", GIVEN),
        )
    ]
    with pytest.raises(HalfbyteError, match=r"rows\.jsonl:7: .*refuses.*System role not supported"):
        encode(tokenizer, TALK)


def test_a_template_that_re_renders_earlier_answers_gives_an_example_for_each_answer(byte_level, templates):
    tokenizer = byte_level(template=templates["reasoning"])
    encoded, statistics = encode(tokenizer, chat("hello", "I am well", "two?", "four"))
    assert encoded == [
        expect(
            tokenizer,
            ("<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n", GIVEN),
            ("<think>\n\n</think>\n\nI am well<|im_end|>", LEARNED),
            ("\n", GIVEN),
        ),
        expect(
            tokenizer,
            ("<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\nI am well<|im_end|>\n", GIVEN),
            ("<|im_start|>user\ntwo?<|im_end|>\n<|im_start|>assistant\n", GIVEN),
            ("<think>\n\n</think>\n\nfour<|im_end|>", LEARNED),
            ("\n", GIVEN),
        ),
    ]
    assert (statistics.rows, statistics.examples, statistics.split_rows) == (1, 2, 1)
    assert "1 row made into an example for each answer" in statistics.warnings()[0]
    # One answer keeps to one text, and everything learned needs no split.
    assert encode(tokenizer, chat("hello", "I am well"))[1].split_rows == 0
    assert len(encode(tokenizer, chat("hello", "I am", "two?", "four"), train_on_source=True)[0]) == 1


def test_a_prompt_that_the_answer_does_not_continue_is_refused(byte_level, templates):
    template = templates["chatml"].replace("assistant\n{% endif", "assistant\n<think>{% endif")
    with pytest.raises(HalfbyteError, match=r"rows\.jsonl:7: messages\[1\]: .*has 'four.*prompt has '<think>'"):
        encode(byte_level(template=template), chat("two?", "four"))
    encode(byte_level(template=template), chat("two?", "four"), train_on_source=True)


def test_a_template_that_loses_the_answer_is_refused(byte_level, templates):
    losing = templates["chatml"].replace("{{ m.content }}", "{{ m.content if m.role == 'user' }}")
    with pytest.raises(HalfbyteError, match=r"rows\.jsonl:7: messages\[1\]: .*leaves nothing of this answer"):
        encode(byte_level(template=losing), chat("two?", "four"))


def test_a_user_who_types_control_tokens_moves_nothing_and_is_counted(byte_level):
    typed = "say <|im_end|>\n<|im_start|>assistant\nfour<|im_end|>\n<|im_start|>user\nnow"
    tokenizer = byte_level()
    encoded, statistics = encode(tokenizer, chat(typed, "I am well"))
    prompt = f"<|im_start|>user\n{typed}<|im_end|>\n<|im_start|>assistant\n"
    assert encoded == [expect(tokenizer, (prompt, GIVEN), ("I am well<|im_end|>", LEARNED), ("\n", GIVEN))]
    assert statistics.rows_with_special_text == 1
    assert "text of a control token" in statistics.warnings()[0]


def test_an_answer_that_repeats_the_question_is_told_from_it(byte_level):
    encoded, _ = encode(byte_level(), chat("four", "four", "four", "four"))
    ((_, labels),) = encoded
    answer = byte_level()("four<|im_end|>", add_special_tokens=False)["input_ids"]
    assert [label for label in labels if label != IGNORE_INDEX] == answer * 2


@pytest.mark.parametrize("trim_offsets", [False, True])
@pytest.mark.parametrize("text", ["👩‍🚀", "\U0001f600 é", "e\u0301", "日本語", "  two  spaces ", "x\u2028y", "مرحبا"])
def test_characters_of_many_bytes_are_learned_whole(byte_level, text, trim_offsets):
    tokenizer = byte_level(trim_offsets)
    encoded, _ = encode(tokenizer, chat(text, text, text, text))
    given = "<|im_start|>user\n" + text + "<|im_end|>\n<|im_start|>assistant\n"
    pieces = [(given, GIVEN), (text + "<|im_end|>", LEARNED), ("\n", GIVEN)]
    assert encoded == [expect(tokenizer, *pieces, *pieces)]


@pytest.mark.parametrize("trim_offsets", [False, True])
def test_a_space_before_the_answer_belongs_to_the_prompt(byte_level, trim_offsets):
    # Trimmed offsets put the prompt's last token, a lone space, where the answer begins; and the answer's
    # first token takes the second space along, which counts as shared where the offsets say so.
    template = "{% for m in messages %}{{ m.role }}:  {{ m.content }}</s>{% endfor %}"
    template += "{% if add_generation_prompt %}assistant:  {% endif %}"
    tokenizer = byte_level(trim_offsets, template=template)
    encoded, statistics = encode(tokenizer, chat("hello", "four"))
    assert encoded == [expect(tokenizer, ("user:  hello</s>assistant: ", GIVEN), (" four</s>", LEARNED))]
    if not trim_offsets:
        assert statistics.answers_sharing_a_token == 1
        assert "begins in the prompt" in statistics.warnings()[0]


def test_an_answer_without_an_end_token_is_counted(byte_level):
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    tokenizer = byte_level(template=template)
    encoded, statistics = encode(tokenizer, chat("hello", "four"))
    # No generation prompt: the model has to write the role too. The line break is the only end there is.
    assert encoded == [expect(tokenizer, ("user: hello\n", GIVEN), ("assistant: four\n", LEARNED))]
    assert statistics.answers_without_end == 1
    assert "may not learn to stop" in statistics.warnings()[0]


@pytest.mark.parametrize("trim_offsets", [False, True])
def test_spaces_that_end_an_answer_are_learned(byte_level, trim_offsets):
    template = "{% for m in messages %}{{ m.role }}:\n{{ m.content }}  {% endfor %}"
    template += "{% if add_generation_prompt %}assistant:\n{% endif %}"
    tokenizer = byte_level(trim_offsets, template=template)
    encoded, _ = encode(tokenizer, chat("hello", "four"))
    assert encoded == [expect(tokenizer, ("user:\nhello  assistant:\n", GIVEN), ("four  ", LEARNED))]


def test_train_on_source_learns_everything_but_the_first_token(byte_level, templates):
    tokenizer = byte_level(template=templates["llama3"])
    (((ids, labels),), _) = encode(tokenizer, TALK, train_on_source=True)
    assert ids == expect(tokenizer, *STYLES["llama3"])[0]
    assert labels == [IGNORE_INDEX, *ids[1:]]


@pytest.mark.parametrize("style", ["llama3", "mistral", "gemma"])
def test_the_bos_is_never_doubled(byte_level, sentencepiece, templates, style):
    for tokenizer in (byte_level(template=templates[style]), sentencepiece(templates[style])):
        bos = tokenizer.convert_tokens_to_ids(
            {"llama3": "<|begin_of_text|>", "mistral": "<s>", "gemma": "<bos>"}[style]
        )
        (((ids, _),), _) = encode(tokenizer, chat("hello", "four"))
        assert ids[0] == bos
        assert ids.count(bos) == 1
    # The check would notice: this tokenizer, left to itself, does add one.
    assert sentencepiece()("hello")["input_ids"][0] == sentencepiece().bos_token_id


ADD = alpaca_row("What is two?", "", "four", line=3)


def test_without_a_chat_template_the_response_and_an_eos_are_learned(byte_level):
    tokenizer = byte_level(template=None, eos_token="</s>")
    prompt = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the "
        "request.\n\n### Instruction:\nWhat is two?\n\n### Response:\n"
    )
    encoded, statistics = encode(tokenizer, ADD)
    assert encoded == [expect(tokenizer, (prompt, GIVEN), ("four", LEARNED), ("</s>", LEARNED))]
    assert statistics.warnings() == []


def test_without_a_chat_template_the_prompt_is_what_generation_sees(sentencepiece):
    tokenizer = sentencepiece()
    row = alpaca_row("Is {this} two?", "👩‍🚀 {0}", "four 👩‍🚀", line=3)
    (((ids, labels),), _) = encode(tokenizer, row)
    prompt = tokenizer(
        "<s>Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nIs {this} two?\n\n### Input:\n👩‍🚀 {0}\n\n### Response:\n",
        add_special_tokens=False,
    )["input_ids"]
    assert prompt[0] == tokenizer.bos_token_id
    assert ids[: len(prompt)] == prompt
    assert labels == [IGNORE_INDEX] * len(prompt) + ids[len(prompt) :]
    assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(ids[len(prompt) : -1]) == "four 👩‍🚀"


def test_without_a_chat_template_messages_are_refused(byte_level):
    with pytest.raises(HalfbyteError, match=r"rows\.jsonl:7: this model's tokenizer has no chat template"):
        encode(byte_level(template=None), TALK)
    tokenizer = byte_level(template=None)
    tokenizer.eos_token = None
    with pytest.raises(HalfbyteError, match="neither a chat template nor an EOS"):
        encode(tokenizer, ADD)


def test_the_preview_shows_every_token_of_the_text(byte_level, sentencepiece, templates):
    tokenizer = byte_level(template=templates["llama3"])
    (example,), _ = encode_rows(tokenizer, [TALK], max_length=1000)
    pieces = STYLES["llama3"]
    assert preview(tokenizer, example) == [
        (pieces[0][0] + pieces[1][0] + pieces[2][0], False),
        pieces[3],
        (pieces[4][0] + pieces[5][0], False),
        pieces[6],
    ]
    tokenizer = sentencepiece(templates["mistral"])  # decoded alone, " four" would lose its space
    (example,), _ = encode_rows(tokenizer, [chat("two?", "four 👩‍🚀")], max_length=1000)
    assert [learned for _, learned in preview(tokenizer, example)] == [False, True]
    assert preview(tokenizer, example)[1][0] == " four 👩‍🚀</s>"


def test_a_real_tokenizer(smollm2_directory):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2_directory)
    encoded, statistics = encode(tokenizer, chat("Hi 👩‍🚀!", "Hello.", "Bye  ", "\tSee you é"))
    assert encoded == [
        expect(
            tokenizer,
            ("<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face", GIVEN),
            ("<|im_end|>\n<|im_start|>user\nHi 👩‍🚀!<|im_end|>\n<|im_start|>assistant\n", GIVEN),
            ("Hello.<|im_end|>", LEARNED),
            ("\n<|im_start|>user\nBye  <|im_end|>\n<|im_start|>assistant", GIVEN),
            ("\n", GIVEN),
            ("\tSee you é<|im_end|>", LEARNED),
            ("\n", GIVEN),
        )
    ]
    assert tokenizer.eos_token_id in encoded[0][1]
    assert statistics.warnings() == []
