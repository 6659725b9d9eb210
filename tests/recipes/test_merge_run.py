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
from peft import PeftModel
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import halfbyte
from halfbyte import load_model
from halfbyte.cli import EXIT_BAD_INPUT, EXIT_FAILED, main
from halfbyte.huggingface.peft import load_adapter
from halfbyte.recipes.audit import Figures, audit_examples, best_of, give_verdict
from halfbyte.recipes.inspect import inspect
from halfbyte.recipes.quantize import quantize
from models import save_gguf
from runs import configure, run, write_rows

TRAINED, SUM = "adapter on the 4-bit base", "adapters on 4-bit, float32"
QUANTIZED, ORIGINAL = "bfloat16, quantized base", "bfloat16, original base"
FOUR_BITS = "nf4, original base"


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


def change_one_weight(base: Path, changed: Path) -> Path:
    shutil.copytree(base, changed)
    shard = sorted(changed.glob("*.safetensors"))[-1]
    tensors = load_file(shard)
    next(iter(tensors.values())).view(-1)[0] += 1
    save_file(tensors, shard, {"format": "pt"})
    return changed


def test_a_base_that_changed_is_told_in_a_sentence(base: Path, adapter: Path, tmp_path: Path) -> None:
    changed = change_one_weight(base, tmp_path / "changed")
    result, said = merge(changed, adapter, tmp_path / "out")
    assert result.verified is False
    (sentence,) = result.warnings
    for words in (str(adapter), "trained on other weights", str(base), str(changed), str(result.base_sha256)[:12]):
        assert words in sentence
    assert said == f"warning: {sentence}\n"
    record = json.loads((tmp_path / "out" / "merge.json").read_text())
    assert record["warnings"] == [sentence]
    assert record["base_model"]["verified"] is False
    assert "which is not the base of the training" in " ".join(inspect(str(tmp_path / "out")).from_)


def test_another_quantization_is_told_in_a_sentence(base: Path, adapter: Path, tmp_path: Path) -> None:
    result, _ = merge(base, adapter, tmp_path / "out", block_size=32, double_quant=False)
    assert result.verified is False
    (sentence,) = result.warnings
    assert "with block_size 64, double_quant true" in sentence
    assert "with block_size 32, double_quant false" in sentence


@pytest.mark.parametrize("command", ["generate --prompt Hello --max_new_tokens 2", "evaluate --max_new_tokens 2"])
def test_loading_onto_another_base_says_so(
    base: Path, adapter: Path, rows: Path, tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    data = ["--dataset", str(rows)] if command.startswith("evaluate") else []

    def said(model: Path, *more: str) -> str:
        capsys.readouterr()
        arguments = ["--model_name_or_path", str(model), "--adapter", str(adapter), *data, *more]
        assert main([*command.split(), *arguments]) == 0
        return capsys.readouterr().err

    quantize(str(base), str(tmp_path / "4bit"))
    for same in (base, tmp_path / "4bit"):
        assert "warning" not in said(same)
    assert said(change_one_weight(base, tmp_path / "changed")).count("warning: ") == 1
    assert "other weights" in said(tmp_path / "changed")
    assert "with quant_type nf4, and" in said(base, "--quant_type", "int4")
    assert "is loaded with quant_type none" in said(base, "--quant_type", "none")


def test_an_adapter_knows_its_origin_wherever_it_is_copied(base: Path, adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "copy").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(adapter / name, tmp_path / "copy")
    assert merge(base, tmp_path / "copy", tmp_path / "out")[0].verified
    run = json.loads((adapter / "run.json").read_text())
    with safe_open(tmp_path / "copy" / "adapter_model.safetensors", framework="pt") as file:
        record = json.loads(file.metadata()["halfbyte"])
    for key in ("versions", "quantization", "tokenizer"):
        assert record[key] == run[key]
    assert record["base_model"] == {"weights_sha256": run["base_model"]["weights_sha256"]}
    (sha256,) = run["data"]["dataset"][0]["sha256"].values()
    assert record["data"] == {"dataset": [{"path": None, "split": None, "sha256": [sha256]}]}
    assert str(tmp_path) not in json.dumps(record)
    said = " ".join([*inspect(str(tmp_path / "copy")).from_, *inspect(str(tmp_path / "copy")).fits])
    for words in (str(base), sha256[:12], "halfbyte", record["base_model"]["weights_sha256"][:12]):
        assert words in said
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "copy")  # and PEFT minds not


