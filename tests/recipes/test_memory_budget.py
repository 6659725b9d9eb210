"""What a run recomputes and why, and that it goes on when memory runs out."""

import json
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from halfbyte import FinetuneConfig, HalfbyteError, load_model
from halfbyte.huggingface import offload
from halfbyte.huggingface.mapped import mapped_bytes
from halfbyte.recipes import memory, training
from halfbyte.recipes.memory import limits_of_control_groups
from halfbyte.recipes.quantize import quantize
from models import save_model
from runs import adapter_bytes, configure, metrics_of, run, write_rows

CPU_SAYS = "[enforce fail at alloc_cpu.cpp:128] err == 0. DefaultCPUAllocator: can't allocate memory"


@pytest.fixture
def config(model_directory: Callable[[str], Path], tmp_path: Path) -> Callable[..., FinetuneConfig]:
    rows = write_rows(tmp_path / "rows.jsonl")
    return lambda name="run", **changes: configure(
        model_directory("llama"), rows, tmp_path / name, **{"max_steps": 3, "save_steps": None} | changes
    )


def told(settings: FinetuneConfig) -> dict[str, Any]:
    return json.loads((Path(settings.output_dir) / "run.json").read_text())["recomputation"]


def fail_above(rows: int, error: Exception, monkeypatch: pytest.MonkeyPatch, calls: range = range(1000)) -> None:
    """Let a pass of more rows find no memory, in those of its calls that are named."""
    original, seen = training.supervised_loss, []

    def supervised_loss(model: Any, batch: Any) -> Any:
        seen.append(1)
        loss = original(model, batch)
        if len(batch["input_ids"]) > rows and len(seen) - 1 in calls:
            raise error
        return loss

    monkeypatch.setattr(training, "supervised_loss", supervised_loss)


@pytest.mark.parametrize(("value", "level"), [("auto", "none"), (True, "full"), (False, "none")])
def test_the_level_is_told(
    config: Callable[..., FinetuneConfig], value: Any, level: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    apart: list[int] = []
    monkeypatch.setattr(memory, "keep_large_tensors_apart", lambda: apart.append(1))
    settings = config(gradient_checkpointing=value)
    _, said = run(settings)
    assert f"recomputation: {level} (activations of " in said
    assert (told(settings)["level"], told(settings)["rows"], told(settings)["events"]) == (level, 2, [])
    assert bool(apart) == (level == "full")


APART = """
import torch
from pathlib import Path
from halfbyte.recipes.memory import keep_large_tensors_apart

def in_heap(tensor):
    (heap,) = [line.split()[0] for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith("[heap]")]
    first, last = (int(address, 16) for address in heap.split("-"))
    return first <= tensor.data_ptr() < last

del (freed := [torch.empty(30 << 20, dtype=torch.uint8)])[:]  # from now on glibc takes what is smaller from the heap
before = in_heap(torch.empty(4 << 20, dtype=torch.uint8))
keep_large_tensors_apart()
print(before, in_heap(torch.empty(4 << 20, dtype=torch.uint8)))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the heap is glibc's")
def test_large_tensors_lie_outside_the_heap() -> None:
    ran = subprocess.run([sys.executable, "-c", APART], capture_output=True, text=True, check=False)
    assert ran.stdout.split() == ["True", "False"], ran.stderr


def test_auto_recomputes_as_far_as_the_budget_asks_and_the_numbers_stay(
    config: Callable[..., FinetuneConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    def with_spare(name: str, spare: float) -> tuple[bytes, dict[str, Any], str]:
        monkeypatch.setattr(memory, "_spare_bytes", lambda *_: spare + fixed)
        _, said = run(config(name, over_budget="try"))
        return adapter_bytes(Path(config(name).output_dir)), told(config(name)), said

    fixed = 0.0
    roomy, kept, _ = with_spare("roomy", 1e9)
    assert kept["level"] == "none"
    fixed = 1e9 - kept["budget_bytes"]
    some, fewer, _ = with_spare("some", kept["activation_bytes"] - 1)
    tight, least, said = with_spare("tight", 1)
    assert (fewer["level"], least["level"]) == ("elementwise", "full")
    assert least["activation_bytes"] < fewer["activation_bytes"] < kept["activation_bytes"]
    assert "this may not fit" in said
    assert some == tight == roomy


def test_mapped_weights_are_not_there_to_spare(
    config: Callable[..., FinetuneConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "_spare_bytes", lambda *_: 1e9)
    large = save_model(tmp_path / "16-bit", "llama", hidden_size=256, intermediate_size=2100, head_dim=64)
    quantize(str(large), str(tmp_path / "4-bit"))
    budgets = {}
    for name, plans in (("planned", True), ("measured", False)):
        with monkeypatch.context() as patch:
            if not plans:
                patch.setattr("halfbyte.recipes.finetune.make_plan", lambda *_: None)
            for kind in ("16-bit", "4-bit"):
                run(config(f"{name}-{kind}", model_name_or_path=str(tmp_path / kind)))
                budgets[name, kind] = told(config(f"{name}-{kind}"))["budget_bytes"]
    mapped = mapped_bytes(load_model(str(tmp_path / "4-bit"))[0])
    assert mapped > 1e6
    # A copy is in memory when what is left is asked for, and pages are not.
    assert budgets["measured", "16-bit"] - budgets["measured", "4-bit"] == mapped
    assert budgets["planned", "16-bit"] == pytest.approx(budgets["planned", "4-bit"], abs=1e6)


def test_max_memory_is_the_budget(config: Callable[..., FinetuneConfig]) -> None:
    run(config("small", max_memory="100MB", over_budget="try"))  # less than Python takes
    run(config("large", max_memory="64 GiB"))
    assert told(config("small"))["level"] == "full"
    assert told(config("large"))["level"] == "none"
    assert 50 << 30 < told(config("large"))["budget_bytes"] < 64 << 30


@pytest.mark.parametrize(
    "error",
    [MemoryError(), RuntimeError(CPU_SAYS), torch.OutOfMemoryError("CUDA out of memory")],
    ids=lambda e: str(e)[:9],
)
def test_a_step_that_finds_no_memory_is_taken_again_in_smaller_passes(
    config: Callable[..., FinetuneConfig], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    settings = {"lora_dropout": 0.0, "compute_dtype": "float32", "per_device_train_batch_size": 4}
    run(config("undisturbed", **settings))
    fail_above(2, error, monkeypatch)
    _, said = run(config(**settings))
    assert "memory ran out; the step is taken again with 2 of 4 rows in a pass" in said
    assert told(config())["rows"] == 2
    assert len(told(config())["events"]) == 1
    mine, expected = (metrics_of(Path(config(name).output_dir)) for name in ("run", "undisturbed"))
    for key in ("loss", "grad_norm"):
        assert [line[key] for line in mine] == pytest.approx([line[key] for line in expected], rel=1e-3)
    for key in ("tokens", "supervised_tokens"):
        assert [line[key] for line in mine] == [line[key] for line in expected]


def test_with_one_row_in_a_pass_more_is_recomputed_and_the_bits_are_the_same(
    config: Callable[..., FinetuneConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With dropout: the random state of the step's beginning is restored, and no gradient is left of the attempt."""
    settings = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "lora_dropout": 0.3}
    run(config("undisturbed", **settings))
    fail_above(0, MemoryError(), monkeypatch, range(6, 7))  # the third pass of the second step
    _, said = run(config(**settings))
    assert "the step is taken again with recomputation: elementwise" in said
    assert told(config())["level"] == "elementwise"
    assert adapter_bytes(Path(config().output_dir)) == adapter_bytes(Path(config("undisturbed").output_dir))


