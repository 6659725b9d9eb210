"""A mapped 4-bit checkpoint: the same numbers, pages that nobody can write to, and files that change underneath."""

import copy
import gc
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

import halfbyte
from halfbyte import HalfbyteError, Linear4bit, add_lora
from halfbyte.huggingface.mapped import MappedFile, map_safetensors, mapped_bytes, spans_of
from halfbyte.huggingface.safetensors_files import read_safetensors
from halfbyte.recipes.quantize import quantize
from models import save_model
from runs import adapter_bytes, configure, run, write_rows

# What it puts in the place of a model's own operations is test_patch.py's matter.
load_model = partial(halfbyte.load_model, fast=False)

SIZES = {"hidden_size": 256, "intermediate_size": 520, "head_dim": 64}  # so that codes are large enough to be mapped
IDS = torch.arange(24).view(2, 12)


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("mapped") / "nf4"
    source = save_model(directory.with_name("16-bit"), "llama", **SIZES)
    quantize(str(source), str(directory))
    return directory


@pytest.fixture
def checkpoint(original: Path, tmp_path: Path) -> Path:
    """A copy to write to."""
    shutil.copytree(original, tmp_path / "nf4")
    return tmp_path / "nf4"


def file_of(directory: Path) -> Path:
    return directory / "model.safetensors"


def sha256(directory: Path) -> str:
    return hashlib.sha256(file_of(directory).read_bytes()).hexdigest()


def mappings_of(file: Path) -> dict[range, str]:
    """Addresses at which a file is in this process's memory, and its permissions there."""
    found = {}
    for line in Path("/proc/self/maps").read_text().splitlines():
        addresses, permissions, *_, path = line.split(maxsplit=5)
        if path.strip() == str(file.resolve()):
            first, last = (int(address, 16) for address in addresses.split("-"))
            found[range(first, last)] = permissions
    return found


def is_mapped(tensor: Tensor, file: Path) -> bool:
    return any(tensor.data_ptr() in addresses for addresses in mappings_of(file))


needs_proc = pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="there is no /proc/self/maps to read")


# ── The same numbers ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("settings", [{}, {"double_quant": False}, {"quant_type": "fp4", "block_size": 32}])
@pytest.mark.parametrize("model_type", ["llama", "qwen2", "gpt2", "mixtral"])
def test_bytes_logits_and_gradients_are_those_of_a_copy(
    model_type: str, settings: dict[str, object], tmp_path: Path
) -> None:
    source = save_model(tmp_path / "16-bit", model_type, **SIZES)
    quantize(str(source), str(tmp_path / "nf4"), **settings)  # type: ignore[arg-type]
    mapped, copied = (load_model(str(tmp_path / "nf4"), mapped=choice)[0] for choice in (True, False))
    assert mapped_bytes(mapped) > 0.8 * file_of(tmp_path / "nf4").stat().st_size
    assert mapped_bytes(copied) == 0
    states = mapped.state_dict(), copied.state_dict()
    assert states[0].keys() == states[1].keys()
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]), name
    assert all(torch.equal(*pair) for pair in zip(step_of(mapped), step_of(copied), strict=True))


def step_of(model: PreTrainedModel) -> list[Tensor]:
    """Logits, and the gradients of adapters."""
    torch.manual_seed(0)
    settings = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    model = add_lora(model, settings)
    logits = model(input_ids=IDS, use_cache=False).logits
    logits.float().square().mean().backward()
    return [logits] + [p.grad for p in model.parameters() if p.grad is not None]


@needs_proc
def test_what_is_mapped_and_what_is_read(original: Path) -> None:
    model, _ = load_model(str(original))
    file = file_of(original)
    large = [layer for layer in model.modules() if isinstance(layer, Linear4bit) and layer.weight.nbytes >= 1 << 14]
    assert len(large) > 6
    assert all(is_mapped(layer.weight, file) for layer in large)
    assert is_mapped(model.model.embed_tokens.weight, file)
    assert is_mapped(model.lm_head.weight, file)
    assert not is_mapped(model.model.norm.weight, file)  # it may be trained in place
    assert set(mappings_of(file).values()) == {"r--s"}
    before = len(mappings_of(file))
    del model, large
    gc.collect()
    assert before == 1
    assert mappings_of(file) == {}


