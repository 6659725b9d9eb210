"""Configuration: what is read comes out typed, and what is wrong is told in one sentence that says where."""

import json
import re
from pathlib import Path
from typing import get_args

import pytest

from halfbyte.cli.flags import default_text
from halfbyte.config import (
    ChatConfig,
    Config,
    DataConfig,
    EvaluateConfig,
    FinetuneConfig,
    GenerateConfig,
    MergeConfig,
    PlanConfig,
    QuantizeConfig,
    allowed,
    load_config,
    nearest,
)
from halfbyte.config.datasets import DatasetFormat
from halfbyte.data.formats import FORMATS
from halfbyte.errors import HalfbyteError

REQUIRED = "model_name_or_path: model\ndataset: rows.jsonl\noutput_dir: runs/first\n"  # three lines
DATA_WORDS = "a file, a directory, a hub id, or a list of {path, weight, split, dataset_format, columns}"
ALL = [
    *(FinetuneConfig, DataConfig, PlanConfig, EvaluateConfig),
    *(GenerateConfig, ChatConfig, QuantizeConfig, MergeConfig),
]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)

    def write(text: str | bytes) -> str:
        Path("run.yaml").write_bytes(text.encode() if isinstance(text, str) else text)
        return "run.yaml"

    return write


@pytest.mark.parametrize(
    ("line", "key", "value"),
    [
        ("learning_rate: 1e-4", "learning_rate", 1e-4),  # YAML 1.1 reads text here: there is no dot
        ("learning_rate: 1.0e-4", "learning_rate", 1e-4),
        ("learning_rate: '3e-5'", "learning_rate", 3e-5),
        ("adam_epsilon: 1E-6", "adam_epsilon", 1e-6),
        ("seed: 7", "seed", 7),
        ("seed: 7.0", "seed", 7),
        ("double_quant: off", "double_quant", False),
        ("double_quant: 'false'", "double_quant", False),
        ("use_rslora: yes", "use_rslora", True),
        ("quant_type: none", "quant_type", "none"),
        ("block_size: 4096", "block_size", 4096),
        ("target_modules: all-linear", "target_modules", "all-linear"),
        ("target_modules: q_proj, v_proj", "target_modules", ["q_proj", "v_proj"]),
        ("target_modules: [q_proj, v_proj]", "target_modules", ["q_proj", "v_proj"]),
        (r"target_modules: .*\.(q|v)_proj{1,2}", "target_modules", r".*\.(q|v)_proj{1,2}"),
        ("report_to: none", "report_to", []),
        ("report_to: []", "report_to", []),
        ("report_to: tensorboard, wandb", "report_to", ["tensorboard", "wandb"]),
        ("resume_from_checkpoint: true", "resume_from_checkpoint", True),
        ("resume_from_checkpoint: 'true'", "resume_from_checkpoint", True),
        ("resume_from_checkpoint: runs/a/checkpoint-3", "resume_from_checkpoint", "runs/a/checkpoint-3"),
        ("max_steps: 60", "max_steps", 60),
        ("threads: null", "threads", None),
        ("dataset_split: 'train[:5000]'", "dataset_split", "train[:5000]"),
        ("columns: {output: answer}", "columns", {"output": "answer"}),
        ("columns: instruction=question, output=answer", "columns", {"instruction": "question", "output": "answer"}),
        ("<<: {lora_r: 8}", "lora_r", 8),
    ],
)
def test_a_value_is_read_as_its_type(write, line: str, key: str, value: object) -> None:
    config = load_config(FinetuneConfig, write(REQUIRED + line), {})
    assert getattr(config, key) == value
    assert type(getattr(config, key)) is type(value)


