"""Files with random bytes changed: a sentence or a model, and nothing else ever."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from halfbyte import HalfbyteError, add_lora, load_model
from halfbyte.checkpoint.adapter import save_adapter
from halfbyte.huggingface.peft import load_adapter
from models import save_gguf

ROUNDS = 40


def damage(content: bytes, rng: random.Random, within: int) -> bytes:
    """Flip, overwrite, remove, repeat or insert bytes among the first `within`."""
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 5))):
        place = rng.randrange(min(within, len(changed)))
        length = rng.choice((1, 1, 4, 8, 40))
        match rng.randrange(5):
            case 0:
                changed[place] ^= 1 << rng.randrange(8)
            case 1:
                changed[place : place + length] = rng.randbytes(length)
            case 2:
                del changed[place : place + length]
            case 3:
                changed[place:place] = changed[place : place + length]
            case 4:
                changed[place : place + length] = rng.choice((b"\xff", b"\x00", b"\x7f")) * length
    return bytes(changed)


def check(load: Callable[[], object]) -> bool:
    """Whether it loaded; a refusal is one sentence."""
    told = None
    try:
        load()
    except HalfbyteError as error:
        told = str(error)
    assert told is None or (told and "\n" not in told)
    return told is None


@pytest.mark.parametrize("seed", range(ROUNDS))
def test_gguf(seed: int, tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    save_gguf(file, "Q8_0")
    file.write_bytes(damage(file.read_bytes(), random.Random(seed), within=12_000))
    check(lambda: load_model(str(file), fast=False))


@pytest.mark.parametrize("seed", range(ROUNDS))
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_model_directory(seed: int, name: str, model_directory: Callable[[str], Path], tmp_path: Path) -> None:
    directory = tmp_path / "model"
    shutil.copytree(model_directory("llama"), directory)
    file = directory / name if (directory / name).exists() else min(directory.glob("*.safetensors"))
    file.write_bytes(damage(file.read_bytes(), random.Random(seed), within=3000))
    check(lambda: load_model(str(directory), fast=False))


@pytest.mark.parametrize("seed", range(ROUNDS))
def test_a_4_bit_checkpoint(seed: int, model_directory: Callable[[str], Path], tmp_path: Path) -> None:
    model, tokenizer = load_model(str(model_directory("llama")), fast=False)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    content = file.read_bytes()
    header = int.from_bytes(content[:8], "little")
    # Half of the time among the tensors, quantization states with them, so that the file opens.
    start = random.Random(seed).choice((0, 8 + header))
    file.write_bytes(content[:start] + damage(content[start:], random.Random(seed), within=20_000))
    check(lambda: load_model(str(tmp_path), fast=False))


@pytest.mark.parametrize("seed", range(ROUNDS))
@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_an_adapter(seed: int, name: str, model_directory: Callable[[str], Path], tmp_path: Path) -> None:
    from peft import LoraConfig

    model, _ = load_model(str(model_directory("llama")), fast=False)
    adapted = add_lora(model, LoraConfig(r=2, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM"))
    save_adapter(adapted, tmp_path)
    base = adapted.unload()
    (tmp_path / name).write_bytes(damage((tmp_path / name).read_bytes(), random.Random(seed), within=4000))
    check(lambda: load_adapter(base, tmp_path))


@pytest.mark.parametrize("seed", range(ROUNDS))
def test_an_index_of_shards(seed: int, model_directory: Callable[[str], Path], tmp_path: Path) -> None:
    directory = tmp_path / "model"
    shutil.copytree(model_directory("llama"), directory)
    index = directory / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    rng = random.Random(seed)
    for name in rng.sample(sorted(weight_map), 2):
        weight_map[name] = rng.choice(
            [
                None,
                3,
                [],
                {},
                "",
                ".",
                "..",
                "/",
                "/etc/passwd",
                "nothing",
                "config.json",
                "\0",
                "a" * 5000,
                True,
                1e300,
            ]
        )
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert not check(lambda: load_model(str(directory), fast=False)) or "" in weight_map.values()
