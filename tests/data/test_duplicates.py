"""Rows that are there before: word for word, nearly, with another answer, and among the training rows."""

import random

import numpy as np

from halfbyte.data import Piece, Row
from halfbyte.data.duplicates import NEAR, SIGNATURE_BYTES, RowIndex, TrainedOn, signature

SYLLABLES = ("ka", "lo", "mi", "ne", "pu", "ra", "so", "ti", "vex", "gan", "dor", "fi", "hul", "jo", "bern", "zas")
WORDS = [a + b + c for a in SYLLABLES for b in SYLLABLES for c in SYLLABLES]


def words(seed: int, number: int = 80) -> list[str]:
    return random.Random(seed).choices(WORDS, k=number)


def chat(question: str, answer: str, line: int, system: str = "") -> Row:
    messages = [{"role": "system", "content": system}] if system else []
    messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return Row(messages, f"rows.jsonl:{line}")


def index_of(*rows: Row, near: bool = True) -> RowIndex:
    index = RowIndex(near)
    for row in rows:
        index.add(row)
    return index


def pieces_of(text: str) -> set[bytes]:
    data = " ".join(text.lower().split()).encode()
    return {data[i : i + 8] for i in range(len(data) - 7)}


def test_signatures_agree_as_much_as_the_sets_of_pieces_overlap() -> None:
    """The estimate of 200 pairs, against Jaccard computed by its definition."""
    errors = []
    for seed in range(200):
        one = words(seed)
        other = [word if random.Random(seed + i).random() < seed / 200 else "other" for i, word in enumerate(one)]
        a, b = pieces_of(" ".join(one)), pieces_of(" ".join(other))
        overlap = len(a & b) / len(a | b)
        agree = (signature(" ".join(one)) == signature(" ".join(other))).mean()
        errors.append(agree - overlap)
    # The standard deviation of 64 draws is at most 0.0625; of 200 pairs' mean it is a fourteenth of that.
    assert abs(np.mean(errors)) < 0.015
    assert np.std(errors) < 0.0625


def test_a_signature_heeds_neither_case_nor_space_and_takes_any_text() -> None:
    assert (signature("Hello  THERE\n you") == signature("hello there you")).all()
    for text in ("", "a", "日本語", "x" * 200_000, "\ud800"):
        assert signature(text).shape == (SIGNATURE_BYTES,)
    assert (signature("abc") == signature("abd")).sum() < NEAR / 2


def test_each_repetition_is_told_once_and_by_its_nearest_kind() -> None:
    text = words(1)
    changed = [*text[:40], "changed", *text[41:]]
    index = index_of(
        chat("one", " ".join(words(2)), 1),
        chat("two", " ".join(text), 2),
        chat("one", " ".join(words(2)) + " ", 3),  # white space at the ends makes no other row
        chat("two", " ".join(words(4)), 4),
        chat("two and", " ".join(changed), 5),
        chat("six", " ".join(words(3)), 6),
    )
    assert list(index.repetitions()) == [
        ("duplicate", "rows.jsonl:3", "rows.jsonl:1"),
        ("other_answer", "rows.jsonl:4", "rows.jsonl:2"),
        ("near_duplicate", "rows.jsonl:5", "rows.jsonl:2"),
    ]


def test_without_nearness_only_equal_rows_are_told() -> None:
    text = words(1)
    index = index_of(
        chat("a", " ".join(text), 1), chat("b", " ".join(text), 2), chat("a", " ".join(text), 3), near=False
    )
    assert list(index.repetitions()) == [("duplicate", "rows.jsonl:3", "rows.jsonl:1")]


def test_a_long_system_message_does_not_make_rows_alike() -> None:
    rules = " ".join(words(9, 500))
    rows = [chat(f"question {' '.join(words(i, 4))}", " ".join(words(i + 100, 4)), i, rules) for i in range(20)]
    assert list(index_of(*rows).repetitions()) == []


def test_rows_without_anything_alike_are_not_told() -> None:
    rows = [chat(" ".join(words(i, 20)), " ".join(words(i + 5000)), i) for i in range(500)]
    assert list(index_of(*rows).repetitions()) == []
    assert list(RowIndex().repetitions()) == []


def test_a_row_that_a_mix_takes_twice_is_no_repetition_of_itself() -> None:
    row = chat("one", "two", 1)
    assert list(index_of(row, row).repetitions()) == []


def test_texts_laid_out_by_their_author_are_compared_too() -> None:
    def text(prompt: str, answer: str, line: int) -> Row:
        return Row([], f"rows.csv:{line}", pieces=(Piece(prompt, False), Piece(answer, True)))

    index = index_of(text("a", "b", 1), text("a", "b", 2), text("a", "c", 3))
    assert [(kind, source) for kind, source, _ in index.repetitions()] == [
        ("duplicate", "rows.csv:2"),
        ("other_answer", "rows.csv:3"),
    ]


def test_texts_of_one_piece_have_no_question_in_common() -> None:
    rows = [Row([], f"a.txt:{line}", pieces=(Piece(" ".join(words(line)), True),)) for line in range(5)]
    assert list(index_of(*rows).repetitions()) == []


def test_places_come_back_as_they_were() -> None:
    sources = ["a.jsonl:7", "a 3.json:5 (row 2)", "b.parquet (row 12)", "the prompt", "a.jsonl:8"]
    index = RowIndex()
    for source in sources:
        index.add(Row([{"role": "user", "content": source}, {"role": "assistant", "content": source}], source))
    assert [index.source(i) for i in range(len(index))] == sources


def test_held_out_rows_are_found_among_the_training_rows() -> None:
    text = words(4)
    training = index_of(chat("one", "two", 1), chat("three", "four", 2), chat("five", " ".join(text), 3))
    trained_on = TrainedOn(training)
    assert trained_on.find(chat("three", "four", 9)) == ("held_out_in_training", "rows.jsonl:2")
    assert trained_on.find(chat("three", "5", 9)) == ("held_out_prompt_in_training", "rows.jsonl:2")
    assert trained_on.find(chat("seven", "four", 9)) is None
    assert TrainedOn(RowIndex()).find(chat("one", "two", 1)) is None
    near = chat("5", " ".join([*text[:10], "changed", *text[11:]]), 21)
    nearer = chat("5!", " ".join([*text[:10], "changed", *text[11:]]), 22)  # nearly the held-out row before it
    held_out = index_of(chat("eight", " ".join(words(8)), 20), near, nearer)
    assert list(training.near_rows_of(held_out)) == [
        ("rows.jsonl:21", "rows.jsonl:3"),
        ("rows.jsonl:22", "rows.jsonl:3"),
    ]


def test_a_row_takes_some_hundred_bytes() -> None:
    index = index_of(*(chat(f"q{i}", "a" * 1000, i) for i in range(300)))
    kept = sum(
        len(part) * size
        for part, size in (
            (index._wholes, 8),
            (index._prompts, 8),
            (index._places, 8),
            (index._signatures, 1),
        )
    )
    assert kept / len(index) == 8 + 8 + 24 + SIGNATURE_BYTES