def test_while_quantizing_nothing_is_mapped(original: Path) -> None:
    model, _ = load_model(str(original.with_name("16-bit")))
    assert mapped_bytes(model) == 0


def test_tensors_that_do_not_lie_where_their_type_can_be_read(tmp_path: Path) -> None:
    values = torch.randn(100, 100).bfloat16()
    codes = torch.randint(256, (20_001, 1), dtype=torch.uint8)
    entries = {
        "codes": {"dtype": "U8", "shape": [20_001, 1], "data_offsets": [0, 20_001]},
        "values": {"dtype": "BF16", "shape": [100, 100], "data_offsets": [20_001, 40_001]},
        "vector": {"dtype": "BF16", "shape": [10_000], "data_offsets": [40_001, 60_001]},
        "moved": {"dtype": "BF16", "shape": [100, 100], "data_offsets": [60_001, 80_001]},
        "last": {"dtype": "U8", "shape": [20_001, 1], "data_offsets": [80_001, 100_002]},
    }
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    words = values.view(torch.uint8).numpy().tobytes()
    content = [codes.numpy().tobytes(), words, words, words, codes.numpy().tobytes()]
    file_of(tmp_path).write_bytes(len(header).to_bytes(8, "little") + header + b"".join(content))
    tensors, (file,) = map_safetensors(tmp_path)
    spans = {name: file.span_of(tensor[...]) for name, tensor in tensors.items()}
    assert {name for name, span in spans.items() if span is not None} == {"codes", "last"}
    assert torch.equal(tensors["codes"], codes)
    assert torch.equal(tensors["last"], codes)
    assert all(torch.equal(tensors[name][...], values) for name in ("values", "moved"))
    assert torch.equal(tensors["vector"][...], values.flatten())
    assert tensors.keys() == read_safetensors(tmp_path).keys()


def test_a_decoder_of_a_mapped_model_says_what_the_model_says(original: Path) -> None:
    from halfbyte.huggingface.decode import fast_decoder

    mapped, copied = (load_model(str(original), mapped=choice)[0] for choice in (True, False))
    decoders = fast_decoder(mapped), fast_decoder(copied)
    assert decoders[0] is not None  # whatever hooks are on the mapped one
    assert decoders[1] is not None
    assert torch.equal(*(decoder.prefill(IDS[:1]) for decoder in decoders if decoder))
    assert torch.equal(*(decoder.step(7) for decoder in decoders if decoder))
    mapped.model.layers[0].register_forward_hook(lambda *_: None)
    assert fast_decoder(mapped) is None


# ── Nobody writes ───────────────────────────────────────────────────────────────────────────────────────────


WRITE = """
import sys, torch, halfbyte
model, _ = halfbyte.load_model(sys.argv[1], fast=False)
print("loaded", flush=True)
with torch.no_grad():
    model.get_submodule(sys.argv[2]).weight.zero_()
print("written", flush=True)
"""


@needs_proc
@pytest.mark.parametrize("name", ["model.layers.0.mlp.up_proj", "lm_head"])
def test_a_write_ends_the_process_and_not_the_file(checkpoint: Path, name: str) -> None:
    before = sha256(checkpoint)
    command = [sys.executable, "-c", WRITE, str(checkpoint), name]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert ran.stdout.split() == ["loaded"], ran.stderr
    assert ran.returncode == -signal.SIGSEGV
    assert sha256(checkpoint) == before


def test_what_people_do_to_models_leaves_the_file_as_it_is(checkpoint: Path) -> None:
    before = sha256(checkpoint)
    model, _ = halfbyte.load_model(str(checkpoint))
    settings = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    settings.modules_to_save, settings.bias = ["lm_head"], "all"
    tuned = add_lora(model, settings)
    optimizer = torch.optim.SGD(tuned.parameters(), lr=1.0)
    tuned(input_ids=IDS).logits.float().square().mean().backward()
    optimizer.step()
    tuned.merge_adapter()
    tuned.unmerge_adapter()
    copy.deepcopy(tuned)(input_ids=IDS)
    model = tuned.merge_and_unload()
    model.resize_token_embeddings(300)
    model.to(torch.float16).to(torch.bfloat16)
    model(input_ids=IDS)
    assert sha256(checkpoint) == before