WRONG = [
    ("learning_rate: fast", "run.yaml:4: learning_rate is 'fast', but it must be a number above 0 and at most 1"),
    ("learning_rate: 2e4", "run.yaml:4: learning_rate is '2e4', but it must be a number above 0 and at most 1"),
    ("learning_rate: .nan", "run.yaml:4: learning_rate is nan, but it must be a number above 0 and at most 1"),
    ("learning_rate:", "run.yaml:4: learning_rate is null, but it must be a number above 0 and at most 1"),
    ("adam_epsilon: .inf", "run.yaml:4: adam_epsilon is inf, but it must be a number above 0"),
    ("seed: yes", "run.yaml:4: seed is true, but it must be a whole number of at least 0 and at most 4294967295"),
    ("lora_r: 0", "run.yaml:4: lora_r is 0, but it must be a whole number of at least 1"),
    ("lora_r: 1.5", "run.yaml:4: lora_r is 1.5, but it must be a whole number of at least 1"),
    ("lora_dropout: 1", "run.yaml:4: lora_dropout is 1, but it must be a number of at least 0 and below 1"),
    ("block_size: 48", "run.yaml:4: block_size is 48, but it must be a power of two from 32 to 4096"),
    ("block_size: 16", "run.yaml:4: block_size is 16, but it must be a power of two from 32 to 4096"),
    ("block_size: 8192", "run.yaml:4: block_size is 8192, but it must be a power of two from 32 to 4096"),
    ("quant_type: nf5", "run.yaml:4: quant_type is 'nf5', but it must be nf4, fp4, int4 or none"),
    ("double_quant: maybe", "run.yaml:4: double_quant is 'maybe', but it must be true or false"),
    (
        "optim: adamw_torch",
        "run.yaml:4: optim is 'adamw_torch', but it must be adamw, adamw_8bit, paged_adamw_32bit or paged_adamw_8bit",
    ),
    (
        "page_dir: p",
        "run.yaml:4: page_dir is set, but optim is adamw, which pages nothing: leave page_dir out, or set optim to "
        "paged_adamw_32bit",
    ),
    (
        "activation_offloading: 8bit\ngradient_checkpointing: false",
        "run.yaml:4: activation_offloading is 8bit, which is for layers that are computed again, and "
        "gradient_checkpointing is false: leave one of them out",
    ),
    (
        "max_steps: 0",
        "run.yaml:4: max_steps is 0, but it must be a whole number of at least 1, or -1 to go by num_train_epochs",
    ),
    (
        "report_to: [wandb, wandbb]",
        "run.yaml:4: report_to is 'wandbb', but it must be none, or names from aim, clearml, comet_ml, dvclive, "
        "mlflow, swanlab, tensorboard, trackio, wandb",
    ),
    (
        "target_modules: []",
        "run.yaml:4: target_modules is [], but it must be all-linear, a list of module names or a regular expression",
    ),
    (
        "target_modules: '((('",
        "run.yaml:4: target_modules is '(((', but it must be all-linear, a list of module names or a regular",
    ),
    (
        "eval_dataset: 2026-01-31",
        "run.yaml:4: eval_dataset is 2026-01-31, but it must be " + DATA_WORDS + " (in quotes)",
    ),
    ("eval_dataset: ''", "run.yaml:4: eval_dataset is '', but it must be a file, a directory, a hub id, or a list"),
    ("eval_dataset: []", "run.yaml:4: eval_dataset is [], but it must be a file, a directory, a hub id, or a list"),
    (
        "eval_dataset: {path: a, weigt: 2}",
        "run.yaml:4: eval_dataset is [{'path': 'a', 'weigt': 2}], but it must be a file, a directory",
    ),
    (
        "eval_dataset: [{path: a, weight: 0}]",
        "run.yaml:4: eval_dataset is [{'path': 'a', 'weight': 0}], but it must be a file, a directory",
    ),
    (
        "columns: answer",
        "run.yaml:4: columns is 'answer', but it must be key=column, separated by commas, or a mapping",
    ),
    ("columns: {}", "run.yaml:4: columns is {}, but it must be key=column"),
    ("eval_dataset_split: test", "run.yaml:4: eval_dataset_split is set but eval_dataset is not"),
    ("lr: 1e-4", "run.yaml:4: unknown key 'lr': did you mean learning_rate?"),
    ("learnin_rate: 1e-4", "run.yaml:4: unknown key 'learnin_rate': did you mean learning_rate?"),
    ("per-device-train-batch-size: 2", "did you mean per_device_train_batch_size?"),
    ("frobnicate: 1", "run.yaml:4: unknown key 'frobnicate': docs/configuration.md lists the keys"),
    ("1: 2", "run.yaml:4: unknown key '1': docs/configuration.md lists the keys"),
    ("seed: 1\nseed: 2", "run.yaml:5: seed is set a second time; line 4 sets it too"),
    ("eval_steps: 5", "run.yaml:4: eval_steps is set but eval_dataset is not, so there is nothing to evaluate on"),
    ("save_total_limit: 2", "run.yaml:4: save_total_limit is set but save_steps is not"),
    ("max_steps: 9\nnum_train_epochs: 3", "run.yaml:4: max_steps (9) and num_train_epochs (3) both say how long"),
    (
        "resume_from_checkpoint: true\noverwrite_output_dir: true",
        "run.yaml:5: overwrite_output_dir would remove the checkpoint that resume_from_checkpoint goes on from",
    ),
    ("seed: [1", "run.yaml:4: not valid YAML: expected ',' or ']'"),
    ("seed: 1: 2", "run.yaml:4: not valid YAML: mapping values are not allowed here"),
    ("seed: !!python/object:os.system 1", "run.yaml:4: not valid YAML: could not determine a constructor"),
    ("seed: 2026-13-45", "run.yaml: not valid YAML: month must be in 1..12"),
    ("seed: \x01", "run.yaml: not valid YAML: unacceptable character #x0001"),
    ("seed: " + "[\n" * 3000, "run.yaml: not valid YAML: nested too deeply"),
    ("? [1, 2]\n: 3", "run.yaml:4: not valid YAML: found unhashable key"),
    ("---\nseed: 1", "run.yaml:4: not valid YAML: but found another document"),
]


