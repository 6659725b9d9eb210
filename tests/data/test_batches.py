"""Order, grouping and padding: every example once an epoch, the same on every machine, nothing unlearned."""

import random
from itertools import chain, pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from halfbyte.data import Example, collate, encode_rows, epoch_order, padded_share, plan_steps, training_steps
from halfbyte.data.rows import Row
from halfbyte.errors import HalfbyteError


def make_example(length: int, first: int = 10) -> Example:
    ids = torch.arange(first, first + length, dtype=torch.int32)
    labels = ids.clone()
    labels[: length // 2 + 1] = -100
    return Example(ids, labels)


ORDER_0_0 = [9, 4, 0, 7, 5, 3, 8, 2, 1, 6]


def test_the_order_is_the_same_on_every_machine_and_whatever_else_drew():
    # Written down: a change here breaks every resume.
    assert epoch_order(10, seed=0, epoch=0) == ORDER_0_0
    random.seed(1)
    torch.manual_seed(1)
    assert epoch_order(10, seed=0, epoch=0) == ORDER_0_0
    state = random.getstate(), torch.get_rng_state()
    epoch_order(10, seed=3, epoch=1)
    assert random.getstate() == state[0]
    assert torch.equal(torch.get_rng_state(), state[1])


@given(st.integers(0, 300), st.integers(), st.integers(0, 9))
def test_the_order_is_a_permutation(number_of_rows, seed, epoch):
    assert sorted(epoch_order(number_of_rows, seed, epoch)) == list(range(number_of_rows))


def test_every_seed_and_epoch_has_its_own_order():
    orders = {tuple(epoch_order(50, seed, epoch)) for seed in range(6) for epoch in range(6)}
    assert len(orders) == 36


def test_the_order_favours_no_row():
    # 400 orders of 8 rows: each row comes first about 50 times (standard deviation 6.6).
    first = [epoch_order(8, seed, 0)[0] for seed in range(400)]
    assert all(20 < first.count(row) < 80 for row in range(8))


lengths_strategy = st.lists(st.integers(1, 40), min_size=1, max_size=120)


@given(lengths_strategy, st.integers(1, 5), st.integers(1, 4), st.integers(0, 5), st.integers(0, 3))
def test_every_example_occurs_once_and_only_the_last_batches_are_short(lengths, size, accumulation, window, epoch):
    steps = plan_steps(lengths, 5, epoch, size, accumulation, window)
    batches = list(chain.from_iterable(steps))
    assert sorted(chain.from_iterable(batches)) == list(range(len(lengths)))
    assert len(batches) == -(-len(lengths) // size)
    assert all(len(batch) == size for batch in batches[:-1])
    assert all(len(step) == accumulation for step in steps[:-1])
    assert len(steps) == -(-len(batches) // accumulation)
    assert steps == plan_steps(lengths, 5, epoch, size, accumulation, window)


def test_without_a_window_the_batches_hold_the_shuffled_order():
    steps = plan_steps([7] * 20, 1, 2, 4, 1, length_window_steps=0)
    order = epoch_order(20, 1, 2)
    whole = {frozenset(order[i : i + 4]) for i in range(0, 20, 4)}
    assert {frozenset(batch) for step in steps for batch in step} == whole


def test_grouping_saves_padding_and_still_differs_between_epochs():
    rng = random.Random(0)
    lengths = [int(20 + 200 * rng.random() ** 2) for _ in range(1000)]
    loose = padded_share(lengths, plan_steps(lengths, 0, 0, 8, 2, 0))
    grouped = padded_share(lengths, plan_steps(lengths, 0, 0, 8, 2, 16))
    assert loose > 0.35
    assert grouped < 0.08
    # Sorted is only what shares a batch: in the first window (16 steps of 2) short and long batches are mixed.
    window = [batch for step in plan_steps(lengths, 0, 0, 8, 2, 16)[:16] for batch in step]
    means = [sum(lengths[i] for i in batch) for batch in window]
    rises = sum(after > before for before, after in pairwise(means))
    assert len(means) == 32
    assert 8 < rises < 23
    first, second = (plan_steps(lengths, 0, epoch, 8, 2, 16) for epoch in (0, 1))
    assert first != second


def test_the_padded_share_is_what_the_tensors_hold():
    examples = [make_example(length) for length in (3, 9, 4, 4, 7)]
    lengths = [len(example.input_ids) for example in examples]
    plan = plan_steps(lengths, 0, 0, 2, 2)
    masks = [batch["attention_mask"] for step in steps_of(examples) for batch in step]
    padding = sum(int((mask == 0).sum()) for mask in masks) / sum(mask.numel() for mask in masks)
    assert padded_share(lengths, plan) == pytest.approx(padding)
    assert padded_share([5, 5], [[[0, 1]]]) == 0


def test_a_batch_is_padded_on_the_right_and_says_so_in_the_mask():
    batch = collate([make_example(4), make_example(2, first=50)], pad_token_id=11)
    assert list(batch) == ["input_ids", "attention_mask", "position_ids", "labels"]
    assert all(tensor.shape == (2, 4) and tensor.dtype == torch.int64 for tensor in batch.values())
    assert batch["input_ids"].tolist() == [[10, 11, 12, 13], [50, 51, 11, 11]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, -100, -100, 13], [-100, -100, -100, -100]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3]] * 2
    assert collate([make_example(1), make_example(2)], None)["input_ids"].tolist() == [[10, 0], [10, 11]]


def test_padding_with_the_eos_does_not_unlearn_the_end(byte_level):
    tokenizer = byte_level()
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    rows = [
        Row([{"role": "user", "content": text}, {"role": "assistant", "content": text}], "a:1")
        for text in ("hello", "hello there how are you today")
    ]
    examples, statistics = encode_rows(tokenizer, rows, max_length=100)
    batch = collate(examples, tokenizer.pad_token_id)
    real_ends = (batch["labels"] == tokenizer.eos_token_id).sum(dim=1)
    assert real_ends.tolist() == [1, 1]
    assert int((batch["labels"] != -100).sum()) == statistics.supervised_tokens
    assert not ((batch["labels"] != -100) & (batch["attention_mask"] == 0)).any()
    assert not ((batch["labels"] != -100) & (batch["labels"] != batch["input_ids"])).any()


def steps_of(examples, start_step=0, **changes):
    settings = {"seed": 0, "epoch": 0, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    return list(training_steps(examples, pad_token_id=0, start_step=start_step, **settings | changes))


def test_a_resumed_epoch_repeats_and_skips_nothing():
    examples = [make_example(2 + i % 7, first=100 * i) for i in range(23)]
    whole = steps_of(examples, epoch=3)
    assert len(whole) == 6
    for done in range(7):
        rest = steps_of(examples, start_step=done, epoch=3)
        assert len(rest) == 6 - done
        for step, wanted in zip(rest, whole[done:], strict=True):
            for batch, wanted_batch in zip(step, wanted, strict=True):
                assert all(torch.equal(batch[name], wanted_batch[name]) for name in wanted_batch)


def test_wrong_settings_are_errors_at_the_call():
    examples = [make_example(3)] * 4
    with pytest.raises(HalfbyteError, match="cannot go on from step 3: an epoch of these data has 1 steps"):
        steps_of(examples, start_step=3)
    with pytest.raises(HalfbyteError, match="must be at least 1"):
        steps_of(examples, per_device_train_batch_size=0)
    with pytest.raises(HalfbyteError, match="must be at least 1"):
        steps_of(examples, gradient_accumulation_steps=0)
    with pytest.raises(HalfbyteError, match="there are no examples"):
        steps_of([])
