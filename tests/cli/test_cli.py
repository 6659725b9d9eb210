"""The command line: what it prints, what it passes on, and the code it exits with."""

import io
import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from halfbyte.cli import EXIT_BAD_INPUT, EXIT_INTERRUPTED, SUBCOMMANDS, main
from halfbyte.config import FinetuneConfig
from halfbyte.errors import HalfbyteError

REQUIRED = ["--model_name_or_path", "model", "--dataset", "rows.jsonl", "--output_dir", "runs/first"]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "halfbyte.cli", *arguments], capture_output=True, text=True, check=False
    )


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Stands in for the fine-tuning run; holds what it was called with."""
    import halfbyte.recipes.finetune as recipe

    calls: dict[str, Any] = {"interrupted": False}

    def finetune(config: FinetuneConfig, console: Console) -> recipe.RunResult:
        calls["finetune"] = config
        return recipe.RunResult("runs/[1]", 9, 10, 0.5, 0.25, 3.0, 1234.0, 2**30, "abc", calls["interrupted"])

    monkeypatch.setattr(recipe, "finetune", finetune)
    monkeypatch.setattr(recipe, "dry_run", lambda config, console: calls.update(dry_run=config))
    return calls


# ── Help ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert main([]) == 0
    assert capsys.readouterr().out == shown
    for name, line in SUBCOMMANDS.items():
        assert name in shown
        assert line in shown


@pytest.mark.parametrize("name", SUBCOMMANDS)
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "--help"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"Usage: halfbyte {name} [OPTIONS]")
    if name not in ("doctor", "inspect"):
        assert "--model_name_or_path MODEL" in shown
        assert "[default: nf4]" in shown or name == "merge"  # which goes by what the adapter's run says


def test_help_needs_neither_torch_nor_transformers() -> None:
    heavy = "{'torch', 'transformers', 'peft', 'numpy'}"
    for arguments in (["--help"], ["finetune", "--help"], ["evaluate", "--help"], ["doctor", "--help"]):
        code = (
            f"import sys; from halfbyte.cli import main; main({arguments}); sys.exit(str({heavy} & set(sys.modules)))"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert done.stderr == "set()\n", arguments


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("halfbyte 0.")


# ── Flags ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_flags_become_a_configuration(seen: dict[str, Any]) -> None:
    flags = ["--learning_rate", "1e-4", "--target_modules", "q_proj,v_proj", "--report_to", "none", "--seed=7"]
    assert main(["finetune", *REQUIRED, *flags]) == 0
    config = seen["finetune"]
    assert (config.learning_rate, config.target_modules, config.report_to, config.seed) == (
        1e-4,
        ["q_proj", "v_proj"],
        [],
        7,
    )
    assert config.lora_r == 16  # what is not typed keeps its default


@pytest.mark.parametrize(
    ("typed", "value"),
    [
        (["--use_rslora"], True),
        (["--use_rslora", "--seed", "1"], True),
        (["--use_rslora", "true"], True),
        (["--use_rslora", "false"], False),
        (["--use_rslora=false"], False),
        ([], False),
    ],
)
def test_booleans(seen: dict[str, Any], typed: list[str], value: bool) -> None:
    assert main(["finetune", *REQUIRED, *typed]) == 0
    assert seen["finetune"].use_rslora is value


def test_a_bare_resume_means_the_latest_and_a_path_means_that_one(seen: dict[str, Any]) -> None:
    assert main(["finetune", *REQUIRED, "--resume_from_checkpoint"]) == 0
    assert seen["finetune"].resume_from_checkpoint is True
    assert main(["finetune", *REQUIRED, "--resume_from_checkpoint", "runs/checkpoint-3"]) == 0
    assert seen["finetune"].resume_from_checkpoint == "runs/checkpoint-3"


def test_it_says_what_came_of_a_run(seen: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["finetune", *REQUIRED]) == 0
    shown = "runs/[1]: the adapter after 9 of 10 steps; loss 0.5000, 0.2500 on held-out rows; 1,234 tokens/s, at most "
    assert capsys.readouterr().out == shown + "1.00 GiB\n"
    seen["interrupted"] = True
    assert main(["finetune", *REQUIRED]) == EXIT_INTERRUPTED


def test_a_file_and_flags(seen: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("model_name_or_path: model\ndataset: rows.jsonl\noutput_dir: o\nlora_r: 8\nlora_alpha: 4\n")
    assert main(["finetune", str(path), "--lora_r", "64", "--dry_run"]) == 0
    assert (seen["dry_run"].lora_r, seen["dry_run"].lora_alpha) == (64, 4)
    assert "finetune" not in seen


# ── Bad input: one sentence, exit code 2 ────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["finetun"], "there is no command 'finetun': did you mean finetune?"),
        (
            ["qwerty"],
            f"there is no command 'qwerty': there are {', '.join(SUBCOMMANDS)}",
        ),
        (["--frobnicate"], "unknown flag --frobnicate: halfbyte --help lists the flags"),
        (["finetune", "--learning-rate", "1"], "unknown flag --learning-rate: did you mean --learning_rate?"),
        (["finetune", "--lr", "1"], "unknown flag --lr: did you mean --learning_rate?"),
        (["finetune", "--dry-run"], "unknown flag --dry-run: did you mean --dry_run?"),
        (["finetune", "--zzz"], "unknown flag --zzz: halfbyte finetune --help lists the flags"),
        (["evaluate", "--learning_rate", "1"], "unknown flag --learning_rate: halfbyte evaluate --help"),
        (["finetune", "--seed"], "option '--seed' requires an argument"),
        (["finetune", "a.yaml", "b.yaml"], "got unexpected extra argument (b.yaml)"),
        (["finetune", "absent.yaml"], "absent.yaml: there is no such file"),
        (["finetune", "."], ". is a directory, where a YAML file was expected"),
        (["finetune"], "model_name_or_path is missing (a model directory, a .gguf file or a hub id): give --model_"),
        (["finetune", *REQUIRED, "--learning_rate", "x"], "--learning_rate is 'x', but it must be a number above 0"),
        (["finetune", *REQUIRED, "--block_size", "63"], "--block_size is '63', but it must be a power of two from"),
        (["finetune", *REQUIRED, "--use_rslora", "maybe"], "--use_rslora is 'maybe', but it must be true or false"),
        (["finetune", *REQUIRED, "--eval_steps", "3"], "eval_steps is set but eval_dataset is not"),
        (["generate", "--model_name_or_path", "m"], "prompt is missing (text): give --prompt"),
        (["generate", "--top_p", "0"], "--top_p is '0', but it must be a number above 0 and at most 1"),
        (["quantize", "--model_name_or_path", "m"], "output_dir is missing (a path): give --output_dir"),
        (["evaluate", "--limit", "0"], "--limit is '0', but it must be a whole number of at least 1"),
        (["doctor", "--frobnicate"], "unknown flag --frobnicate: halfbyte doctor --help lists the flags"),
    ],
)
def test_bad_input_is_one_sentence(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == EXIT_BAD_INPUT
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith(f"error: {sentence}")
    assert shown.err.count("\n") == 1


def test_the_process_exits_with_the_code() -> None:
    done = run("finetune", "--seed", "x")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: --seed is 'x', but it must be a whole number of at least 0 and at most 4294967295\n"
    assert run("--version").returncode == 0


def _raise(error: BaseException) -> Any:
    def raising(config: Any, console: Any) -> None:
        raise error

    return raising


@pytest.fixture
def raising(monkeypatch: pytest.MonkeyPatch):
    import halfbyte.recipes.finetune as recipe

    return lambda error: monkeypatch.setattr(recipe, "finetune", _raise(error))


def test_a_message_stays_on_one_line_and_gives_a_terminal_no_orders(raising, capsys) -> None:
    raising(HalfbyteError("rows.jsonl:3: the key 'a\nb' \x1b[2Jcontains [red]things[/red] " + "é" * 200))
    assert main(["finetune", *REQUIRED]) == EXIT_BAD_INPUT
    expected = r"error: rows.jsonl:3: the key 'a\nb' \x1b[2Jcontains [red]things[/red] "
    assert capsys.readouterr().err == expected + "é" * 200 + "\n"


def test_a_bug_keeps_its_traceback(raising) -> None:
    for error in (RuntimeError("ours"), EOFError("ours"), OSError("ours")):
        raising(error)
        with pytest.raises(type(error), match="ours"):
            main(["finetune", *REQUIRED])


def test_an_interrupt_is_one_line(raising, capsys) -> None:
    raising(KeyboardInterrupt())
    assert main(["finetune", *REQUIRED]) == EXIT_INTERRUPTED
    assert capsys.readouterr().err == "interrupted\n"


def test_a_reader_that_goes_away_is_no_bug() -> None:
    command = f"{sys.executable} -m halfbyte.cli finetune --help | head -n 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.stdout.startswith("Usage: halfbyte finetune")
    assert done.stderr == ""


# ── The other commands ──────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Sample:
    prompt: str
    expected: str
    got: str


@dataclass(frozen=True)
class Result:
    loss: float
    perplexity: float
    supervised_tokens: int
    rows: int
    exact_match: float | None
    samples: list[Sample]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@pytest.fixture
def evaluation(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    import halfbyte.recipes.evaluate as recipe

    samples = [Sample("two [b]loaves[/b]", "{}", "{}"), Sample("one", '{"a":1}', "no \x1b[2J")]
    result = Result(0.5, 1.6487, 1234, 2, 0.5, samples, 3.25)
    monkeypatch.setattr(recipe, "evaluate", lambda config, console: result)
    return ["evaluate", "--model_name_or_path", "model", "--dataset", "rows.jsonl"]


def test_evaluate_prints_a_table(evaluation: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(evaluation) == 0
    shown = capsys.readouterr().out
    for words in ("0.5000", "1.649", "1,234", "50.0%", "3.2", "two [b]loaves[/b]", '{"a":1}'):
        assert words in shown
    assert "\x1b" not in shown


def test_evaluate_prints_json_and_nothing_else(evaluation: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*evaluation, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["supervised_tokens"] == 1234
    assert result["samples"][1]["expected"] == '{"a":1}'


def test_generate_streams_the_answer(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import halfbyte.recipes.generate as recipe

    def generate(model_name_or_path: str, prompt: str, **options: Any) -> str:
        assert (model_name_or_path, prompt) == ("model", "Good morning")
        assert options.pop("stream")("Good ") is None
        assert options == {
            "adapter": None,
            "chat_template": None,
            "system": "Be kind.",
            "quant_type": "nf4",
            "block_size": 64,
            "double_quant": True,
            "compute_dtype": "bfloat16",
            "max_new_tokens": 9,
            "temperature": 0.7,
            "top_p": 1.0,
            "seed": 42,
        }
        return "Good "

    monkeypatch.setattr(recipe, "generate", generate)
    monkeypatch.setattr(sys, "stdin", io.StringIO("Good morning"))
    flags = ["--system", "Be kind.", "--temperature", "0.7", "--max_new_tokens", "9"]
    assert main(["generate", "--model_name_or_path", "model", "--prompt", "-", *flags]) == 0
    assert capsys.readouterr().out == "Good \n"


def test_quantize_says_what_it_wrote(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import halfbyte.recipes.quantize as recipe

    def quantize(model_name_or_path: str, output_dir: str, **options: Any) -> recipe.QuantizeResult:
        assert (model_name_or_path, output_dir, options["overwrite"]) == ("model", "out[1]", True)
        assert options["block_size"] == 128
        return recipe.QuantizeResult(134_515_008, 106_168_320, 54_800_000, 4.127, 2.5, "abc123")

    monkeypatch.setattr(recipe, "quantize", quantize)
    flags = ["--output_dir", "out[1]", "--block_size", "128", "--overwrite_output_dir"]
    assert main(["quantize", "--model_name_or_path", "model", *flags]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("out[1]: 134,515,008 parameters, 106,168,320 of them at 4.127 bits; 52.3 MiB in 2.5 s\n")
    assert "sha256 abc123" in shown