@pytest.mark.parametrize(("line", "sentence"), WRONG, ids=[line[:40] for line, _ in WRONG])
def test_a_wrong_line_is_told_in_one_sentence(write, line: str, sentence: str) -> None:
    with pytest.raises(HalfbyteError) as caught:
        load_config(FinetuneConfig, write(REQUIRED + line), {})
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("- a\n- b\n", "run.yaml:1: expected lines of the form `key: value`"),
        ("\n\njust words\n", "run.yaml:3: expected lines of the form `key: value`"),
        (b"\xff\xfe\x00", "run.yaml: not UTF-8 text (byte 0), so not a YAML file"),
        ("", f"dataset is missing ({DATA_WORDS}): set it in run.yaml or give --dataset"),
        ("# nothing but a comment\n", "dataset is missing"),
        ("~\n", "run.yaml:1: expected lines of the form `key: value`"),
    ],
)
def test_a_file_that_is_no_configuration(write, content: str | bytes, sentence: str) -> None:
    path = write(content)
    with pytest.raises(HalfbyteError, match=re.escape(sentence)):
        load_config(FinetuneConfig, path, {"model_name_or_path": "model"})


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(HalfbyteError, match=r"absent\.yaml: there is no such file"):
        load_config(FinetuneConfig, tmp_path / "absent.yaml", {})
    with pytest.raises(HalfbyteError, match="is a directory, where a YAML file was expected"):
        load_config(FinetuneConfig, tmp_path, {})


def test_a_byte_order_mark_is_no_part_of_the_first_key(write) -> None:
    assert load_config(FinetuneConfig, write(b"\xef\xbb\xbf" + REQUIRED.encode()), {}).dataset == "rows.jsonl"


def test_a_flag_wins_and_is_named(write) -> None:
    path = write(REQUIRED + "learning_rate: 1e-5\nlora_r: 8")
    config = load_config(FinetuneConfig, path, {"learning_rate": "1e-3"})
    assert (config.learning_rate, config.lora_r) == (1e-3, 8)
    with pytest.raises(HalfbyteError, match=r"^--learning_rate is 'x', but it must be a number"):
        load_config(FinetuneConfig, path, {"learning_rate": "x"})
    with pytest.raises(HalfbyteError, match=r"^unknown key 'lr': did you mean learning_rate"):
        load_config(FinetuneConfig, path, {"lr": "1"})


def test_a_flag_for_the_length_beats_the_other_key_for_the_length(write) -> None:
    by_epochs = load_config(FinetuneConfig, write(REQUIRED + "max_steps: 9"), {"num_train_epochs": "3"})
    assert (by_epochs.max_steps, by_epochs.num_train_epochs) == (-1, 3.0)
    by_steps = load_config(FinetuneConfig, write(REQUIRED + "num_train_epochs: 3"), {"max_steps": "9"})
    assert by_steps.max_steps == 9
    kept = load_config(FinetuneConfig, write(REQUIRED + "num_train_epochs: 3"), {"max_steps": "-1"})
    assert kept.num_train_epochs == 3.0


