"""The arithmetic of a run's memory: parts that add up, moments, and what to change when it does not fit."""

from dataclasses import replace
from typing import Any

import pytest

from halfbyte.ops.linear_cross_entropy.cpu import CHUNK_BYTES
from halfbyte.plan import LOGITS_BYTES, Footprint, Plan, Settings, advise, most_tokens, optimizer_bytes, smallest_budget

MEGABYTE = 1_000_000


def plan(budget: float = 1e12, mapped: int = 0, **changes: Any) -> Plan:
    """A model of 500 MB with a million trained values of rank 16; 1,024 tokens of at most 0.8 MB."""
    footprint = Footprint(
        quantized_bytes=400 * MEGABYTE,
        remainder_bytes=100 * MEGABYTE,
        largest_tensor_bytes=20 * MEGABYTE,
        adapter_sizes=(800_000, 200_000),
        adapter_rank=16,
        layers=9,
        vocabulary=32_000,
        activation_bytes={"none": 800_000.0, "elementwise": 500_000.0, "full": 100_000.0},
        process_bytes=300 * MEGABYTE,
        threads=2,
        mapped_bytes=mapped,
    )
    values: dict[str, Any] = {
        "rows": 4,
        "accumulation": 2,
        "length": 256,
        "level": "none",
        "state_bits": 32,
        "paged": False,
        "rank": 16,
        "evaluated_length": 256,
    }
    return Plan(footprint, Settings(**values | changes), int(budget))


def test_the_parts_are_what_their_sizes_say() -> None:
    parts = plan().parts()
    assert parts["process"] == 300 * MEGABYTE
    assert (parts["4-bit weights"], parts["16-bit remainder"]) == (400 * MEGABYTE, 100 * MEGABYTE)
    assert parts["adapters"] == parts["gradients"] == 4 * MEGABYTE
    assert parts["optimizer state"] == 8 * MEGABYTE
    assert parts["activations"] == 1024 * 800_000
    assert plan().peak_bytes == sum(parts.values())
    assert plan().peak_moment == "a training step"


def test_the_logits_are_a_chunk_and_the_chunk_is_the_one_that_the_loss_takes() -> None:
    assert LOGITS_BYTES == CHUNK_BYTES
    many, few = (plan(rows=1, length=length).parts()["temporaries"] for length in (4096, 4))
    assert many - few == LOGITS_BYTES - 2 * 4 * 32_000


def test_inputs_of_layers_elsewhere() -> None:
    """At level full a token keeps 300 KB, of which two layers' working is 125: the rest is what may lie elsewhere."""
    footprint = replace(plan().footprint, activation_bytes={"none": 800_000.0, "full": 300_000.0})
    in_memory, disk, eight = (
        replace(plan(level="full", offloading=kind), footprint=footprint) for kind in ("none", "disk", "8bit")
    )
    inputs = 1024 * 175_000
    assert disk.peak_bytes == in_memory.peak_bytes
    assert disk.least_bytes == max(in_memory.least_bytes - inputs, disk.moments()["loading the model"])
    assert in_memory.peak_bytes - eight.peak_bytes == pytest.approx(inputs * (1 - (1 + 4 / 256) / 2), abs=1)
    assert in_memory.with_settings(level="none").parts() == disk.with_settings(level="none").parts()
    fit = [most_tokens(replace(p, budget_bytes=2_000 * MEGABYTE))["full"] for p in (in_memory, eight, disk)]
    assert fit[0] < fit[1] < fit[2]
    for tried, tokens in zip((in_memory, eight, disk), fit, strict=True):
        tried = replace(tried, budget_bytes=2_000 * MEGABYTE)
        assert tried.with_settings(rows=1, length=tokens - 1).fits
        assert not tried.with_settings(rows=1, length=tokens + 2).fits


def test_the_optimizer_is_counted_as_it_keeps_its_state() -> None:
    assert optimizer_bytes((4096, 4095), 32) == 8 * 8191
    assert optimizer_bytes((4096, 4095), 8) == 2 * (4096 + 4 * 16) + 8 * 4095  # the smaller one stays in 32 bits
    assert optimizer_bytes((), 32) == 0


def test_paged_state_is_there_as_long_as_there_is_room() -> None:
    unpaged, paged = plan(), plan(paged=True)
    assert paged.peak_bytes == unpaged.peak_bytes == unpaged.least_bytes
    assert paged.least_bytes == unpaged.least_bytes - 8 * MEGABYTE


def test_mapped_weights_are_there_as_long_as_there_is_room() -> None:
    copied, mapped = plan(), plan(mapped=450 * MEGABYTE)
    assert mapped.peak_bytes == copied.peak_bytes
    assert mapped.least_bytes == copied.least_bytes - 450 * MEGABYTE
    assert plan(mapped.least_bytes, mapped=450 * MEGABYTE).fits
    assert not plan(mapped.least_bytes - 1, mapped=450 * MEGABYTE).fits
    assert plan(copied.least_bytes, mapped=450 * MEGABYTE).stays
    assert not plan(copied.least_bytes - 1, mapped=450 * MEGABYTE).stays


