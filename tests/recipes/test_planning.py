"""A run is planned before it is begun, refused if it cannot fit, and takes what the plan says."""

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from halfbyte import FinetuneConfig, HalfbyteError
from halfbyte.cli import main
from halfbyte.config import PlanConfig
from halfbyte.huggingface import miniature
from halfbyte.recipes import plan as recipe
from halfbyte.recipes.planning import check_fits, count_steps, plan_run
from runs import configure, run, write_rows


@pytest.fixture
def config(model_directory: Callable[[str], Path], tmp_path: Path) -> Callable[..., FinetuneConfig]:
    rows = write_rows(tmp_path / "rows.jsonl")
    return lambda **changes: configure(
        model_directory("llama"), rows, tmp_path / "run", **{"max_steps": 2, "save_steps": None} | changes
    )


def test_a_run_is_planned_and_the_plan_kept_beside_the_result(config: Callable[..., FinetuneConfig]) -> None:
    result, said = run(config())
    assert "plan: at most " in said
    assert "note: there is no plan" not in said
    assert result.planned_bytes is not None
    written = json.loads((Path(result.output_dir) / "run.json").read_text())["result"]
    assert written["planned_bytes"] == result.planned_bytes


def test_a_run_that_cannot_fit_is_refused_before_loading(
    config: Callable[..., FinetuneConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("halfbyte.recipes.finetune.load_model", lambda *_: pytest.fail("it was loaded"))
    with pytest.raises(HalfbyteError, match=r"takes \d\.\d\dGB of memory and max_memory is 50MB: it fits with a max_"):
        run(config(max_memory="50MB"))
    assert not Path(config().output_dir).exists()


def test_the_budget_that_is_named_would_do(config: Callable[..., FinetuneConfig]) -> None:
    with pytest.raises(HalfbyteError) as refusal:
        run(config(max_memory="50MB"))
    budget = str(refusal.value).partition("with a max_memory of ")[2].partition(";")[0]
    run(config(max_memory=f"{float(budget.removesuffix('GB')) + 0.05:.2f}GB"))  # the process has grown meanwhile


def test_who_wants_to_may_try(config: Callable[..., FinetuneConfig]) -> None:
    result, _ = run(config(max_memory="50MB", over_budget="try"))
    assert result.steps == 2


def test_what_would_make_it_fit_is_said(config: Callable[..., FinetuneConfig]) -> None:
    plan = plan_run(config(gradient_checkpointing=False))[0].with_settings(rows=100_000)
    tight = replace(plan, budget_bytes=plan.with_settings(level="elementwise").least_bytes)
    with pytest.raises(HalfbyteError, match=r"it fits with --gradient_checkpointing auto, or .* over_budget: try"):
        check_fits(tight, None)
    check_fits(plan.with_settings(rows=1), None)


def test_a_model_that_cannot_be_measured_is_trained_without_a_plan(
    config: Callable[..., FinetuneConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("no such layer")

    monkeypatch.setattr(miniature, "probe_activations", fail)
    result, said = run(config())
    assert "note: there is no plan, for" in said
    assert "(RuntimeError: no such layer)" in said
    assert result.planned_bytes is None


def test_a_plan_leaves_the_numbers_of_a_run_alone(
    config: Callable[..., FinetuneConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    with_plan, _ = run(config())
    monkeypatch.setattr("halfbyte.recipes.finetune.make_plan", lambda *_: None)
    without, _ = run(config(overwrite_output_dir=True))
    assert with_plan.loss == without.loss


def test_steps_of_a_run(config: Callable[..., FinetuneConfig]) -> None:
    assert count_steps(config(max_steps=-1), 9) == (3, 3)
    assert count_steps(config(max_steps=-1, num_train_epochs=1.5), 9) == (3, 5)
    assert count_steps(config(max_steps=7), 9) == (3, 7)


# ── halfbyte plan ────────────────────────────────────────────────────────────────────────────────────────────────────


def planned(model: Path, **changes: Any) -> PlanConfig:
    return PlanConfig.model_validate({"model_name_or_path": str(model), "max_length": 64} | changes)


def test_a_model_is_all_that_a_plan_needs(model_directory: Callable[[str], Path]) -> None:
    report = recipe.plan(planned(model_directory("llama")), Console(file=io.StringIO()), with_time=False)
    assert report.plan.settings.tokens == 4 * 64
    assert (report.steps, report.step_seconds, report.run_seconds) == (None, None, None)
    assert report.plan.fits


def test_with_rows_it_knows_how_many_steps_there_are_and_how_long_they_take(
    model_directory: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recipe, "CALIBRATION_SECONDS", 0.2)
    config = planned(model_directory("llama"), dataset=str(write_rows(tmp_path / "rows.jsonl")), packing=False)
    report = recipe.plan(config, Console(file=io.StringIO()))
    assert report.steps == 1
    assert report.step_seconds is not None
    assert report.run_seconds == report.step_seconds > 0
    assert json.dumps(report.to_dict())


def test_the_command(model_directory: Callable[[str], Path], capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", "--model_name_or_path", str(model_directory("llama")), "--no_time"]
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    for words in ("4-bit weights", "optimizer state", "elementwise", "a training step", "it fits"):
        assert words in shown
    assert main([*arguments, "--max_memory", "40MB"]) == 0
    assert "it does not fit" in capsys.readouterr().out
    assert main([*arguments, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert sum(told["parts"].values()) == told["moments"]["a training step"]
    assert told["levels"].keys() == {"none", "elementwise", "full"}


# ── The plan against a run ───────────────────────────────────────────────────────────────────────────────────────────

RUN = """
import json, sys
from halfbyte import FinetuneConfig, finetune
result = finetune(FinetuneConfig.model_validate(json.loads(sys.argv[1])))
print(json.dumps([result.planned_bytes, result.peak_bytes]))
"""


@pytest.mark.parametrize(
    "changes",
    [
        {"gradient_checkpointing": False},
        {"gradient_checkpointing": True, "optim": "adamw_8bit"},
        {"gradient_checkpointing": False, "per_device_train_batch_size": 1, "lora_r": 64},
    ],
    ids=["kept", "recomputed", "of rank 64"],
)
def test_a_run_takes_what_was_planned(smollm2_directory: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    settings = {"max_length": 256, "packing": True, "per_device_train_batch_size": 4, "lora_r": 16, "max_steps": 2}
    rows = write_rows(tmp_path / "rows.jsonl", rows=120)
    config = configure(smollm2_directory, rows, tmp_path / "run", **settings | {"save_steps": None} | changes)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", RUN, json.dumps(config.to_dict())]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert ran.returncode == 0, ran.stderr
    expected, peak = json.loads(ran.stdout.splitlines()[-1])
    assert expected == pytest.approx(peak, rel=0.1)