def test_what_is_missing_comes_after_what_is_wrong(write) -> None:
    with pytest.raises(HalfbyteError, match=r"run\.yaml:1: seed is 'x'"):
        load_config(FinetuneConfig, write("seed: x"), {})


def test_several_data_sets_each_with_settings_of_its_own(write) -> None:
    text = REQUIRED.replace("rows.jsonl", "[a.jsonl, {path: ~/b, weight: 0.5, split: test, columns: output=answer}]")
    plain, mapped = load_config(FinetuneConfig, write(text), {}).dataset
    assert plain == "a.jsonl"
    assert (mapped.path[0], mapped.weight, mapped.split, mapped.dataset_format) == ("/", 0.5, "test", None)
    assert mapped.columns == {"output": "answer"}
    text = REQUIRED.replace("rows.jsonl", "{path: a.jsonl, dataset_format: chip2}")
    (only,) = load_config(FinetuneConfig, write(text), {}).dataset
    assert (only.path, only.dataset_format) == ("a.jsonl", "chip2")


def test_the_formats_are_those_that_the_readers_know() -> None:
    assert get_args(DatasetFormat) == ("auto", *FORMATS)


def test_home_is_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    values = {"model_name_or_path": "~/model", "dataset": "~/rows.jsonl", "output_dir": "~/runs/~first"}
    config = load_config(FinetuneConfig, None, values)
    assert config.model_name_or_path == "/home/someone/model"
    assert config.dataset == "/home/someone/rows.jsonl"
    assert config.output_dir == "/home/someone/runs/~first"


@pytest.mark.parametrize(
    "lines",
    [
        "",
        "eval_dataset: [a, {path: b, weight: 2}]",
        "columns: a=b",
        "max_steps: 9",
        "report_to: none",
        "target_modules: [q_proj]",
        "resume_from_checkpoint: true",
    ],
)
def test_a_resolved_configuration_can_be_read_again(write, lines: str) -> None:
    config = load_config(FinetuneConfig, write(REQUIRED + lines), {})
    values = json.loads(json.dumps(config.to_dict()))
    assert list(values)[:2] == ["model_name_or_path", "dataset"]
    assert set(values) == set(FinetuneConfig.model_fields)
    assert load_config(FinetuneConfig, None, values) == config


def test_a_configuration_does_not_change() -> None:
    config = load_config(QuantizeConfig, None, {"model_name_or_path": "m", "output_dir": "o"})
    with pytest.raises(ValueError, match="frozen"):
        config.output_dir = "p"


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("lr", "learning_rate"), ("epochs", "num_train_epochs"), ("LORA-R", "lora_r"), ("qwertyuiop", None)],
)
def test_the_nearest_key(typed: str, meant: str | None) -> None:
    assert nearest(typed, list(FinetuneConfig.model_fields)) == meant


def test_a_suggestion_is_a_key_of_that_command() -> None:
    assert nearest("lr", list(QuantizeConfig.model_fields)) is None


@pytest.mark.parametrize("cls", ALL)
def test_every_key_is_described_once(cls: type[Config]) -> None:
    listed = [key for keys in cls.sections().values() for key in keys]
    assert sorted(listed) == sorted(cls.model_fields)
    for key, field in cls.model_fields.items():
        assert (field.description or "").endswith("."), key
        assert allowed(field).text, key


@pytest.mark.parametrize("cls", ALL)
def test_the_documentation_lists_every_key_as_it_is(cls: type[Config]) -> None:
    page = (Path(__file__).parents[1] / "docs" / "configuration.md").read_text()
    part = re.split(r"^## ", page, flags=re.M)
    (part,) = [text for text in part if text.startswith(f"`halfbyte {cls.__name__.removesuffix('Config').lower()}`")]
    for key, field in cls.model_fields.items():
        default = "required" if field.is_required() else "" if field.default is None else default_text(field.default)
        row = f"| `{key}` | {default} | {allowed(field).text} | {field.description} |"
        assert row in part, row
    assert len(re.findall(r"^\| `", part, flags=re.M)) == len(cls.model_fields)
