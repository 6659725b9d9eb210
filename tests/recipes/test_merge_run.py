"""From a run to a merged model: whose base it is, what the audit says, what `inspect` tells of all of it."""

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from safetensors.torch import load_file, save_file

import halfbyte
from halfbyte import HalfbyteError, load_model
from halfbyte.cli import EXIT_BAD_INPUT, EXIT_FAILED, main
from halfbyte.huggingface.peft import load_adapter
from halfbyte.recipes.audit import TRAINED, Figures, best_of, give_verdict
from halfbyte.recipes.inspect import inspect
from halfbyte.recipes.quantize import quantize
from models import save_gguf
from runs import configure, run, write_rows

QUANTIZED, ORIGINAL = "bfloat16, onto the quantized base", "bfloat16, onto the original base"
FOUR_BITS = "nf4, onto the quantized base"


@pytest.fixture
def base(model_directory: Callable[[str], Path]) -> Path:
    return model_directory("llama")


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "rows.jsonl")


@pytest.fixture
def adapter(base: Path, rows: Path, tmp_path: Path) -> Path:
    """A run of three steps that changes the model much."""
    run(configure(base, rows, tmp_path / "run", max_steps=3, learning_rate=0.05, lora_dropout=0.0, save_steps=2))
    return tmp_path / "run"


def merge(*arguments: Path, **keys: Any) -> tuple[halfbyte.MergeResult, str]:
    """The result, and what was said."""
    console = Console(file=io.StringIO(), width=400)
    model, adapter, output = map(str, arguments)
    result = halfbyte.merge(model, adapter, output, console=console, **keys)
    return result, console.file.getvalue()  # type: ignore[attr-defined]


# ── Whose base it is ────────────────────────────────────────────────────────────────────────────────────────


def test_the_base_of_the_training_is_known(base: Path, adapter: Path, tmp_path: Path) -> None:
    result, said = merge(base, adapter, tmp_path / "out")
    trained = json.loads((adapter / "run.json").read_text())["base_model"]["weights_sha256"]
    assert (result.verified, result.base_sha256, said) == (True, trained, "")
    assert merge(base, adapter, tmp_path / "again", base="original")[0].verified
    assert merge(base, adapter / "checkpoint-2", tmp_path / "early")[0].verified
    quantize(str(base), str(tmp_path / "4bit"))
    from_codes, _ = merge(tmp_path / "4bit", adapter, tmp_path / "from_codes")
    assert from_codes.verified
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "from_codes"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_gguf_can_be_merged_onto(rows: Path, tmp_path: Path) -> None:
    save_gguf(tmp_path / "model.gguf", "Q8_0")
    run(configure(tmp_path / "model.gguf", rows, tmp_path / "run", max_steps=2))
    result, _ = merge(tmp_path / "model.gguf", tmp_path / "run", tmp_path / "out")
    assert result.verified
    model, _ = load_model(str(tmp_path / "model.gguf"))
    adapted, (merged, tokenizer) = load_adapter(model, tmp_path / "run"), load_model(str(tmp_path / "out"), "none")
    ids = torch.arange(40).reshape(2, 20)
    with torch.no_grad():
        expected, found = adapted(ids).logits.float(), merged(ids).logits.float()
    assert (found - expected).norm() < 0.02 * expected.norm()
    assert tokenizer.chat_template


def test_a_base_that_changed_is_refused_and_nothing_is_written(base: Path, adapter: Path, tmp_path: Path) -> None:
    changed = tmp_path / "changed"
    shutil.copytree(base, changed)
    shard = sorted(changed.glob("*.safetensors"))[-1]
    tensors = load_file(shard)
    next(iter(tensors.values())).view(-1)[0] += 1
    save_file(tensors, shard, {"format": "pt"})
    with pytest.raises(HalfbyteError, match="trained on other weights") as refusal:
        merge(changed, adapter, tmp_path / "out")
    assert str(base) in str(refusal.value)
    assert "--any_base" in str(refusal.value)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("out")]
    result, _ = merge(changed, adapter, tmp_path / "out", any_base=True)
    assert not result.verified
    assert "trained on other weights" in result.notes[0]


