"""A fine-tuning run: what it leaves behind, and that nothing beside its settings changes a bit of it."""

import io
import json
import math
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from halfbyte import FinetuneConfig, HalfbyteError, RunResult, load_model
from halfbyte.checkpoint.fingerprint import file_sha256, weights_sha256
from halfbyte.checkpoint.resume import list_checkpoints
from halfbyte.config import EvaluateConfig
from halfbyte.recipes import finetune as recipe
from halfbyte.recipes.evaluate import evaluate
from halfbyte.recipes.finetune import dry_run
from runs import adapter_bytes, configure, metrics_of, run, write_rows


@pytest.fixture(scope="module")
def model(model_directory: Callable[[str], Path]) -> Path:
    return model_directory("llama")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl")


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "held_out.jsonl", first=100)


@dataclass
class Undisturbed:
    directory: Path
    result: RunResult
    said: str


@pytest.fixture(scope="module")
def undisturbed(model: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """Eight steps from start to end, with dropout, over two epochs and a part of a third.  Not to be changed."""
    directory = tmp_path_factory.mktemp("undisturbed") / "run"
    return Undisturbed(directory, *run(configure(model, rows, directory)))


@pytest.fixture
def config(model: Path, rows: Path, tmp_path: Path) -> Callable[..., FinetuneConfig]:
    return lambda **changes: configure(model, rows, tmp_path / "run", **changes)


def resumed(config: FinetuneConfig, **changes: Any) -> FinetuneConfig:
    return config.model_copy(update={"resume_from_checkpoint": True, **changes})


def disturbed_at(step: int, disturb: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let something happen in the midst of a run's step, counted from 1."""
    original, calls = recipe.train_step, []

    def train_step(*arguments: Any) -> dict[str, float | int]:
        calls.append(1)
        if len(calls) == step:
            disturb()
        return original(*arguments)

    monkeypatch.setattr(recipe, "train_step", train_step)


class PowerCutError(BaseException):
    """Nothing catches it."""


def cut_power() -> None:
    raise PowerCutError


# ── What a run leaves behind ────────────────────────────────────────────────────────────────────────────────


def test_files(undisturbed: Undisturbed, rows: Path, model: Path) -> None:
    names = {path.name for path in undisturbed.directory.iterdir()}
    checkpoints = {f"checkpoint-{step}" for step in (2, 4, 6, 8)}
    tokenizer_files = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    own = {"adapter_config.json", "adapter_model.safetensors", "run.json", "metrics.jsonl"}
    assert names == own | tokenizer_files | checkpoints

    told = json.loads((undisturbed.directory / "run.json").read_text())
    assert told["config"]["lora_r"] == 4
    assert FinetuneConfig.model_validate(told["config"]).to_dict() == told["config"]
    assert {"python", "halfbyte", "torch", "transformers", "peft"} <= told["versions"].keys()
    assert told["base_model"] == {"name_or_path": str(model), "weights_sha256": undisturbed.result.base_sha256}
    assert told["data"] == {"dataset": [{"path": str(rows), "split": None, "sha256": {str(rows): file_sha256(rows)}}]}
    assert told["result"]["steps"] == 8
    assert not any(path.suffix in (".bin", ".pt", ".pkl") for path in undisturbed.directory.rglob("*"))


def test_metrics(undisturbed: Undisturbed) -> None:
    lines = metrics_of(undisturbed.directory)
    assert [line["step"] for line in lines] == list(range(1, 9))
    assert all(math.isfinite(value) for line in lines for value in line.values())
    assert lines[-1]["loss"] < 0.8 * lines[0]["loss"]  # it learns
    assert [line["epoch"] for line in lines[2::3]] == [1.0, 2.0]
    epoch = {key: sum(line[key] for line in lines[:3]) for key in ("tokens", "supervised_tokens")}
    assert epoch == {key: sum(line[key] for line in lines[3:6]) for key in epoch}
    for line in lines:
        assert line["tokens"] / line["step_seconds"] == pytest.approx(line["tokens_per_second"])
        assert line["peak_bytes"] > 1e8


def test_result(undisturbed: Undisturbed) -> None:
    result = undisturbed.result
    assert (result.steps, result.total_steps, result.interrupted, result.eval_loss) == (8, 8, False, None)
    assert result.loss == metrics_of(undisturbed.directory)[-1]["loss"]
    assert result.tokens_per_second > 0


def test_the_base_is_what_it_was(undisturbed: Undisturbed, model: Path) -> None:
    fresh, _ = load_model(str(model))
    assert weights_sha256(fresh) == undisturbed.result.base_sha256


def test_plain_peft_and_transformers_open_it(undisturbed: Undisturbed, model: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(model)
    plain = PeftModel.from_pretrained(base, str(undisturbed.directory))
    tokenizer = AutoTokenizer.from_pretrained(undisturbed.directory)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Is 3 very good?"}], tokenize=False, add_generation_prompt=True
    )
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        assert plain(ids).logits.isfinite().all()


def test_the_schedule(undisturbed: Undisturbed, config: Callable[..., FinetuneConfig]) -> None:
    rates = [line["learning_rate"] for line in metrics_of(undisturbed.directory)]
    # One step of warming up (3 % of 8, rounded up), then down in a line.
    assert rates == pytest.approx([1e-2 * factor for factor in (1 / 2, 1, 6 / 7, 5 / 7, 4 / 7, 3 / 7, 2 / 7, 1 / 7)])
    settings = config(max_steps=4, lr_scheduler_type="constant", warmup_ratio=0, save_steps=None)
    run(settings)
    assert {line["learning_rate"] for line in metrics_of(Path(settings.output_dir))} == {1e-2}
    assert list_checkpoints(Path(settings.output_dir)) == []


@pytest.mark.parametrize(("epochs", "steps"), [(1, 3), (0.5, 2), (0.1, 1), (2.1, 7)])
def test_epochs(config: Callable[..., FinetuneConfig], epochs: float, steps: int) -> None:
    result, _ = run(config(max_steps=-1, num_train_epochs=epochs))
    assert result.steps == result.total_steps == steps


def test_prompts_are_learned_only_on_request(config: Callable[..., FinetuneConfig], undisturbed: Undisturbed) -> None:
    settings = config(train_on_source=True, max_steps=3, save_steps=None)
    run(settings)
    learned, usual = (
        [sum(line[key] for line in metrics_of(directory)[:3]) for key in ("supervised_tokens", "tokens")]
        for directory in (Path(settings.output_dir), undisturbed.directory)
    )
    assert learned == [usual[1] - 12, usual[1]]  # all but the first token of each row
    assert usual[0] < usual[1] / 3


def test_the_newest_checkpoints_are_kept(config: Callable[..., FinetuneConfig], undisturbed: Undisturbed) -> None:
    settings = config(save_total_limit=1)
    run(settings)
    assert [path.name for path in list_checkpoints(Path(settings.output_dir))] == ["checkpoint-8"]
    assert adapter_bytes(Path(settings.output_dir)) == adapter_bytes(undisturbed.directory)


def test_the_final_adapter_is_that_of_the_last_checkpoint(undisturbed: Undisturbed) -> None:
    assert adapter_bytes(undisturbed.directory / "checkpoint-8") == adapter_bytes(undisturbed.directory)
    assert adapter_bytes(undisturbed.directory / "checkpoint-6") != adapter_bytes(undisturbed.directory)


def test_tensorboard_gets_the_metrics(config: Callable[..., FinetuneConfig]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    settings = config(report_to=["tensorboard"], max_steps=3)
    run(settings)
    directory = Path(settings.output_dir)
    (events,) = (directory / "logs").glob("events.out.tfevents.*")
    accumulator = EventAccumulator(str(events)).Reload()
    shown = [(event.step, event.value) for event in accumulator.Scalars("loss")]
    assert [step for step, _ in shown] == [1, 2, 3]
    assert [value for _, value in shown] == pytest.approx([line["loss"] for line in metrics_of(directory)])


# ── What does not change a bit ──────────────────────────────────────────────────────────────────────────────


def test_the_same_settings_give_the_same_bits_and_another_seed_others(
    config: Callable[..., FinetuneConfig], undisturbed: Undisturbed, tmp_path: Path
) -> None:
    torch.manual_seed(12345)  # what a caller did before does not matter
    run(config(output_dir=str(tmp_path / "same")))
    run(config(output_dir=str(tmp_path / "other"), seed=43))
    assert adapter_bytes(tmp_path / "same") == adapter_bytes(undisturbed.directory)
    assert adapter_bytes(tmp_path / "other") != adapter_bytes(undisturbed.directory)


@pytest.mark.parametrize(
    "changes",
    [
        {"eval_steps": 1},
        {"eval_steps": 3, "per_device_eval_batch_size": 1},
        {},
        {"logging_steps": 3, "save_steps": None, "report_to": ["tensorboard"]},
        {"gradient_checkpointing": True},
    ],
    ids=str,
)
def test_what_is_measured_saved_or_computed_again_changes_nothing(
    config: Callable[..., FinetuneConfig], held_out: Path, undisturbed: Undisturbed, changes: dict[str, Any]
) -> None:
    settings = config(eval_dataset=str(held_out), **changes)
    result, _ = run(settings)
    assert adapter_bytes(Path(settings.output_dir)) == adapter_bytes(undisturbed.directory)
    assert result.base_sha256 == undisturbed.result.base_sha256
    measured = [line["step"] for line in metrics_of(Path(settings.output_dir)) if "eval_loss" in line]
    every = changes.get("eval_steps", 8)
    assert measured == sorted({*range(every, 9, every), 8})


def test_the_loss_on_held_out_rows_is_what_evaluate_finds(
    config: Callable[..., FinetuneConfig], model: Path, held_out: Path
) -> None:
    settings = config(eval_dataset=str(held_out), max_steps=4)
    result, said = run(settings)
    again = evaluate(
        EvaluateConfig(
            model_name_or_path=str(model),
            dataset=str(held_out),
            adapter=settings.output_dir,
            generate=False,
            per_device_eval_batch_size=settings.per_device_eval_batch_size,
        )
    )
    assert result.eval_loss == again.loss
    assert f"loss on held-out rows {result.eval_loss:.4f}" in said


# ── Going on after an interruption ──────────────────────────────────────────────────────────────────────────


def assert_the_same(directory: Path, undisturbed: Undisturbed) -> None:
    """The adapter and the optimizer to the last bit, and each step told once, with the same figures."""
    assert adapter_bytes(directory) == adapter_bytes(undisturbed.directory)
    for name in ("optimizer", "random"):
        mine, expected = (
            (where / "checkpoint-8" / f"{name}.safetensors").read_bytes()
            for where in (directory, undisturbed.directory)
        )
        assert mine == expected
    keys = ("step", "loss", "grad_norm", "learning_rate", "tokens", "epoch")
    told, expected_lines = (
        [[line[key] for key in keys] for line in metrics_of(where)] for where in (directory, undisturbed.directory)
    )
    assert told == expected_lines


@pytest.mark.parametrize("step", [3, 5, 6, 8])
def test_a_run_that_was_cut_off_goes_on_to_the_same_bits(
    config: Callable[..., FinetuneConfig], undisturbed: Undisturbed, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    settings = config()
    with monkeypatch.context() as patch:
        disturbed_at(step, cut_power, patch)
        with pytest.raises(PowerCutError):
            run(settings)
    directory = Path(settings.output_dir)
    saved = (step - 1) // 2 * 2
    assert list_checkpoints(directory)[-1].name == f"checkpoint-{saved}"
    assert not (directory / "adapter_model.safetensors").exists()
    assert [line["step"] for line in metrics_of(directory)] == list(range(1, step))
    with (directory / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "lo')  # a line that the cut went through
    (directory / f"checkpoint-{saved + 2}.writing").mkdir()
    (directory / f"checkpoint-{saved + 2}.writing" / "state.json").write_text("half")
    result, said = run(resumed(settings))
    assert f"resuming {directory}/checkpoint-{saved} at step {saved}" in said
    assert (result.steps, result.interrupted) == (8, False)
    assert_the_same(directory, undisturbed)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("save_steps", [2, None])
def test_a_signal_saves_and_ends_and_the_run_goes_on(
    config: Callable[..., FinetuneConfig],
    undisturbed: Undisturbed,
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
    save_steps: int | None,
) -> None:
    settings = config(save_steps=save_steps)
    directory = Path(settings.output_dir)
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    with monkeypatch.context() as patch:
        disturbed_at(5, lambda: signal.raise_signal(number), patch)
        result, said = run(settings)
    assert (result.steps, result.total_steps, result.interrupted) == (5, 8, True)
    assert "--resume_from_checkpoint true" in said
    assert adapter_bytes(directory) == adapter_bytes(directory / "checkpoint-5")
    assert json.loads((directory / "run.json").read_text())["result"]["interrupted"] is True
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    result, _ = run(resumed(settings, save_steps=2))
    assert not result.interrupted
    assert_the_same(directory, undisturbed)


def test_a_second_signal_ends_at_once(config: Callable[..., FinetuneConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    def twice() -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    disturbed_at(4, twice, monkeypatch)
    settings = config()
    with pytest.raises(KeyboardInterrupt):
        run(settings)
    assert [path.name for path in list_checkpoints(Path(settings.output_dir))] == ["checkpoint-2"]


def test_a_finished_run_that_is_resumed_stays_what_it_is(
    undisturbed: Undisturbed, model: Path, rows: Path, tmp_path: Path
) -> None:
    shutil.copytree(undisturbed.directory, tmp_path / "run")
    (tmp_path / "run" / "adapter_model.safetensors").unlink()  # cut off between the last checkpoint and the end
    result, _ = run(resumed(configure(model, rows, tmp_path / "run")))
    assert (result.steps, result.interrupted) == (8, False)
    assert result.loss == undisturbed.result.loss
    assert_the_same(tmp_path / "run", undisturbed)
    text = (tmp_path / "run" / "run.json").read_text()
    assert "NaN" not in text


def test_a_checkpoint_can_be_gone_on_from_elsewhere(
    undisturbed: Undisturbed, model: Path, rows: Path, tmp_path: Path
) -> None:
    moved = shutil.copytree(model, tmp_path / "moved")
    checkpoint = undisturbed.directory / "checkpoint-4"
    before = {path: path.stat().st_mtime_ns for path in undisturbed.directory.rglob("*")}
    settings = configure(moved, rows, tmp_path / "new", resume_from_checkpoint=str(checkpoint))
    run(settings)
    assert adapter_bytes(tmp_path / "new") == adapter_bytes(undisturbed.directory)
    assert [line["step"] for line in metrics_of(tmp_path / "new")] == [5, 6, 7, 8]
    assert {path: path.stat().st_mtime_ns for path in undisturbed.directory.rglob("*")} == before


def test_an_earlier_checkpoint_of_the_same_run(
    undisturbed: Undisturbed, model: Path, rows: Path, tmp_path: Path
) -> None:
    directory = tmp_path / "run"
    shutil.copytree(undisturbed.directory, directory)
    run(configure(model, rows, directory, resume_from_checkpoint=str(directory / "checkpoint-4")))
    assert_the_same(directory, undisturbed)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"learning_rate": 2e-2}, "learning_rate 0.01, not 0.02"),
        ({"lora_r": 8}, "lora_r"),
        ({"seed": 1}, "seed"),
        ({"max_steps": 9}, "max_steps"),
        ({"quant_type": "fp4"}, "quant_type"),
        ({"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}, "per_device_train_batch_size"),
        ({"dataset": "other"}, "another training data"),
        ({"model_name_or_path": "other"}, "another base model"),
    ],
    ids=str,
)
def test_a_run_is_resumed_with_its_own_settings_model_and_data(
    undisturbed: Undisturbed, model: Path, rows: Path, tmp_path: Path, changes: dict[str, Any], told: str
) -> None:
    directory = tmp_path / "run"
    shutil.copytree(undisturbed.directory, directory)
    if "dataset" in changes:
        changes = {"dataset": str(tmp_path / "rows.jsonl")}
        (tmp_path / "rows.jsonl").write_text(rows.read_text().replace("certainly", "certainly!"))
    if "model_name_or_path" in changes:
        changes = {"model_name_or_path": str(tmp_path / "model")}
        shutil.copytree(model, tmp_path / "model")
        for shard in (tmp_path / "model").glob("*.safetensors"):
            tensors = load_file(shard)
            # One bit of a weight that is not in 4 bits.
            tensors = {name: t.nextafter(t + 1) if name == "model.norm.weight" else t for name, t in tensors.items()}
            save_file(tensors, shard, metadata={"format": "pt"})
    before = {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}
    with pytest.raises(HalfbyteError, match=told):
        run(resumed(configure(model, rows, directory, **changes)))
    assert {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()} == before


@pytest.mark.filterwarnings("ignore:page_dir")
def test_pages_may_come_and_go_and_bits_may_not(
    undisturbed: Undisturbed, model: Path, rows: Path, tmp_path: Path
) -> None:
    """Half a run with its state in memory and half in pages is the run in memory to the bit."""
    directory = tmp_path / "run"
    shutil.copytree(undisturbed.directory, directory)
    from_4 = {"resume_from_checkpoint": str(directory / "checkpoint-4")}
    run(configure(model, rows, directory, optim="paged_adamw_32bit", page_dir=str(tmp_path), **from_4))
    assert_the_same(directory, undisturbed)
    with pytest.raises(HalfbyteError, match="optim 'paged_adamw_32bit', not 'paged_adamw_8bit'"):
        run(resumed(configure(model, rows, directory, optim="paged_adamw_8bit")))
    shutil.rmtree(directory)
    outcomes = []
    for optim in ("adamw_8bit", "paged_adamw_8bit"):
        run(configure(model, rows, directory, optim=optim, lora_r=128, max_steps=2, overwrite_output_dir=True))
        outcomes.append(adapter_bytes(directory))
        names = [path.name for path in directory.iterdir() if path.name.startswith((".", "tmp"))]
        assert names == []
    assert outcomes[0] == outcomes[1]


def test_another_number_of_threads_is_told(undisturbed: Undisturbed, model: Path, rows: Path, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    shutil.copytree(undisturbed.directory, directory)
    state = json.loads((directory / "checkpoint-8" / "state.json").read_text())
    (directory / "checkpoint-8" / "state.json").write_text(json.dumps(state | {"threads": 64}))
    _, said = run(resumed(configure(model, rows, directory)))
    assert "64 threads" in said


# ── What goes wrong ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), None])
def test_a_full_disk_loses_nothing_that_was_there(
    config: Callable[..., FinetuneConfig],
    undisturbed: Undisturbed,
    monkeypatch: pytest.MonkeyPatch,
    error: OSError | None,
) -> None:
    from safetensors import SafetensorError

    from halfbyte.checkpoint import resume

    settings = config()
    directory = Path(settings.output_dir)
    original, calls = resume.save_file, []

    def fills_up(tensors: dict[str, torch.Tensor], file: Path) -> None:
        calls.append(file)
        if len(calls) > 3:  # two files a checkpoint
            Path(file).write_bytes(b"half")
            raise error or SafetensorError("I/O error: No space left on device (os error 28)")
        original(tensors, file)

    with monkeypatch.context() as patch:
        patch.setattr(resume, "save_file", fills_up)
        with pytest.raises(HalfbyteError, match=r"No space left.*checkpoint-2.*resume_from_checkpoint"):
            run(settings)
    assert [path.name for path in directory.glob("checkpoint-*")] == ["checkpoint-2"]
    run(resumed(settings))
    assert_the_same(directory, undisturbed)


def test_a_gradient_that_is_not_finite_stops_with_the_step_and_keeps_the_checkpoints(
    config: Callable[..., FinetuneConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    from halfbyte.recipes import training

    original, calls = training.supervised_loss, []

    def explodes(*arguments: Any) -> torch.Tensor:
        calls.append(1)
        loss: torch.Tensor = original(*arguments)
        return loss * math.inf if len(calls) > 7 else loss

    monkeypatch.setattr(training, "supervised_loss", explodes)
    settings = config()
    with pytest.raises(HalfbyteError, match=r"step 4: the gradient is not finite.*learning_rate"):
        run(settings)
    directory = Path(settings.output_dir)
    assert [path.name for path in list_checkpoints(directory)] == ["checkpoint-2"]
    assert [line["step"] for line in metrics_of(directory)] == [1, 2, 3]
    assert load_file(directory / "checkpoint-2" / "adapter_model.safetensors")


def test_a_tracker_that_is_not_installed_is_refused_before_anything_is_written(
    config: Callable[..., FinetuneConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    from halfbyte.recipes import metrics

    monkeypatch.setattr(metrics, "filter_trackers", lambda names, directory: [n for n in names if n != "wandb"])
    settings = config(report_to=["tensorboard", "wandb"])
    with pytest.raises(HalfbyteError, match="wandb is not installed"):
        run(settings)
    assert not Path(settings.output_dir).exists()


def test_a_run_is_not_written_over(undisturbed: Undisturbed, model: Path, rows: Path, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    shutil.copytree(undisturbed.directory, directory)
    with pytest.raises(HalfbyteError, match="holds a run already"):
        run(configure(model, rows, directory))
    assert adapter_bytes(directory) == adapter_bytes(undisturbed.directory)
    run(configure(model, rows, directory, overwrite_output_dir=True, max_steps=1, save_steps=None))
    assert list_checkpoints(directory) == []
    assert [line["step"] for line in metrics_of(directory)] == [1]


@pytest.mark.parametrize("key", ["dataset", "eval_dataset", "model_name_or_path"])
def test_what_a_run_reads_is_not_removed_with_an_old_run(
    undisturbed: Undisturbed, model: Path, rows: Path, tmp_path: Path, key: str
) -> None:
    directory = tmp_path / "run"
    shutil.copytree(undisturbed.directory, directory)
    inside = directory / "inside"
    _ = shutil.copytree(model, inside) if key == "model_name_or_path" else shutil.copy(rows, inside)
    with pytest.raises(HalfbyteError, match=f"{key}.*inside"):
        run(configure(model, rows, directory, overwrite_output_dir=True, **{key: str(inside)}))
    assert inside.exists()


def test_nothing_to_resume(config: Callable[..., FinetuneConfig], tmp_path: Path) -> None:
    with pytest.raises(HalfbyteError, match=r"no run to resume|no checkpoint-N"):
        run(config(resume_from_checkpoint=True))
    with pytest.raises(HalfbyteError, match="not a checkpoint"):
        run(config(resume_from_checkpoint=str(tmp_path)))
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_writes_nothing_and_shows_what_is_learned(
    config: Callable[..., FinetuneConfig], tmp_path: Path
) -> None:
    console = Console(file=io.StringIO(), width=200)
    dry_run(config(), console)
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert "12 rows" in said
    assert "⟦yes<|im_end|>⟧" in said
    assert list(tmp_path.iterdir()) == []


# ── Packing, where the model takes it ───────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("model_type", "packs"), [("llama", True), ("opt", False)])
def test_rows_are_packed_only_for_a_model_that_keeps_them_apart(
    model_directory: Callable[[str], Path], rows: Path, tmp_path: Path, model_type: str, packs: bool
) -> None:
    settings = {"max_steps": -1, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1}
    config = configure(model_directory(model_type), rows, tmp_path / "run", packing=True, **settings)
    result, said = run(config)
    assert ("this model does not keep packed rows apart" in said) is not packs
    assert (result.total_steps < 6) is packs  # of twelve rows, two at a time


def test_resume_from_a_cache_is_bit_identical(
    model: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokenized into a store by two processes, packed, and gone on from where a power cut left it."""
    monkeypatch.setattr("halfbyte.data.cache.IN_MEMORY_ROWS", 4)
    monkeypatch.setattr("halfbyte.data.workers.CHUNK_ROWS", 3)
    changes = {"packing": True, "max_steps": 6, "gradient_accumulation_steps": 1}
    in_memory = configure(model, rows, tmp_path / "in-memory", **changes)
    stored = in_memory.model_copy(
        update={"output_dir": str(tmp_path / "stored"), "data_cache_dir": str(tmp_path / "cache")}
    )
    with monkeypatch.context() as small:
        small.setattr("halfbyte.data.cache.IN_MEMORY_ROWS", 1000)
        run(in_memory)
    with monkeypatch.context() as disturbed:
        disturbed_at(4, cut_power, disturbed)
        with pytest.raises(PowerCutError):
            run(stored)
    (place,) = (path for path in (tmp_path / "cache").iterdir() if path.is_dir())
    written = (place / "input_ids.bin").stat().st_mtime_ns
    run(resumed(stored))
    assert (place / "input_ids.bin").stat().st_mtime_ns == written
    assert adapter_bytes(tmp_path / "stored") == adapter_bytes(tmp_path / "in-memory")
