"""Runs with other adapters and models than the usual: DoRA, rsLoRA, a mixture of experts."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from halfbyte import HalfbyteError, load_model
from halfbyte.config import EvaluateConfig, PlanConfig
from halfbyte.huggingface.peft import load_adapter
from halfbyte.recipes.evaluate import evaluate
from halfbyte.recipes.planning import plan_run
from runs import adapter_bytes, configure, metrics_of, run, write_rows

pytestmark = pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys")


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "rows.jsonl")


def test_dora(model_directory: Callable[[str], Path], rows: Path, tmp_path: Path) -> None:
    source = model_directory("llama")
    held_out = str(write_rows(tmp_path / "held_out.jsonl", first=100))
    settings = configure(source, rows, tmp_path / "run", use_dora=True, eval_dataset=held_out)
    result, _ = run(settings)
    losses = [line["loss"] for line in metrics_of(tmp_path / "run")]
    assert losses[-1] < 0.8 * losses[0]
    assert json.loads((tmp_path / "run" / "adapter_config.json").read_text())["use_dora"] is True
    saved = load_file(tmp_path / "run" / "adapter_model.safetensors")
    assert sum("lora_magnitude_vector" in name for name in saved) == 14
    again = EvaluateConfig(
        model_name_or_path=str(source), dataset=held_out, adapter=str(tmp_path / "run"), generate=False
    )
    assert evaluate(again).loss == pytest.approx(result.eval_loss, rel=1e-6)

    # What was learned in its first half is what a run that goes on from there begins with.
    whole = adapter_bytes(tmp_path / "run")
    run(settings.model_copy(update={"resume_from_checkpoint": str(tmp_path / "run" / "checkpoint-4")}))
    assert adapter_bytes(tmp_path / "run") == whole

    wide = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(source), str(tmp_path / "run"))
    ours = load_adapter(load_model(str(source), quant_type="none")[0], tmp_path / "run")
    ids = torch.arange(9)[None]
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, wide(ids).logits, rtol=0.1, atol=0.1)


def test_dora_is_planned(model_directory: Callable[[str], Path]) -> None:
    def trained(**changes: Any) -> int:
        config = PlanConfig(model_name_or_path=str(model_directory("llama")), **changes)
        return sum(plan_run(config)[1].adapter_sizes)

    outputs = 2 * (32 + 16 + 16 + 32 + 56 + 56 + 32)
    assert trained(use_dora=True) == trained() + outputs


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe"])
def test_a_mixture_of_experts(
    model_directory: Callable[[str], Path], rows: Path, tmp_path: Path, model_type: str
) -> None:
    source = model_directory(model_type)
    with pytest.raises(HalfbyteError, match="set lora_dropout to 0, or name target_modules without experts"):
        run(configure(source, rows, tmp_path / "run"))
    assert not (tmp_path / "run").exists()
    run(configure(source, rows, tmp_path / "run", lora_dropout=0.0))
    losses = [line["loss"] for line in metrics_of(tmp_path / "run")]
    assert losses[-1] < 0.8 * losses[0]
    saved = load_file(tmp_path / "run" / "adapter_model.safetensors")
    on_experts = {name: tensor for name, tensor in saved.items() if ".experts." in name}
    assert len(on_experts) == 8
    assert all(tensor.abs().max() > 0 for tensor in on_experts.values())