def test_an_optimizer_over_everything_passes_over_what_is_mapped(checkpoint: Path) -> None:
    before = sha256(checkpoint)
    model, _ = load_model(str(checkpoint))
    assert not model.lm_head.weight.requires_grad
    model(input_ids=IDS).logits.float().square().mean().backward()
    norm = model.model.norm.weight
    old = norm.detach().clone()
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    assert not torch.equal(norm, old)
    assert sha256(checkpoint) == before


def test_a_model_can_be_saved_over_itself(checkpoint: Path) -> None:
    saved = {name: tensor.clone() for name, tensor in load_file(file_of(checkpoint)).items()}
    model, _ = load_model(str(checkpoint))
    expected = model(input_ids=IDS).logits
    model.save_pretrained(checkpoint)
    assert torch.equal(model(input_ids=IDS).logits, expected)  # its pages are those of the old file
    again = load_file(file_of(checkpoint))
    assert saved.keys() == again.keys()
    assert all(torch.equal(saved[name], again[name]) for name in saved)
    assert torch.equal(load_model(str(checkpoint))[0](input_ids=IDS).logits, expected)


def test_a_run_on_pages_is_the_run_in_memory(checkpoint: Path, tmp_path: Path) -> None:
    before = sha256(checkpoint)
    rows = write_rows(tmp_path / "rows.jsonl")
    adapters = []
    for name in (checkpoint, checkpoint.with_name("16-bit")):
        if not name.exists():
            save_model(name, "llama", **SIZES)
        settings = configure(name, rows, tmp_path / f"run-{name.name}", max_steps=3)
        run(settings)
        adapters.append(adapter_bytes(Path(settings.output_dir)))
    assert adapters[0] == adapters[1]
    assert sha256(checkpoint) == before


# ── Files that change ───────────────────────────────────────────────────────────────────────────────────────


def shorten(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def lengthen(file: Path) -> None:
    with file.open("ab") as end:
        end.write(b"more")


def overwrite(file: Path) -> None:
    with file.open("r+b") as start:
        start.write(b"other")
    os.utime(file, ns=(0, 0))  # the clock of a file's time may be coarser than this test is fast


@pytest.mark.parametrize("change", [shorten, lengthen, overwrite])
def test_a_file_that_changes_is_told_before_it_is_read(checkpoint: Path, change: Callable[[Path], None]) -> None:
    model, _ = load_model(str(checkpoint))
    model(input_ids=IDS)
    change(file_of(checkpoint))
    with pytest.raises(HalfbyteError, match=r"model\.safetensors was written to .* load the model again") as caught:
        model(input_ids=IDS)
    assert str(checkpoint) in str(caught.value)


def test_a_file_that_is_replaced_by_another_of_its_name_does_no_harm(checkpoint: Path) -> None:
    model, _ = load_model(str(checkpoint))
    expected = model(input_ids=IDS).logits
    other = checkpoint / "other"
    other.write_bytes(b"nothing")
    other.rename(file_of(checkpoint))
    assert torch.equal(model(input_ids=IDS).logits, expected)


@pytest.mark.parametrize("kept", [0, 7, 2000, -1])
def test_a_truncated_file_is_refused(checkpoint: Path, kept: int) -> None:
    content = file_of(checkpoint).read_bytes()
    file_of(checkpoint).write_bytes(content[:kept])
    with pytest.raises(HalfbyteError, match=r"model\.safetensors is not a readable safetensors file"):
        load_model(str(checkpoint))


def test_a_file_that_cannot_be_mapped_is_named(original: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(19, "No such device")

    monkeypatch.setattr("mmap.mmap", refuse)
    with pytest.raises(HalfbyteError, match=r"model\.safetensors cannot be mapped .*No such device.*local disk"):
        load_model(str(original))


# ── Pages ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_spans_are_where_the_tensors_are(original: Path) -> None:
    model, _ = load_model(str(original))
    file = MappedFile(file_of(original))
    assert spans_of(model, [file]) == []  # another mapping of it
    tensors, (file,) = map_safetensors(original)
    content = file_of(original).read_bytes()
    for name, tensor in tensors.items():
        span = file.span_of(tensor[...])
        if span is not None:
            assert content[span.offset : span.offset + span.nbytes] == tensor.view(torch.uint8).numpy().tobytes(), name
            parts = span.parts()
            assert sum(part.nbytes for part in parts) == span.nbytes
            assert parts[0].offset == span.offset
    large = torch.empty(3 << 20, dtype=torch.uint8)
    assert file.span_of(large) is None