def test_when_nothing_is_left_to_do_a_person_is_told(
    config: Callable[..., FinetuneConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_above(0, MemoryError(), monkeypatch)
    with pytest.raises(HalfbyteError, match=r"step 1: memory ran out with a single row .* lower max_length"):
        run(config())


def test_another_error_is_not_taken_for_a_lack_of_memory(
    config: Callable[..., FinetuneConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_above(0, RuntimeError("shapes differ"), monkeypatch)
    with pytest.raises(RuntimeError, match="shapes differ"):
        run(config())


def test_layers_inputs_elsewhere(config: Callable[..., FinetuneConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "SMALLEST_BYTES", 0)
    run(config("memory", gradient_checkpointing=True, save_steps=2))
    _, said = run(config("disk", activation_offloading="disk"))
    assert "recomputation: full (" in said
    assert "of which layers' inputs are on disk" in said
    assert adapter_bytes(Path(config("disk").output_dir)) == adapter_bytes(Path(config("memory").output_dir))
    run(config("8bit", activation_offloading="8bit"))
    assert told(config("8bit"))["offloading"] == "8bit"
    assert adapter_bytes(Path(config("8bit").output_dir)) != adapter_bytes(Path(config("memory").output_dir))

    checkpoint = str(Path(config("memory").output_dir) / "checkpoint-2")
    run(config("on", resume_from_checkpoint=checkpoint, activation_offloading="disk"))
    assert adapter_bytes(Path(config("on").output_dir)) == adapter_bytes(Path(config("memory").output_dir))
    with pytest.raises(HalfbyteError, match="was trained with activation_offloading 'none', not '8bit'"):
        run(config("other", resume_from_checkpoint=checkpoint, activation_offloading="8bit"))


def test_a_run_without_recomputation_goes_on_with_it(config: Callable[..., FinetuneConfig]) -> None:
    run(config("undisturbed"))
    run(config(save_steps=2, gradient_checkpointing=False))
    settings = config(resume_from_checkpoint=str(Path(config().output_dir) / "checkpoint-2"), max_memory="64GB")
    run(settings.model_copy(update={"gradient_checkpointing": True}))
    assert adapter_bytes(Path(config().output_dir)) == adapter_bytes(Path(config("undisturbed").output_dir))


@pytest.mark.parametrize("version", [1, 2])
def test_limits_of_control_groups(tmp_path: Path, version: int) -> None:
    membership, mounted = tmp_path / "cgroup", tmp_path / "mounted"
    membership.write_text("5:pids:/a/b\n4:memory:/a/b\n" if version == 1 else "0::/a/b\n")
    root = mounted / "memory" if version == 1 else mounted
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if version == 1 else ("memory.max", "memory.current")
    for group, limit, usage in (("a/b", "1000", "400"), ("a", "max", "900"), ("", "2000", "1900")):
        (root / group).mkdir(parents=True, exist_ok=True)
        for name, text in zip(names, (limit, usage), strict=True):
            (root / group / name).write_text(text)
        key = "total_inactive_file" if version == 1 else "inactive_file"
        (root / group / "memory.stat").write_text(f"anon 7\n{key} 50\n")
    assert limits_of_control_groups(membership, mounted) == [650, 150]
    assert limits_of_control_groups(tmp_path / "no", mounted) == []
