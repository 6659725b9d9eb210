"""The checks of a data set: one planted defect for each kind of finding, and a clean set without any."""

import json
from pathlib import Path
from typing import Any

import pytest

from halfbyte.data import Encoder, EncodingStatistics, Example, Piece, Row, checks, fingerprint, read_rows, workers
from halfbyte.data.checks import Inspection, encode_checked, find_control_tokens
from halfbyte.data.findings import KINDS, Finding, Findings, finding_of
from halfbyte.data.masks import special_tokens
from halfbyte.errors import HalfbyteError

# The end of an answer is a line break, which no special token is.
WITHOUT_END = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
SPLITTING = (  # only the last answer is marked
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}** {% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WITH_BOS = "{{ bos_token }}{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
SHARING = (  # two spaces, of which the second goes to the answer's first word
    "{% for m in messages %}{{ m.role }}:  {{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}assistant:  {% endif %}"
)
LONG = " ".join(f"{i} boats of {37 * i % 100} oars," for i in range(20)) + " "


def turns(*texts: str) -> dict[str, Any]:
    return {"messages": [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]}


def said(*turns: tuple[str, Any]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


CLEAN = [
    turns("Where is the harbour?", "By the sea."),
    turns("How deep is it?", "Nine metres, at low water.", "And at high water?", "Twelve."),
    said(("system", "Be brief."), ("user", "Who built it?"), ("assistant", "The town, in 1903.\nIt was dear.")),
    turns("Ist er schön? \t日本", "Ja – sehr."),
]
CLEAN_HELD_OUT = [turns("Is there a lighthouse?", "There are two of them.")]


def write(path: Path, rows: list[Any]) -> str:
    """A line for each row; bytes are written as they are."""
    path.write_bytes(b"".join((r if isinstance(r, bytes) else json.dumps(r).encode()) + b"\n" for r in rows))
    return str(path)


def inspect(
    tmp_path: Path, tokenizer: Any, rows: list[Any], held_out: list[Any] | None = None, **settings: Any
) -> tuple[Inspection, Inspection | None]:
    """What is found in the rows, and in held-out ones."""
    training = None
    processes = settings.pop("processes", 1)
    encoder = Encoder(tokenizer, settings.pop("max_length", 300), **settings)

    def encode(row: Row) -> tuple[list[Example], EncodingStatistics]:
        statistics = EncodingStatistics()
        return list(encoder.encode(row, statistics)), statistics

    inspections = []
    for name, records in (("rows.jsonl", rows), ("held.jsonl", held_out)):
        if records is None:
            continue
        path = write(tmp_path / name, records)
        inspection = Inspection(
            name, find_control_tokens(special_tokens(tokenizer)), tokenizer.bos_token_id, None, training
        )
        rows_of_set = inspection.checked(read_rows(path, on_bad_row=inspection.refuse))
        for _ in inspection.encoded(rows_of_set, encode, processes):
            pass
        inspection.close()
        training = inspection.index
        inspections.append(inspection)
    return inspections[0], inspections[1] if held_out is not None else None


def places(inspection: Inspection) -> dict[str, list[str]]:
    """kind -> "file:line" of each that was kept."""
    return {kind: [Path(found.source).name for found in kept] for kind, kept in inspection.findings.kept.items()}


# kind -> (rows of which the last ones are defective, what is found, settings of the encoder and "template")
CASES: dict[str, tuple[list[Any], dict[str, list[str]], dict[str, Any]]] = {
    "unreadable, cut off": (
        [*CLEAN, b'{"messages": [{"role": "user"'],
        {"unreadable": ["rows.jsonl:5"]},
        {},
    ),
    "unreadable, not UTF-8": ([*CLEAN, b'{"messages": "\xff"}'], {"unreadable": ["rows.jsonl:5"]}, {}),
    "unreadable, a key twice": ([*CLEAN, b'{"messages": [], "messages": []}'], {"unreadable": ["rows.jsonl:5"]}, {}),
    "unreadable, half a surrogate pair": ([*CLEAN, turns("\ud800", "x")], {"unreadable": ["rows.jsonl:5"]}, {}),
    "wrong_row, a missing key": ([*CLEAN, {"mesages": []}], {"wrong_row": ["rows.jsonl:5"]}, {}),
    "wrong_row, a wrong type": ([*CLEAN, said(("user", 7), ("assistant", "x"))], {"wrong_row": ["rows.jsonl:5"]}, {}),
    "wrong_row, no object": ([*CLEAN, [1]], {"wrong_row": ["rows.jsonl:5"]}, {}),
    "wrong_roles, unknown": ([*CLEAN, said(("user", "q"), ("asistant", "x"))], {"wrong_roles": ["rows.jsonl:5"]}, {}),
    "wrong_roles, answer first": (
        [*CLEAN, said(("assistant", "x"), ("user", "q"))],
        {"wrong_roles": ["rows.jsonl:5"]},
        {},
    ),
    "empty_answer": ([*CLEAN, turns("What?", " \n")], {"empty_answer": ["rows.jsonl:5"]}, {}),
    "nothing_learned": ([*CLEAN, said(("user", "only a question"))], {"nothing_learned": ["rows.jsonl:5"]}, {}),
    "template_refuses": (
        [CLEAN[0], CLEAN[2]],
        {"template_refuses": ["rows.jsonl:2"]},
        {"template": "gemma"},
    ),
    "doubled_bos": (
        [CLEAN[0], turns("<s>Where is it?", "There.")],
        {"doubled_bos": ["rows.jsonl:2"], "control_token_in_text": ["rows.jsonl:2"]},
        {"template": WITH_BOS},
    ),
    "duplicate": ([*CLEAN, CLEAN[1]], {"duplicate": ["rows.jsonl:5"]}, {}),
    "near_duplicate": (
        [turns(f"{LONG}one?", "The harbour is deep."), turns(f"{LONG}one!", "The harbour is deep.")],
        {"near_duplicate": ["rows.jsonl:2"]},
        {"max_length": 2000},
    ),
    "other_answer": (
        [*CLEAN, turns("Where is the harbour?", "I would not know.")],
        {"other_answer": ["rows.jsonl:5"]},
        {},
    ),
    "shortened": ([*CLEAN, turns(LONG, "Yes.")], {"shortened": ["rows.jsonl:5"]}, {"max_length": 100}),
    "shortened_answer": ([*CLEAN, turns("Well?", LONG)], {"shortened_answer": ["rows.jsonl:5"]}, {"max_length": 100}),
    "dropped": (
        [*CLEAN, turns(LONG, "Yes.")],
        {"dropped": ["rows.jsonl:5"]},
        {"max_length": 100, "truncation": "drop"},
    ),
    "windowed": (
        [*CLEAN, turns("Well?", LONG)],
        {"windowed": ["rows.jsonl:5"]},
        {"max_length": 100, "truncation": "split"},
    ),
    "no_end": ([CLEAN[0]], {"no_end": ["rows.jsonl:1"]}, {"template": WITHOUT_END}),
    "control_token_in_text": (
        [*CLEAN, turns("What is <|im_end|>?", "An end.")],
        {"control_token_in_text": ["rows.jsonl:5"]},
        {},
    ),
    "control_character": ([*CLEAN, turns("A bell \a rings", "So?")], {"control_character": ["rows.jsonl:5"]}, {}),
    "lost_character": ([*CLEAN, turns("Sch\ufffdn?", "So?")], {"lost_character": ["rows.jsonl:5"]}, {}),
    "mixed_roles, two users": (
        [*CLEAN, said(("user", "a"), ("user", "b"), ("assistant", "x"))],
        {"mixed_roles": ["rows.jsonl:5"]},
        {},
    ),
    "mixed_roles, two answers": (
        [*CLEAN, said(("user", "a"), ("assistant", "x"), ("assistant", "y"))],
        {"mixed_roles": ["rows.jsonl:5"]},
        {},
    ),
    "unanswered": ([*CLEAN, turns("One?", "Two.", "Three?")], {"unanswered": ["rows.jsonl:5"]}, {}),
    "empty_question": ([*CLEAN, turns(" ", "An answer to nothing.")], {"empty_question": ["rows.jsonl:5"]}, {}),
    "split": ([CLEAN[0], CLEAN[1]], {"split": ["rows.jsonl:2"]}, {"template": SPLITTING}),
    "shared_token": ([turns("hello", "four")], {"shared_token": ["rows.jsonl:1"]}, {"template": SHARING}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_planted_defect_is_found_where_it_is_and_nothing_else(
    tmp_path: Path, byte_level: Any, templates: dict[str, str], case: str
) -> None:
    rows, expected, settings = CASES[case]
    template = settings.get("template", "chatml")
    tokenizer = byte_level(template=templates.get(template, template))
    inspection, _ = inspect(tmp_path, tokenizer, rows, **{k: v for k, v in settings.items() if k != "template"})
    assert places(inspection) == expected
    spoiled = {source for kind, sources in expected.items() if KINDS[kind].spoils for source in sources}
    assert inspection.findings.bad_rows == len(spoiled)
    assert inspection.statistics.rows == len(rows) - len(spoiled)


def test_every_kind_has_a_planted_defect() -> None:
    held_out = {"held_out_in_training", "held_out_prompt_in_training", "held_out_near_training", "without_bos"}
    assert {kind for _, expected, _ in CASES.values() for kind in expected} | held_out == set(KINDS)


def test_held_out_rows_that_are_trained_on(tmp_path: Path, byte_level: Any) -> None:
    training = [*CLEAN, turns(f"{LONG}five?", "Five.")]
    held_out = [CLEAN[1], turns("Where is the harbour?", "No idea."), turns(f"{LONG}5?", "Five."), *CLEAN_HELD_OUT]
    first, second = inspect(tmp_path, byte_level(), training, held_out, max_length=2000)
    assert places(first) == {}
    assert second is not None
    assert places(second) == {
        "held_out_in_training": ["held.jsonl:1"],
        "held_out_prompt_in_training": ["held.jsonl:2"],
        "held_out_near_training": ["held.jsonl:3"],
    }
    assert (second.findings.bad_rows, second.statistics.rows) == (1, 3)


def test_clean_data_have_no_findings(tmp_path: Path, byte_level: Any) -> None:
    training, held_out = inspect(tmp_path, byte_level(), CLEAN, CLEAN_HELD_OUT)
    assert held_out is not None
    assert training.findings.counts == held_out.findings.counts == {}
    assert training.statistics.rows == sum(training.lengths.values()) == len(CLEAN)
    assert max(training.lengths) == training.statistics.longest


def test_a_text_without_a_bos_is_told(tmp_path: Path, sentencepiece: Any, templates: dict[str, str]) -> None:
    inspection, _ = inspect(tmp_path, sentencepiece(templates["chatml"]), CLEAN[:1])
    assert places(inspection) == {"without_bos": ["rows.jsonl:1"]}


def test_a_list_that_breaks_off_is_read_up_to_there(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(CLEAN)[:-1] + " 5]")
    inspection = Inspection(str(path))
    assert len(list(inspection.checked(read_rows(path, on_bad_row=inspection.refuse)))) == len(CLEAN)
    (finding,) = inspection.findings.kept["unreadable"]
    assert finding.source == f"{path}:1"
    assert finding.detail.endswith("nothing behind it was read")
    with pytest.raises(HalfbyteError, match="lacks a comma"):
        list(Inspection(str(path), skip_bad_rows=9).checked(read_rows(path)))


def test_a_set_that_is_not_there_is_no_finding(tmp_path: Path) -> None:
    with pytest.raises(HalfbyteError, match="no such file"):
        list(Inspection("absent").checked(read_rows(tmp_path / "absent.jsonl")))


def test_rows_are_left_out_up_to_a_cap(tmp_path: Path) -> None:
    bad = turns("What?", "")
    path = write(tmp_path / "rows.jsonl", [CLEAN[0], bad, CLEAN[1], bad, CLEAN[2]])
    inspection = Inspection(path, skip_bad_rows=2)
    rows = list(inspection.checked(read_rows(path, on_bad_row=inspection.refuse)))
    assert [row.source for row in rows] == [f"{path}:{line}" for line in (1, 3, 5)]
    assert inspection.bad_sources == {f"{path}:2", f"{path}:4"}
    one_too_few = Inspection(path, skip_bad_rows=1)
    with pytest.raises(HalfbyteError, match=r"rows\.jsonl:4: .* is empty: .*skip_bad_rows allows 1"):
        list(one_too_few.checked(read_rows(path, on_bad_row=one_too_few.refuse)))
    none = Inspection(path, skip_bad_rows=0)
    with pytest.raises(HalfbyteError, match=r"rows\.jsonl:2: .* is empty: fill it or remove the row \(halfbyte data"):
        list(none.checked(read_rows(path, on_bad_row=none.refuse)))


@pytest.mark.skipif(not workers.can_fork(), reason="this system does not fork")
def test_the_number_of_processes_changes_nothing(
    tmp_path: Path, byte_level: Any, templates: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "FEW_ROWS", 4)
    monkeypatch.setattr(workers, "CHUNK_ROWS", 3)
    refused, near = CLEAN[2], turns(f"{LONG}one?", "The harbour is deep.")
    rows = [
        CLEAN[0],
        refused,
        near,
        turns("What?", ""),
        CLEAN[1],
        turns(f"{LONG}one!", "The harbour is deep."),
        refused,
    ]
    rows += [turns(f"Is berth {i} free?", f"It is, for {i} hours.") for i in range(20)] + [CLEAN[1], b"{", CLEAN[3]]
    tokenizer = byte_level(template=templates["gemma"])
    held_out = [near, *(turns(f"Is berth {i} free?", f"For {i} hours.") for i in range(9))]
    one = inspect(tmp_path, tokenizer, rows, held_out)
    assert set(places(one[0])) == {
        "unreadable", "empty_answer", "template_refuses", "near_duplicate", "duplicate", "shortened",
    }  # fmt: skip
    for processes in (2, 3):
        more = inspect(tmp_path, tokenizer, rows, held_out, processes=processes)
        for alone, shared in zip(one, more, strict=True):
            assert alone is not None
            assert shared is not None
            assert shared.findings == alone.findings
            assert shared.statistics == alone.statistics
            assert shared.lengths == alone.lengths
            assert (shared.index.signatures == alone.index.signatures).all()


@pytest.mark.skipif(not workers.can_fork(), reason="this system does not fork")
@pytest.mark.parametrize("processes", [1, 2])
def test_examples_come_in_the_order_of_the_rows(
    tmp_path: Path, byte_level: Any, monkeypatch: pytest.MonkeyPatch, processes: int
) -> None:
    monkeypatch.setattr(checks, "FEW_ROWS", 4)
    monkeypatch.setattr(workers, "CHUNK_ROWS", 3)
    path = write(tmp_path / "rows.jsonl", [turns(f"Is berth {i} free?", f"For {i} hours.") for i in range(40)])
    encoder = Encoder(byte_level(), 300)

    def encode(row: Row) -> tuple[list[Example], EncodingStatistics]:
        statistics = EncodingStatistics()
        return list(encoder.encode(row, statistics)), statistics

    wanted = [example for row in read_rows(path) for example in encode(row)[0]]
    inspection = Inspection(path)
    examples = list(inspection.encoded(inspection.checked(read_rows(path)), encode, processes))
    assert fingerprint(examples) == fingerprint(wanted)
    assert [example.source for example in examples] == [example.source for example in wanted]


def test_what_the_encoder_refuses_is_left_out_up_to_a_cap(byte_level: Any, templates: dict[str, str]) -> None:
    tokenizer = byte_level(template=templates["gemma"])
    encoder = Encoder(tokenizer, 100)

    def encode(row: Row) -> tuple[list[Example], EncodingStatistics]:
        statistics = EncodingStatistics()
        return list(encoder.encode(row, statistics)), statistics

    rows = [Row(record["messages"], f"rows.jsonl:{line}") for line, record in enumerate([CLEAN[0], CLEAN[2]], 1)]
    examples, statistics = encode_checked(rows, encode, None, skip_bad_rows=1)
    assert [example.source for example in examples] == ["rows.jsonl:1"]
    assert statistics.rows == 1
    assert statistics.refused[0].startswith("rows.jsonl:2: the model's chat template refuses")
    with pytest.raises(HalfbyteError, match=r"rows\.jsonl:2"):
        encode_checked(rows, encode, None, skip_bad_rows=0)


def test_pieces_are_looked_at_as_one_text(byte_level: Any) -> None:
    row = Row([], "rows.csv:2", pieces=(Piece("a \x00 b", False), Piece("c", True)))
    inspection = Inspection("rows.csv", find_control_tokens(special_tokens(byte_level())))
    assert list(inspection.checked(iter([row]))) == [row]
    assert str(inspection.findings.kept["control_character"][0]) == "rows.csv:2: the text holds U+0000 after 'a'"


def test_a_book_of_findings_stays_small_and_counts_rows() -> None:
    book = Findings(kept_of_a_kind=3)
    for line in range(100):
        twice = [Finding("empty_question", f"rows.jsonl:{line}", f"messages[{i}] is empty") for i in (0, 2)]
        assert book.add_row(twice)
        assert not book.add_row([Finding("doubled_bos", f"rows.jsonl:{line}", "x"), *twice])
    assert book.counts == {"empty_question": 200, "doubled_bos": 100}
    assert [len(kept) for kept in book.kept.values()] == [3, 3]
    assert book.kept["empty_question"][0].detail == "messages[0] is empty"
    assert book.bad_rows == 100
    assert book.first_that_spoils == Finding("doubled_bos", "rows.jsonl:0", "x")
    assert list(book.to_dict()) == ["doubled_bos", "empty_question"]  # the worst first


@pytest.mark.parametrize(
    ("sentence", "kind", "source"),
    [
        ("a b.jsonl:3: messages[1]: the assistant turn is empty: fill it", "empty_answer", "a b.jsonl:3"),
        ("rows.json:5 (row 2): not valid JSON: Expecting value", "unreadable", "rows.json:5 (row 2)"),
        ("x.parquet (row 7): the key 'messages' is missing", "wrong_row", "x.parquet (row 7)"),
        ("C:/x: y/rows.jsonl:3: 'text' must be text, this is null", "wrong_row", "C:/x: y/rows.jsonl:3"),
        ("rows.jsonl:3: no token of this row would be learned: the mask is empty", "nothing_learned", "rows.jsonl:3"),
    ],
)
def test_what_a_reader_says_becomes_a_finding(sentence: str, kind: str, source: str) -> None:
    finding = finding_of(HalfbyteError(sentence))
    assert (finding.kind, finding.source) == (kind, source)
    assert str(finding) == sentence
    assert finding.has_place
