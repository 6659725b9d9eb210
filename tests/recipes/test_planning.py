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
from halfbyte.recipes.planning import check_fits, count_steps, describe_plan, plan_run
from halfbyte.recipes.quantize import quantize
from models import save_model
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


def test_a_model_larger_than_the_budget_is_run_from_pages(
    config: Callable[..., FinetuneConfig], tmp_path: Path
) -> None:
    source = save_model(tmp_path / "16-bit", "llama", **LLAMA)
    quantize(str(source), str(tmp_path / "4-bit"))
    plan = plan_run(config(model_name_or_path=str(tmp_path / "4-bit")))[0]
    assert plan.footprint.mapped_bytes > 8e6
    assert plan.peak_bytes - plan.least_bytes == plan.footprint.mapped_bytes
    short = replace(plan, budget_bytes=plan.least_bytes + 1_000_000)
    check_fits(short, None)
    assert "GB of it are pages of files, which leave when memory is short and are read again" in describe_plan(short)
    assert "pages" not in describe_plan(plan)


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


KEPT, FULL = {"gradient_checkpointing": False}, {"gradient_checkpointing": True}
LLAMA = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 6, "head_dim": 64}
QWEN = {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 10, "head_dim": 64}


def planned_model(name: str, request: pytest.FixtureRequest, directory: Path) -> Path:
    """The real one, which is quantized when it is loaded; or one of another width, as a checkpoint in 4 bits."""
    if name == "smollm2":
        return Path(request.getfixturevalue("smollm2_directory"))
    sizes = {"llama": LLAMA, "qwen2": QWEN}[name]
    source = save_model(directory / "16-bit", name, max_position_embeddings=2048, **sizes)
    quantize(str(source), str(directory / "4-bit"))
    return directory / "4-bit"


@pytest.mark.parametrize(
    ("model", "rows", "length", "rank", "changes"),
    [
        ("smollm2", 4, 256, 16, KEPT),
        ("smollm2", 4, 256, 16, FULL | {"optim": "adamw_8bit"}),
        ("smollm2", 1, 256, 64, KEPT),
        ("smollm2", 8, 256, 16, FULL | {"optim": "paged_adamw_8bit"}),
        ("llama", 16, 512, 16, KEPT),
        ("llama", 16, 512, 16, FULL),
        ("llama", 4, 1024, 64, KEPT | {"optim": "paged_adamw_32bit"}),
        ("llama", 8, 256, 16, {"max_memory": "0.7GB", "over_budget": "try"}),
        ("qwen2", 8, 512, 16, KEPT | {"optim": "adamw_8bit"}),
        ("qwen2", 16, 512, 16, FULL | {"optim": "paged_adamw_8bit"}),
        ("qwen2", 4, 1024, 16, FULL),
        ("qwen2", 2, 1024, 16, KEPT | {"optim": "paged_adamw_32bit"}),
        ("qwen2", 8, 1024, 16, {"activation_offloading": "8bit"}),
        ("llama", 8, 1024, 16, {"activation_offloading": "disk"}),
    ],
)
def test_a_run_takes_what_was_planned(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    model: str,
    rows: int,
    length: int,
    rank: int,
    changes: dict[str, Any],
) -> None:
    settings = {"max_length": length, "per_device_train_batch_size": rows, "lora_r": rank, "max_steps": 2}
    settings |= {"packing": True, "gradient_accumulation_steps": 1, "save_steps": None, "learning_rate": 1e-4}
    data = write_rows(tmp_path / "rows.jsonl", rows=600)
    config = configure(planned_model(model, request, tmp_path), data, tmp_path / "run", **settings | changes)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", RUN, json.dumps(config.to_dict())]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert ran.returncode == 0, ran.stderr
    expected, peak = json.loads(ran.stdout.splitlines()[-1])
    assert expected == pytest.approx(peak, rel=0.1)