def test_the_quantization_that_is_recorded_is_that_of_the_codes(base: Path, rows: Path, tmp_path: Path) -> None:
    quantize(str(base), str(tmp_path / "4bit"), quant_type="fp4", block_size=128, double_quant=False)
    run(configure(tmp_path / "4bit", rows, tmp_path / "run", max_steps=1))  # which asks for nf4 in blocks of 64
    expected = {"quant_type": "fp4", "block_size": 128, "double_quant": False, "compute_dtype": "bfloat16"}
    assert json.loads((tmp_path / "run" / "run.json").read_text())["quantization"] == expected
    result, said = merge(base, tmp_path / "run", tmp_path / "out")  # onto the 16-bit model that the codes are from
    assert (result.verified, said) == (True, "")


def test_an_adapter_of_another_program_is_merged_with_a_note(base: Path, adapter: Path, tmp_path: Path) -> None:
    (adapter / "run.json").unlink()
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file(tensors, adapter / "adapter_model.safetensors", {"format": "pt"})
    result, said = merge(base, adapter, tmp_path / "out")
    assert result.verified is None
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


def test_four_bits_are_taken_from_the_original(base: Path, adapter: Path, tmp_path: Path) -> None:
    """Of codes almost nothing that was learned would be left."""
    result, said = merge(base, adapter, tmp_path / "out", dtype="nf4")
    assert (result.onto, said) == ("original", "")
    quantize(str(base), str(tmp_path / "4bit"))
    result, said = merge(tmp_path / "4bit", adapter, tmp_path / "twice", dtype="nf4")
    assert result.onto == "quantized"
    assert "loses most of what was learned" in said


def test_several_adapters_are_measured_against_their_sum(base: Path, adapter: Path, rows: Path, tmp_path: Path) -> None:
    run(configure(base, rows, tmp_path / "second", max_steps=2, learning_rate=0.05, seed=7))
    keys: dict[str, Any] = {"audit": True, "limit": 4, "weights": [0.7, 0.6]}
    adapters = [str(adapter), str(tmp_path / "second")]
    result = halfbyte.merge(str(base), adapters, str(tmp_path / "out"), **keys)
    assert result.audit is not None
    assert [each.name for each in result.audit.figures] == [SUM, QUANTIZED, ORIGINAL, FOUR_BITS]
    _, quantized, original, _ = result.audit.figures
    assert 0 < quantized.mean_kl < 0.1 * original.mean_kl
    # The reference is what both adapters make of the 4-bit base together.
    model, tokenizer = load_model(str(base), compute_dtype=torch.float32)
    both = load_adapter(model, adapter)
    both.load_adapter(str(tmp_path / "second"), "second")
    both.add_weighted_adapter(["default", "second"], [0.7, 0.6], "both", combination_type="cat")
    both.set_adapter("both")
    merged, _ = load_model(str(tmp_path / "out"), "none", compute_dtype=torch.float32)
    ids = audit_examples(tokenizer, None, "auto", 64, 1)[0][0].input_ids[None].long()
    with torch.no_grad():
        p, q = (model(ids).logits[0, :-1].double().log_softmax(-1) for model in (both.eval(), merged))
    assert (p.exp() * (p - q)).sum(-1).mean() < 2 * quantized.worst_kl


def figures(name: str, size: int | None, perplexity: float, kl: float) -> Figures:
    return Figures(name, size, perplexity, kl, 2 * kl, 0.9)


def test_the_verdict() -> None:
    trained = figures(TRAINED, None, 10.0, 0.0)
    near, far, small = figures("near", 100, 10.1, 0.01), figures("far", 100, 9.0, 0.3), figures("small", 25, 11.0, 0.09)
    everything, flags = [trained, near, far, small], {name: f"--dtype {name}" for name in ("near", "far", "small")}
    assert give_verdict(everything, "near", 0.1, False, flags).startswith("Ship small (--dtype small): ")
    assert give_verdict(everything, "near", 0.05, False, flags).startswith("Ship near: ")
    none = give_verdict(everything, "far", 0.001, False, flags)
    assert none.startswith("No merge is within")
    assert "near (--dtype near), which is nearest at 0.01" in none
    assert "perplexity" not in give_verdict([trained, near], "near", 0.1, True)
    assert best_of([near, far], made_text=False) is far
    assert best_of([near, far], made_text=True) is near


def test_the_exit_code_is_1_past_the_threshold(
    base: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--adapter", str(adapter), "--audit", "--base", "original", "--limit", "2"]
    assert main(["merge", str(base), "--output", str(tmp_path / "far"), *flags, "--max_kl", "1e-9"]) == EXIT_FAILED
    shown = capsys.readouterr().out
    for words in ("too far", "No merge is within", TRAINED, ORIGINAL, "perplexity says nothing", "written:"):
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