def test_an_adapter_of_another_program_is_merged_with_a_note(base: Path, adapter: Path, tmp_path: Path) -> None:
    (adapter / "run.json").unlink()
    result, said = merge(base, adapter, tmp_path / "out")
    assert not result.verified
    assert "does not say what weights" in said


def test_the_adapters_template_is_kept_and_another_vocabulary_is_refused(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    template = (adapter / "chat_template.jinja").read_text() + "{# ours #}"
    (adapter / "chat_template.jinja").write_text(template)
    _, said = merge(base, adapter, tmp_path / "out")
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == template
    assert "chat template" in said
    fingerprints = json.loads((adapter / "run.json").read_text())["tokenizer"]
    merged = json.loads((tmp_path / "out" / "merge.json").read_text())["tokenizer"]
    assert fingerprints["vocabulary_sha256"] == merged["vocabulary_sha256"]
    assert fingerprints["chat_template_sha256"] != merged["chat_template_sha256"]


def test_an_output_that_exists_is_left_alone(base: Path, adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("!")
    assert main(["merge", str(base), "--adapter", str(adapter), "--output", str(tmp_path / "out")]) == EXIT_BAD_INPUT
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.tex"]


# ── The audit ───────────────────────────────────────────────────────────────────────────────────────────────


def test_the_audit_measures_all_four(base: Path, adapter: Path, rows: Path, tmp_path: Path) -> None:
    result, _ = merge(base, adapter, tmp_path / "out", audit=True, dataset=str(rows))
    audit = result.audit
    assert audit is not None
    assert [each.name for each in audit.figures] == [TRAINED, QUANTIZED, ORIGINAL, FOUR_BITS]
    trained, quantized, original, four_bits = audit.figures
    assert (trained.mean_kl, trained.worst_kl, trained.agreement) == (0.0, 0.0, 1.0)
    assert 0 < quantized.mean_kl < 0.1 * original.mean_kl
    assert quantized.mean_kl < 0.1 * four_bits.mean_kl
    assert quantized.mean_kl <= quantized.worst_kl
    assert quantized.agreement > 0.95
    assert quantized.bytes > four_bits.bytes  # type: ignore[operator]
    assert audit.shipped == QUANTIZED
    assert json.loads((tmp_path / "out" / "merge.json").read_text())["audit"]["verdict"] == audit.verdict
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "rows.jsonl", "run"]


def test_its_figures_are_those_of_the_definition(base: Path, adapter: Path, tmp_path: Path) -> None:
    result, _ = merge(base, adapter, tmp_path / "out", base="original", audit=True, limit=2, max_length=32)
    assert result.audit is not None
    assert (result.audit.rows, result.audit.tokens, result.audit.made_text) == (2, 62, True)
    from halfbyte.recipes.audit import audit_examples

    merged, tokenizer = load_model(str(tmp_path / "out"), "none")
    trained = load_adapter(load_model(str(base))[0], adapter)
    kl, same, loss = [], [], []
    for example in audit_examples(tokenizer, None, "auto", 32, 2)[0]:
        ids = example.input_ids[None].long()
        with torch.no_grad():
            p, q = (model(ids).logits[0, :-1].double().log_softmax(-1) for model in (trained, merged))
        kl += (p.exp() * (p - q)).sum(-1).tolist()
        same += (p.argmax(-1) == q.argmax(-1)).tolist()
        loss += F.nll_loss(q, ids[0, 1:], reduction="none").tolist()
    figures = result.audit.of(ORIGINAL)
    assert figures.mean_kl == pytest.approx(sum(kl) / 62, rel=1e-3)
    assert figures.worst_kl == pytest.approx(max(kl), rel=1e-3)
    assert figures.agreement == sum(same) / 62
    assert figures.perplexity == pytest.approx(torch.tensor(loss).mean().exp().item(), rel=1e-3)


def test_auto_takes_the_better(base: Path, adapter: Path, tmp_path: Path) -> None:
    result, _ = merge(base, adapter, tmp_path / "out", base="auto")
    assert result.audit is not None
    assert result.onto == "quantized"  # on made text the nearer one is the better
    assert [each.name for each in result.audit.figures] == [TRAINED, QUANTIZED, ORIGINAL]
    assert json.loads((tmp_path / "out" / "merge.json").read_text())["onto"] == "quantized"


def figures(name: str, size: int | None, perplexity: float, kl: float) -> Figures:
    return Figures(name, size, perplexity, kl, 2 * kl, 0.9)


def test_the_verdict() -> None:
    trained = figures(TRAINED, None, 10.0, 0.0)
    near, far, small = figures("near", 100, 10.1, 0.01), figures("far", 100, 9.0, 0.3), figures("small", 25, 11.0, 0.09)
    assert give_verdict([trained, near, far, small], 0.1, False).startswith("Ship small: ")
    assert give_verdict([trained, near, far, small], 0.05, False).startswith("Ship near: ")
    none = give_verdict([trained, near, far, small], 0.001, False)
    assert none.startswith("No merge is within")
    assert "near, which is nearest at 0.01" in none
    assert "perplexity" not in give_verdict([trained, near], 0.1, True)
    assert best_of([near, far], made_text=False) is far
    assert best_of([near, far], made_text=True) is near


def test_the_exit_code_is_1_past_the_threshold(
    base: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--adapter", str(adapter), "--audit", "--base", "original", "--limit", "2"]
    assert main(["merge", str(base), "--output", str(tmp_path / "far"), *flags, "--max_kl", "1e-9"]) == EXIT_FAILED
    shown = capsys.readouterr().out
    for words in ("too far", "No merge is within", TRAINED, ORIGINAL, "perplexity says nothing", "written"):
        assert words in shown
    assert main(["merge", str(base), "--output", str(tmp_path / "near"), *flags, "--max_kl", "99", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["audit"]["passed"] is True
    assert result["audit"]["figures"][0]["name"] == TRAINED


# ── What is where ───────────────────────────────────────────────────────────────────────────────────────────


def test_inspect_tells_what_is_there(base: Path, adapter: Path, tmp_path: Path) -> None:
    merge(base, adapter, tmp_path / "out", dtype="nf4")
    save_gguf(tmp_path / "model.gguf", "Q8_0")
    sha256 = json.loads((adapter / "run.json").read_text())["base_model"]["weights_sha256"][:12]
    expected = {
        adapter: ("adapter", ["rank 4", "14 layers", str(base), sha256, "3 of 3 steps", "rows.jsonl", "nf4"]),
        adapter / "checkpoint-2": ("checkpoint", ["resumed", sha256]),
        base: ("model", ["llama", "BF16", "files", "chat template"]),
        tmp_path / "out": ("merge", ["4 bits", "nf4", str(adapter), str(base), "the base of the training"]),
        tmp_path / "model.gguf": ("gguf", ["llama", "Q8_0"]),
        adapter / "adapter_model.safetensors": ("tensors", ["28 tensors", "adapter's"]),
    }
    for path, (kind, words) in expected.items():
        found = inspect(str(path))
        said = " ".join([*found.holds, *found.from_, *found.fits])
        assert found.kind == kind
        for word in words:
            assert word in said, (path, word, said)


def test_inspect_counts_parameters(base: Path, tmp_path: Path) -> None:
    model, _ = load_model(str(base), "none")
    quantize(str(base), str(tmp_path / "4bit"))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert inspect(str(base)).facts["parameters"] == parameters
    assert inspect(str(tmp_path / "4bit")).facts["parameters"] == parameters


def test_inspect_prints_sentences_or_json(adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(adapter)]) == 0
    shown = capsys.readouterr().out
    for words in ("holds", "comes from", "fits"):
        assert f"\n{words}" in shown
    assert main(["inspect", str(adapter), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kind"] == "adapter"
