"""The runner of other projects' suites: on a suite of ours, made here, with one test of each kind."""

import subprocess
import sys
from pathlib import Path

import pytest

RUN = Path(__file__).parent / "conformance" / "run.py"

MIXED = """
import bitsandbytes as bnb
import pytest
import torch

def test_the_codes_are_halfbytes():
    import halfbyte
    weight = torch.randn(24, 40)
    codes, state = bnb.functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    ours = halfbyte.quantize_4bit(weight)
    assert torch.equal(codes, ours.packed)
    assert torch.equal(bnb.functional.dequantize_4bit(codes, state), ours.dequantize())
    x = torch.randn(3, 40)
    assert torch.equal(bnb.matmul_4bit(x, codes, state), ours.matmul(x))

def test_a_weight_that_was_quantized_the_other_way_round():
    weight, x = torch.randn(48, 64), torch.randn(3, 48)
    codes, state = bnb.functional.quantize_4bit(weight, quant_type="nf4")
    with pytest.warns(DeprecationWarning, match="Re-quantize from the weight"):  # the words that callers filter by
        y = bnb.matmul_4bit(x, codes, state)
    torch.testing.assert_close(y, x @ bnb.functional.dequantize_4bit(codes, state))

def test_an_answer_that_is_wrong():
    assert bnb.functional.create_dynamic_map().numel() == 255, "there are more"

def test_what_halfbyte_has_not():
    bnb.nn.Linear8bitLt(8, 8)

def test_a_name_that_is_not_offered():
    bnb.nn.NoSuchLayer

def test_the_hub():
    from transformers import AutoModelForCausalLM
    AutoModelForCausalLM.from_pretrained("somebody/some-model")

@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA is required")
def test_a_gpu():
    pass

def test_that_a_suite_leaves_out_on_a_cpu():
    pytest.skip("blocks of one size alone on CPU/XPU")
"""

# A checkout has a folder of the name itself, which must not be what is tested.
GOOD = """
import bitsandbytes

def test_it_is_ours():
    assert "conformance" in bitsandbytes.__file__
"""

MISSING = "import a_package_that_nobody_has\n"
DYING = "import os\n\nos._exit(7)\n"


# What a suite's tests look for around halfbyte's computations, and no computation of ours shows.
NAMES = """
import logging

import bitsandbytes as bnb
import pytest
import torch

import halfbyte


@pytest.fixture
def manager():
    manager = bnb.optim.GlobalOptimManager.get_instance()
    manager.initialize()
    yield manager
    manager.initialize()

def stepped(*parameters, **settings):
    optimizer = bnb.optim.AdamW(parameters, **settings)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return [optimizer.state[parameter]["state1"].dtype for parameter in parameters]

def test_bits_of_a_parameters_own(manager):
    large, larger = torch.zeros(64, 64), torch.zeros(64, 128)
    manager.register_parameters([large, larger])
    manager.override_config(larger, "optim_bits", 8)
    assert stepped(large, larger) == [torch.float32, torch.uint8]

def test_bits_of_a_modules_parameter(manager):
    layer, other = torch.nn.Embedding(64, 64), torch.nn.Parameter(torch.zeros(64, 64))
    manager.register_module_override(layer, "weight", {"optim_bits": 32})
    assert stepped(layer.weight, other, optim_bits=8) == [torch.float32, torch.uint8]

def test_a_setting_that_is_not_here(manager):
    manager.override_config(torch.zeros(2), "lr", 1.0)

@pytest.mark.parametrize("width", [128, 96])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
def test_an_embedding(width, storage):
    dense = torch.nn.Embedding(10, width)
    table = bnb.nn.EmbeddingNF4(10, width, quant_storage=storage)
    table.load_state_dict(dense.state_dict())
    table.to("cpu")
    tokens = torch.tensor([[3, 0], [9, 3]])
    rows = halfbyte.quantize_4bit(dense.weight.data, "nf4", 64, double_quant=False).dequantize()[tokens]
    assert torch.equal(table(tokens), rows)

def test_slowness_is_told_by_log_and_by_a_warning_once(caplog):
    layers = torch.nn.Sequential(*(bnb.nn.Linear4bit(64, 64) for _ in range(3))).to("cpu")
    with pytest.warns(UserWarning, match="slow inference or training") as told, caplog.at_level(logging.WARNING):
        layers(torch.ones(2, 64, dtype=torch.float16))
    assert len(told) == 1
    assert "slow inference or training" in caplog.text
"""

BESIDE = "import a_package_beside\n\ndef test_it():\n    pass\n"


def conformance(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(RUN), *arguments], capture_output=True, text=True, check=False)


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    root = tmp_path / "checkout"
    for folder in ("tests", "bitsandbytes"):
        (root / folder).mkdir(parents=True)
    (root / "bitsandbytes" / "__init__.py").touch()
    files = {"test_mixed.py": MIXED, "test_good.py": GOOD, "test_missing.py": MISSING, "test_dying.py": DYING}
    for name, text in files.items():
        (root / "tests" / name).write_text(text, encoding="utf-8")
    return root


def test_every_outcome_is_told_with_its_reason(suite: Path) -> None:
    done = conformance(str(suite))
    assert done.returncode == 1, done.stderr
    rows = {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines() if line.startswith("test_")}
    assert rows == {
        "test_dying.py": ["0", "1", "0"],
        "test_good.py": ["1", "0", "0"],
        "test_missing.py": ["0", "0", "1"],
        "test_mixed.py": ["2", "1", "5"],
    }
    reasons = done.stdout.partition("Not applicable, and why:")[2].partition("Failed:")[0]
    told = ("LLM.int8()", "bitsandbytes.nn.NoSuchLayer", "the hub", "needs a GPU", "a_package_that_nobody_has")
    for words in (*told, "the suite skips it: blocks of one size alone on CPU/XPU"):
        assert reasons.count(words) == 1
    failed = done.stdout.partition("Failed:")[2]
    assert "test_an_answer_that_is_wrong\n      AssertionError: there are more" in failed
    assert "code 7" in failed
    assert not list(suite.rglob("__pycache__"))  # nothing is written into the checkout


def test_a_suite_of_which_all_that_applies_passes(suite: Path) -> None:
    done = conformance(str(suite / "tests"), "--only", "test_good.py", "test_missing.py")
    assert done.returncode == 0, done.stdout + done.stderr


def test_names_around_the_computations(suite: Path) -> None:
    (suite / "tests" / "test_names.py").write_text(NAMES, encoding="utf-8")
    done = conformance(str(suite), "--only", "test_names.py")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "test_names.py       7       0               1" in done.stdout


def test_what_is_installed_beside_a_suite_is_found_from_anywhere(
    suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "beside").mkdir()
    (tmp_path / "beside" / "a_package_beside.py").touch()
    (suite / "tests" / "test_beside.py").write_text(BESIDE, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", "beside")  # of the directory that the runner is started in, not of the suite's
    done = conformance(str(suite), "--only", "test_beside.py")
    assert "test_beside.py       1       0               0" in done.stdout, done.stdout


@pytest.mark.parametrize("arguments", [[], ["nowhere"], ["."], [".", "--only", "test_none.py"]])
def test_nothing_to_run_is_one_sentence(arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = conformance(*arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
