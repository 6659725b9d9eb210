"""The demo's data set: what is committed is what the script writes, and the held-out rows are held out."""

import importlib.util
import json
import random
from pathlib import Path

import pytest

from halfbyte.config import FinetuneConfig, load_config
from halfbyte.data import encode_rows, read_rows

EXAMPLES = Path(__file__).parents[2] / "examples"
SPLITS = ["train.jsonl", "heldout.jsonl"]


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("make_requests", EXAMPLES / "make_requests.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read_split(name: str) -> tuple[list[str], list[dict]]:
    rows = [row.messages for row in read_rows(EXAMPLES / "requests" / name)]
    assert all([message["role"] for message in row] == ["system", "user", "assistant"] for row in rows)
    assert len({row[0]["content"] for row in rows}) == 1
    return [row[1]["content"] for row in rows], [json.loads(row[2]["content"]) for row in rows]


def test_the_script_writes_the_committed_files_byte_for_byte(script, tmp_path):
    random.seed(99)
    script.main(["--output_dir", str(tmp_path)])
    for name in SPLITS:
        assert (tmp_path / name).read_bytes() == (EXAMPLES / "requests" / name).read_bytes()


def test_another_seed_gives_other_rows(script, tmp_path):
    script.main(["--output_dir", str(tmp_path), "--seed", "1", "--train_rows", "50", "--heldout_rows", "20"])
    assert (tmp_path / "train.jsonl").read_text().count("\n") == 50
    assert (tmp_path / "heldout.jsonl").read_text().count("\n") == 20
    assert not set((tmp_path / "train.jsonl").read_text().split("\n")) & set(
        (EXAMPLES / "requests" / "train.jsonl").read_text().split("\n")[:50]
    ) - {""}


def test_the_held_out_rows_are_not_in_training_and_half_have_words_that_are_not():
    train_texts, train_records = read_split("train.jsonl")
    heldout_texts, heldout_records = read_split("heldout.jsonl")
    assert len(set(train_texts)) == len(train_texts) >= 600
    assert len(set(heldout_texts)) == len(heldout_texts) >= 100
    assert not set(train_texts) & set(heldout_texts)

    train_names = {record["name"] for record in train_records}
    train_flavours = {record["item"].rsplit(" ", 1)[0] for record in train_records}
    new_flavours = [r["item"].rsplit(" ", 1)[0] not in train_flavours for r in heldout_records]
    new_names = [r["name"] not in train_names for r in heldout_records]
    assert sum(new_flavours) >= len(heldout_records) / 4
    assert sum(new_names) >= len(heldout_records) / 6  # a quarter is drawn, and some of those give no name
    new_items = [record["item"] not in {r["item"] for r in train_records} for record in heldout_records]
    assert sum(new_items) >= len(heldout_records) / 2


@pytest.mark.parametrize("name", SPLITS)
def test_the_records_say_what_the_messages_do(script, name):
    texts, records = read_split(name)
    numbers = {"a": 1, "an": 1, "one": 1, "a couple of": 2, "half a dozen": 6, "a dozen": 12}
    numbers |= {word: number for number, word in enumerate(script.NUMBERS, start=2)}
    for text, record in zip(texts, records, strict=True):
        assert list(record) == ["action", "item", "quantity", "day", "name"]
        assert record["action"] in ("order", "change", "cancel", "ask")
        before, found, _ = text.partition(record["item"])
        assert found
        if record["quantity"] is not None:
            said = str(record["quantity"])
            words = [word for word, number in numbers.items() if number == record["quantity"]]
            assert before.lower().endswith(tuple(f" {word} " for word in [said, *words]))
        days = [word.strip(".,?!").lower() for word in text.split() if word.lower().strip(".,?!").endswith("day")]
        if record["day"] in (None, "tomorrow"):
            assert not days
        else:
            assert days == [record["day"]]
        assert ("tomorrow" in text) == (record["day"] == "tomorrow")
        assert record["name"] is None or record["name"] in text


def test_the_config_is_one_that_finetune_reads_and_the_rows_fit_it(smollm2_directory):
    from transformers import AutoTokenizer

    config = load_config(FinetuneConfig, EXAMPLES / "requests.yaml", {})
    tokenizer = AutoTokenizer.from_pretrained(smollm2_directory)
    for path in (config.dataset, config.eval_dataset):
        rows = read_rows(EXAMPLES.parent / path, config.dataset_format)
        _, statistics = encode_rows(tokenizer, rows, config.max_length)
        assert statistics.warnings() == []
        assert statistics.longest <= 110