def test_nothing_is_recomputed_less_for_the_room_that_mapped_weights_could_leave() -> None:
    kept = plan(mapped=450 * MEGABYTE)
    assert plan(kept.peak_bytes, mapped=450 * MEGABYTE).at_fastest_level().settings.level == "none"
    assert plan(kept.peak_bytes - 1, mapped=450 * MEGABYTE).at_fastest_level().settings.level == "elementwise"
    smallest = plan(kept.with_settings(level="full").least_bytes, mapped=450 * MEGABYTE).at_fastest_level()
    assert (smallest.settings.level, smallest.fits, smallest.stays) == ("full", True, False)


def test_a_mapped_model_is_loaded_without_a_copy() -> None:
    moments = (plan(mapped=size).moments()["loading the model"] for size in (0, 450 * MEGABYTE))
    assert next(moments) - next(moments) == 2 * 20 * MEGABYTE


@pytest.mark.parametrize("paged", [False, True])
def test_the_budget_for_activations_is_what_they_may_be(paged: bool) -> None:
    tight = plan(2000 * MEGABYTE, paged=paged)
    exactly = plan(tight.budget_bytes - tight.activation_budget + tight.parts()["activations"], paged=paged)
    assert exactly.stays
    assert not plan(exactly.budget_bytes - 1, paged=paged).stays


def test_adapters_are_in_proportion_to_their_rank() -> None:
    assert plan(rank=4).parts()["adapters"] == MEGABYTE


def test_loading_is_the_peak_of_a_run_with_next_to_no_tokens() -> None:
    small = plan(rows=1, length=2, level="full")
    assert small.peak_moment == "loading the model"
    assert small.peak_bytes == (300 + 400 + 100 + 2 * 20) * MEGABYTE


def test_an_evaluation_keeps_one_layer_and_no_gradients() -> None:
    moments = plan(level="full", evaluated_rows=8).moments()
    parts = plan(level="full").parts()
    layer = (800_000 - 100_000) / 8
    assert moments["an evaluation"] == sum(parts.values()) - parts["gradients"] - parts["activations"] + round(
        layer * 8 * 256
    )
    assert "an evaluation" not in plan().moments()


def test_the_fastest_level_that_fits_is_taken() -> None:
    for level in ("none", "elementwise", "full"):
        enough = plan(level=level).peak_bytes
        assert plan(enough).at_fastest_level().settings.level == level
    assert plan(1).at_fastest_level().settings.level == "full"
    assert not plan(1).at_fastest_level().fits


def test_no_advice_for_what_fits_or_never_will() -> None:
    assert advise(plan()) is None
    assert advise(plan(500 * MEGABYTE)) is None


@pytest.mark.parametrize(
    ("less_than", "changes"),
    [
        ({}, {"gradient_checkpointing": "auto"}),
        ({"level": "full"}, {"gradient_checkpointing": "auto", "optim": "adamw_8bit"}),
        ({"level": "full", "state_bits": 8}, {"gradient_checkpointing": "auto", "optim": "paged_adamw_8bit"}),
        (
            {"level": "full", "state_bits": 8, "paged": True},
            {"per_device_train_batch_size": "2", "gradient_accumulation_steps": "4"},
        ),
        (
            {"level": "full", "state_bits": 8, "paged": True, "rows": 1, "accumulation": 8},
            {"per_device_train_batch_size": "1", "gradient_accumulation_steps": "8", "max_length": "192"},
        ),
    ],
)
def test_what_harms_least_is_changed_first(less_than: dict[str, Any], changes: dict[str, str]) -> None:
    advice = advise(plan(plan(**less_than).least_bytes - 1))
    assert advice is not None
    assert advice.plan.fits
    assert changes.items() <= advice.changes.items()
    expected_keys = {"gradient_checkpointing", *changes} | ({"optim"} if len(changes) > 1 else set())
    assert advice.changes.keys() == expected_keys


def test_a_step_has_as_many_rows_whatever_a_pass_has() -> None:
    tight = plan(rows=6, accumulation=1, level="full", paged=True)
    advice = advise(plan(tight.least_bytes - 1, rows=6, accumulation=1, level="full", paged=True))
    assert advice is not None
    assert advice.changes == {"per_device_train_batch_size": "3", "gradient_accumulation_steps": "2"}


def test_held_out_rows_go_in_smaller_passes_before_anything_is_changed_that_counts() -> None:
    large = {"rows": 1, "level": "full", "evaluated_rows": 64}
    budget = plan(**large).moments()["a training step"] + 30 * MEGABYTE
    assert budget < plan(**large).peak_bytes
    advice = advise(plan(budget, **large))
    assert advice is not None
    assert advice.changes == {"per_device_eval_batch_size": "2"}


def test_the_smallest_budget_is_one_in_which_it_fits() -> None:
    least = smallest_budget(plan(1))
    assert plan(least).at_fastest_level().fits
    assert not plan(least - 1).at_fastest_level().fits


def test_the_most_tokens_fit_and_one_more_does_not() -> None:
    for level, tokens in most_tokens(plan(2000 * MEGABYTE)).items():
        assert tokens > 500
        assert plan(2000 * MEGABYTE, level=level, rows=1, length=tokens).fits
        assert not plan(2000 * MEGABYTE, level=level, rows=1, length=tokens + 1).fits
    assert most_tokens(plan(1)) == {"none": 0, "elementwise": 0, "full": 0}
