"""Length, counts and errors of encoding."""

import pytest
import torch
from chat_layouts import alpaca_row

from halfbyte.data import IGNORE_INDEX, Example, Row, encode_rows, fingerprint
from halfbyte.errors import HalfbyteError


def chat(*turns: str, source: str = "rows.jsonl:7") -> Row:
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]
    return Row(messages, source)


LONG = "hello there " * 20


def test_an_example_is_int32_and_nothing_predicts_its_first_token(byte_level):
    tokenizer = byte_level(template=None)
    rows = [alpaca_row("hello", "", "four", line=1)]
    (example,), statistics = encode_rows(tokenizer, rows, max_length=500, train_on_source=True)
    assert example.input_ids.dtype == example.labels.dtype == torch.int32
    assert example.labels[0] == IGNORE_INDEX
    assert example.supervised_tokens == len(example.input_ids) - 1 == statistics.supervised_tokens
    assert example.source == "rows.jsonl:1"


def test_the_statistics_count_what_is_there(byte_level):
    tokenizer = byte_level()
    examples, statistics = encode_rows(tokenizer, [chat("hello", "four"), chat(LONG, "five six")], max_length=500)
    assert statistics.rows == statistics.examples == len(examples) == 2
    assert statistics.tokens == sum(len(example.input_ids) for example in examples)
    assert statistics.supervised_tokens == sum(example.supervised_tokens for example in examples)
    assert statistics.longest == max(len(example.input_ids) for example in examples)
    assert statistics.truncated == 0


def test_a_long_prompt_loses_its_beginning_and_the_answer_stays_whole(byte_level):
    tokenizer = byte_level()
    (whole,), _ = encode_rows(tokenizer, [chat(LONG, "four five")], max_length=500)
    (cut,), statistics = encode_rows(tokenizer, [chat(LONG, "four five")], max_length=30)
    assert len(cut.input_ids) == 30
    # The line break after the end token is not learned, so it goes before anything of the prompt does.
    assert torch.equal(cut.input_ids, whole.input_ids[-31:-1])
    assert cut.supervised_tokens == whole.supervised_tokens
    assert cut.labels[-1] == tokenizer.eos_token_id
    assert (statistics.truncated, statistics.truncated_supervised_tokens) == (1, 0)
    assert statistics.truncated_tokens == len(whole.input_ids) - 30
    assert statistics.longest == len(whole.input_ids)
    assert "1 of 1 examples were cut to max_length" in statistics.warnings()[0]


def test_a_cut_example_keeps_its_bos(byte_level, templates):
    tokenizer = byte_level(template=templates["llama3"], bos_token="<|begin_of_text|>")
    (whole,), _ = encode_rows(tokenizer, [chat(LONG, "four five")], max_length=500)
    (cut,), statistics = encode_rows(tokenizer, [chat(LONG, "four five")], max_length=30)
    assert cut.input_ids[0] == tokenizer.bos_token_id
    assert torch.equal(cut.input_ids[1:], whole.input_ids[-29:])
    assert statistics.truncated_tokens == len(whole.input_ids) - 30


def test_what_follows_the_last_answer_goes_first(byte_level):
    tokenizer = byte_level()
    (whole,), _ = encode_rows(tokenizer, [chat("hello", "four", LONG)], max_length=500)
    supervised = whole.supervised_tokens
    (cut,), statistics = encode_rows(tokenizer, [chat("hello", "four", LONG)], max_length=40)
    assert torch.equal(cut.input_ids, whole.input_ids[:40])
    assert cut.supervised_tokens == supervised
    assert statistics.truncated_supervised_tokens == 0


def test_an_answer_too_long_keeps_its_end_and_the_loss_is_counted(byte_level):
    tokenizer = byte_level()
    (whole,), _ = encode_rows(tokenizer, [chat("hello", LONG)], max_length=500)
    (cut,), statistics = encode_rows(tokenizer, [chat("hello", LONG)], max_length=20)
    assert len(cut.input_ids) == 20
    assert cut.labels[-1] == tokenizer.eos_token_id
    assert cut.supervised_tokens == 19
    assert statistics.truncated_supervised_tokens == whole.supervised_tokens - 19
    assert f"{whole.supervised_tokens - 19} of which were to be learned" in statistics.warnings()[0]


@pytest.mark.parametrize("max_length", [2, 3, 7, 8, 9, 40, 41])
def test_no_example_is_ever_longer_than_max_length_nor_empty(byte_level, max_length):
    rows = [chat(LONG, "four"), chat("hello", LONG), chat("hello", "four", LONG, LONG, "well")]
    for example in encode_rows(byte_level(), rows, max_length=max_length)[0]:
        assert len(example.input_ids) <= max_length
        assert example.supervised_tokens > 0


def test_settings_that_leave_nothing_to_learn_are_errors(byte_level):
    with pytest.raises(HalfbyteError, match="max_length is 1"):
        encode_rows(byte_level(), [chat("hello", "four")], max_length=1)
    with pytest.raises(HalfbyteError, match="there are no rows"):
        encode_rows(byte_level(), [], max_length=10)


def test_a_mask_that_comes_out_empty_is_an_error_with_the_line(byte_level):
    # A tokenizer whose offsets say nothing is the way this happens in practice.
    tokenizer = byte_level()

    class Blind:
        chat_template, bos_token_id, eos_token, eos_token_id = "x", None, None, None
        bos_token, added_tokens_decoder = None, tokenizer.added_tokens_decoder
        apply_chat_template = tokenizer.apply_chat_template

        def __call__(self, text, **options):
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            return {"input_ids": ids, "offset_mapping": [(0, 0)] * len(ids)}

    with pytest.raises(HalfbyteError, match=r"a\.jsonl:9: .*the mask is empty"):
        encode_rows(Blind(), [chat("hello", "four"), chat("hello", "four", source="a.jsonl:9")][1:], max_length=50)


def test_a_tokenizer_without_offsets_is_an_error(byte_level):
    tokenizer = byte_level()

    class Slow:
        def __getattr__(self, name):
            return getattr(tokenizer, name)

        def __call__(self, text, **options):
            if not options.get("return_offsets_mapping"):
                return tokenizer(text, **options)
            raise NotImplementedError("return_offset_mapping is not available when using Python tokenizers")

    with pytest.raises(HalfbyteError, match="does not tell where its tokens lie"):
        encode_rows(Slow(), [chat("hello", "four")], max_length=50)


def test_the_fingerprint_notices_every_change():
    def example(ids, labels):
        return Example(torch.tensor(ids, dtype=torch.int32), torch.tensor(labels, dtype=torch.int32))

    first, second = example([1, 2, 3], [-100, -100, 3]), example([1, 2], [-100, 2])
    same = fingerprint([first, second])
    assert same == fingerprint([example([1, 2, 3], [-100, -100, 3]), second])
    others = [
        [second, first],
        [first],
        [example([1, 2, 3], [-100, 2, 3]), second],
        [example([1, 2, 4], [-100, -100, 3]), second],
        [first, second, second],
    ]
    assert same not in {fingerprint(other) for other in others}
    # The same numbers in a row, but other examples.
    assert fingerprint([example([1, 2], [3, 4])]) != fingerprint([example([1], [2]), example([3], [4])])
