"""An adapter alone as GGUF's LoRA: on its base's file it is the merge."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from gguf_models import llama_cpp, save_family
from rich.console import Console

import halfbyte
from adapters import random_adapter
from halfbyte import HalfbyteError

SETTINGS: dict[str, dict[str, Any]] = {
    "one scale": {},
    "rslora": {"use_rslora": True},
    "ranks and alphas a layer": {"rank_pattern": {"up_proj": 2}, "alpha_pattern": {"down_proj": 5}},
    "some layers": {"target_modules": ["q_proj", "k_proj"]},
}


def export(model: Path, output: Path, adapter: Path | None, **keys: Any) -> halfbyte.MergeResult:
    silent = Console(file=io.StringIO())
    given = None if adapter is None else str(adapter)
    return halfbyte.merge(str(model), given, str(output), format="gguf", console=silent, **keys)


def tensors_of(file: Path) -> dict[str, np.ndarray]:
    return {tensor.name: np.array(tensor.data) for tensor in GGUFReader(file).tensors}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_the_base_and_the_adapter_are_the_merge(settings: dict[str, Any], tmp_path: Path) -> None:
    model = save_family("llama", tmp_path / "model")
    adapter = random_adapter(model, tmp_path / "adapter", **settings)
    export(tmp_path / "model", tmp_path / "base.gguf", None, dtype="float32")
    export(tmp_path / "model", tmp_path / "merged.gguf", adapter, base="original", dtype="float32")
    result = export(tmp_path / "model", tmp_path / "lora.gguf", adapter, adapter_only=True)
    base, merged, lora = (tensors_of(tmp_path / f"{name}.gguf") for name in ("base", "merged", "lora"))
    values = {key: field.contents() for key, field in GGUFReader(tmp_path / "lora.gguf").fields.items()}
    told = [values[key] for key in ("general.type", "general.architecture", "adapter.type")]
    assert told == ["adapter", "llama", "lora"]
    alpha = values["adapter.lora.alpha"]
    assert (alpha == 0) == ("rank_pattern" in settings), "one scale is said, several are in the factors"
    changed = {name for name in base if not np.array_equal(base[name], merged[name])}
    assert {f"{name}.{part}" for name in changed for part in ("lora_a", "lora_b")} == lora.keys()
    assert result.changed == len(changed) > 0
    for name in changed:
        a, b = lora[f"{name}.lora_a"], lora[f"{name}.lora_b"]
        scale = alpha / len(a) if alpha else 1.0
        np.testing.assert_allclose(base[name] + scale * (b @ a), merged[name], atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3", "phi3"])
def test_llama_cpp_computes_the_merge_with_it(family: str, tmp_path: Path) -> None:
    model = save_family(family, tmp_path / "model")
    adapter = random_adapter(model, tmp_path / "adapter")
    export(tmp_path / "model", tmp_path / "base.gguf", None, dtype="float32")
    export(tmp_path / "model", tmp_path / "merged.gguf", adapter, base="original", dtype="float32")
    export(tmp_path / "model", tmp_path / "lora.gguf", adapter, adapter_only=True)
    task = {"prompts": [list(range(5, 45))], "logits": True}
    expected = torch.tensor(llama_cpp(tmp_path / "merged.gguf", **task))
    found = torch.tensor(llama_cpp(tmp_path / "base.gguf", lora=str(tmp_path / "lora.gguf"), **task))
    without = torch.tensor(llama_cpp(tmp_path / "base.gguf", **task))
    assert (found - expected).square().mean().sqrt() < 3e-3 * expected.std()
    assert (without - expected).square().mean().sqrt() > 0.1 * expected.std()


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.parametrize(
    "settings",
    [
        {"use_dora": True},
        {"modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"trainable_token_indices": [5, 6]},
    ],
    ids=str,
)
def test_what_its_lora_does_not_know_is_refused(settings: dict[str, Any], tmp_path: Path) -> None:
    adapter = random_adapter(save_family("llama", tmp_path / "model"), tmp_path / "adapter", **settings)
    with pytest.raises(HalfbyteError, match=r"adapter changes (output|token_embd|blk\.0\.\w+)\.weight in a way.*merge"):
        export(tmp_path / "model", tmp_path / "lora.gguf", adapter, adapter_only=True)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["adapter", "model"]
