"""The keys: sections of them, and the configurations that are made of sections.

Names are flat and are those people already type (transformers, TRL, PEFT). `FinetuneConfig` and `EvaluateConfig` share
`QuantizationKeys`, so a key means the same thing in each. The descriptions below are the `--help` text of the command
line and the tables of docs/configuration.md; there is no second list.
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError

from halfbyte.config.datasets import Columns, DatasetFormat, DatasetPaths
from halfbyte.config.values import (
    BlockSize,
    MaxSteps,
    MemorySize,
    ModelName,
    NumberList,
    PathList,
    PathText,
    Recomputation,
    ResumePoint,
    TargetModules,
    Text,
    Trackers,
)
from halfbyte.config.words import alternatives


class Config(BaseModel):
    """What every configuration has in common: no unknown keys, no changes once it is made, no NaN."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _a_boolean_is_no_number(cls, value: object, info: ValidationInfo) -> object:
        # Python's True is 1, so `seed: yes` would quietly be 1.
        field = cls.model_fields[info.field_name or ""]
        if isinstance(value, bool) and bool not in alternatives(field.annotation):
            raise ValueError("a boolean where none is allowed")
        return value

    @classmethod
    def sections(cls) -> dict[str, list[str]]:
        """Title -> keys, in the order a person reads them; the titles are the sections' docstrings."""
        bases = [base for base in cls.__bases__ if issubclass(base, Config)]
        return {(base.__doc__ or "").strip(): list(base.model_fields) for base in bases}

    def to_dict(self) -> dict[str, Any]:
        """Every key with its value, JSON-able; `load_config(cls, None, config.to_dict())` gives it back."""
        values = self.model_dump(mode="json")
        return {key: values[key] for keys in type(self).sections().values() for key in keys}


class ModelKeys(Config):
    """Model"""

    model_name_or_path: ModelName = Field(description="A model directory, a .gguf file or a hub id.")


class DataKeys(Config):
    """Data"""

    dataset: DatasetPaths = Field(description="The rows to learn from or to look at; several are mixed by weight.")
    dataset_format: DatasetFormat = Field("auto", description="What a row looks like; auto looks at the first row.")
    dataset_split: Text | None = Field(
        None, description="Which split of dataset, or which part: train, train[:5000], test[10%:20%]."
    )
    columns: Columns | None = Field(None, description="Where the keys of the format go by other names in the data.")
    chat_template: Text | None = Field(
        None, description="How a conversation is written: a Jinja file or one of ours; by default the model's own."
    )
    system_prompt: str | None = Field(None, description="A system message for conversations that have none.")
    max_length: int = Field(1024, ge=2, description="Longest row, in tokens; truncation says what becomes of others.")
    truncation: Literal["keep_end", "drop", "split", "error"] = Field(
        "keep_end", description="A longer row loses its beginning, is left out, is cut into several, or stops the run."
    )


class QuantizationKeys(Config):
    """Quantization of the frozen base model"""

    quant_type: Literal["nf4", "fp4", "int4", "none"] = Field(
        "nf4", description="The 4-bit code of the base weights; none leaves them in compute_dtype."
    )
    block_size: BlockSize = Field(64, description="Weights that share one scale, a power of two.")
    double_quant: bool = Field(True, description="Quantize the scales as well, to 8 bits.")
    compute_dtype: Literal["bfloat16", "float32"] = Field(
        "bfloat16", description="What activations and matrix products are computed in."
    )


class LoraKeys(Config):
    """Low-rank adapters"""

    lora_r: int = Field(16, ge=1, description="Rank of the adapters.")
    lora_alpha: int = Field(32, ge=1, description="The adapters are scaled by alpha / r.")
    lora_dropout: float = Field(0.05, ge=0, lt=1, description="Dropout on the input of the adapters.")
    target_modules: TargetModules = Field(
        "all-linear", description="Modules that get an adapter: all-linear, names or a pattern."
    )
    use_dora: bool = Field(
        False, description="Learn each output's magnitude apart from its direction (arXiv 2402.09353)."
    )
    use_rslora: bool = Field(False, description="Scale by alpha / sqrt(r) instead (arXiv 2312.03732).")


class BatchKeys(Config):
    """Batches"""

    per_device_train_batch_size: int = Field(4, ge=1, description="Rows in one forward and backward pass.")
    gradient_accumulation_steps: int = Field(4, ge=1, description="Passes that make up one optimizer step.")
    packing: bool = Field(
        True, description="Put several rows of data into one of max_length tokens; none sees another."
    )
    train_on_source: bool = Field(False, description="Learn the prompts too, not only the answers.")
    train_on_last_turn: bool = Field(False, description="Learn the last answer of a conversation only.")
    data_cache_dir: PathText | None = Field(
        None, description="Where large data sets are kept tokenized; not said: ~/.cache/halfbyte/data."
    )


class CheckKeys(Config):
    """Checks of the data"""

    skip_bad_rows: int = Field(
        0, ge=0, description="Rows that may be left out because they would spoil the run; one more ends it."
    )


class HeldOutKeys(Config):
    """Held-out rows"""

    eval_dataset: DatasetPaths | None = Field(None, description="Rows to measure the loss on, at the end at least.")
    eval_dataset_split: Text | None = Field(None, description="Which split of eval_dataset, or which part.")
    eval_steps: int | None = Field(None, ge=1, description="Steps between two such measurements.")
    per_device_eval_batch_size: int = Field(8, ge=1, description="Rows in one forward pass.")


class ScheduleKeys(Config):
    """Length and optimizer"""

    num_train_epochs: float = Field(1.0, gt=0, description="Times the data is gone through; 0.5 is half of it.")
    max_steps: MaxSteps = Field(-1, description="Optimizer steps in all; -1: as num_train_epochs says.")
    learning_rate: float = Field(2e-4, gt=0, le=1, description="Peak learning rate.")
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = Field(
        "linear", description="What the learning rate does after warming up; linear and cosine end at zero."
    )
    warmup_ratio: float = Field(0.03, ge=0, le=1, description="Share of the steps in which the rate climbs.")
    optim: Literal["adamw", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit"] = Field(
        "adamw", description="AdamW; its state in 32 or 8 bits, in memory or in a file that it is paged to."
    )
    page_dir: PathText | None = Field(
        None, description="Where what is paged has its files; not said: on the disk of output_dir."
    )
    weight_decay: float = Field(0.0, ge=0, le=1, description="Decoupled weight decay of the adapters.")
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="Decay of AdamW's first moment.")
    adam_beta2: float = Field(0.999, ge=0, lt=1, description="Decay of AdamW's second moment.")
    adam_epsilon: float = Field(1e-8, gt=0, description="Added to AdamW's denominator.")
    max_grad_norm: float = Field(0.3, ge=0, description="Longer gradients are scaled down to this; 0: never.")
    gradient_checkpointing: Recomputation = Field(
        "auto",
        description="Recompute activations in the backward pass: less memory, more time; auto: as memory asks.",
    )
    activation_offloading: Literal["none", "disk", "8bit"] = Field(
        "none",
        description="Where recomputed layers' inputs lie until the backward: memory, page_dir, or 8 bits (inexact).",
    )
    max_memory: MemorySize | None = Field(
        None, description="Memory to live within, the model's included; by default what the machine has to spare."
    )
    over_budget: Literal["refuse", "try"] = Field(
        "refuse", description="What becomes of a run that will not fit by the plan: nothing is loaded, or it is tried."
    )


class RunKeys(Config):
    """The run and what it leaves behind"""

    output_dir: PathText = Field(description="Where the adapter, the metrics and the checkpoints go.")
    overwrite_output_dir: bool = Field(False, description="Replace a finished run that is in output_dir.")
    resume_from_checkpoint: ResumePoint = Field(False, description="Go on from a checkpoint; true: the latest.")
    logging_steps: int = Field(1, ge=1, description="Steps between two lines of metrics.")
    save_steps: int | None = Field(None, ge=1, description="Steps between two checkpoints.")
    save_total_limit: int | None = Field(None, ge=1, description="Checkpoints to keep, the newest ones.")
    report_to: Trackers = Field(["tensorboard"], description="Trackers that get the metrics as well, or none.")
    seed: int = Field(42, ge=0, le=2**32 - 1, description="Decides the order of rows, dropout and the first adapters.")
    threads: int | None = Field(None, ge=1, description="CPU threads, where torch's own choice is not wanted.")


class PlannedDataKeys(DataKeys):
    """Data"""

    dataset: DatasetPaths | None = Field(  # type: ignore[assignment]
        None, description="The rows to learn from, which tell how many steps there are."
    )


class PlannedRunKeys(RunKeys):
    """The run and what it leaves behind"""

    output_dir: PathText | None = Field(  # type: ignore[assignment]
        None, description="Not looked at: nothing is left behind."
    )


class EvaluationKeys(Config):
    """Evaluation"""

    adapter: PathText | None = Field(None, description="The directory of a LoRA adapter to put on the model.")
    per_device_eval_batch_size: int = Field(8, ge=1, description="Rows in one forward pass.")
    limit: int | None = Field(None, ge=1, description="Look at the first so many rows only.")
    generate: bool = Field(True, description="Also answer every prompt greedily and count the exact matches.")
    max_new_tokens: int = Field(128, ge=1, description="Longest generated answer, in tokens.")
    output: PathText | None = Field(None, description="A JSON file to write the result to.")


class GenerationKeys(Config):
    """Generation"""

    prompt: Text = Field(description="What the user says; - reads it from standard input.")
    system: str | None = Field(None, description="The system message.")
    chat_template: Text | None = Field(
        None, description="A Jinja file or one of ours; by default the adapter's, then the model's."
    )
    adapter: PathText | None = Field(None, description="The directory of a LoRA adapter to put on the model.")
    max_new_tokens: int = Field(256, ge=1, description="Longest answer, in tokens.")
    temperature: float = Field(0.0, ge=0, description="0 always takes the likeliest token.")
    top_p: float = Field(1.0, gt=0, le=1, description="Draw from the likeliest tokens up to this share.")
    seed: int = Field(42, ge=0, le=2**32 - 1, description="Decides which tokens are drawn.")


class ChatKeys(Config):
    """Chat"""

    adapter: PathList | None = Field(
        None, description="The directory of a LoRA adapter, or of several to switch between; the first speaks first."
    )
    compare: bool = Field(False, description="Answer with the base and with each adapter, side by side.")
    system: str | None = Field(None, description="The system message.")
    chat_template: Text | None = Field(
        None, description="A Jinja file or one of ours; by default the adapter's, then the model's."
    )
    max_new_tokens: int = Field(512, ge=1, description="Longest answer, in tokens.")
    temperature: float = Field(0.0, ge=0, description="0 always takes the likeliest token.")
    top_p: float = Field(1.0, gt=0, le=1, description="Draw from the likeliest tokens up to this share.")
    seed: int = Field(42, ge=0, le=2**32 - 1, description="Decides which tokens are drawn, anew for each answer.")


class CheckpointKeys(Config):
    """Output"""

    output_dir: PathText = Field(description="Where the 4-bit checkpoint goes.")
    overwrite_output_dir: bool = Field(False, description="Replace a checkpoint that is in output_dir.")


class MergeKeys(Config):
    """Merge"""

    adapter: PathList | None = Field(
        None, description="The directory of the LoRA adapter, or of each of several; GGUF needs none."
    )
    output: PathText = Field(description="A new directory, or .gguf file; one that exists is not overwritten.")
    format: Literal["safetensors", "gguf"] = Field(
        "safetensors", description="A directory as transformers has it, or one file for llama.cpp and Ollama."
    )
    base: Literal["original", "quantized", "auto"] | None = Field(
        None,
        description="Onto the 16-bit files, or the 4-bit weights of the training; auto takes the better. By default"
        " quantized, and original for a merge into 4 bits and where there is no adapter.",
    )
    dtype: Literal["bfloat16", "float16", "float32", "nf4", "fp4", "int4", "q8_0", "q4_0"] = Field(
        "bfloat16", description="What the merged weights are in: 16 bits, 32, or 4; q8_0 and q4_0 are GGUF's."
    )
    adapter_only: bool = Field(False, description="Write the adapter alone, as llama.cpp loads it beside its base.")
    max_shard_size: MemorySize = Field("5GB", description="Largest file of weights; more of them are shards.")


class CombinationKeys(Config):
    """Several adapters"""

    weights: NumberList | None = Field(None, description="How much of each adapter; by default 1.")
    combination: Literal["linear", "ties", "dare_linear", "dare_ties"] = Field(
        "linear", description="Their sum, or PEFT's TIES or DARE of what they change."
    )
    density: float = Field(0.5, gt=0, le=1, description="Share of the values that TIES and DARE keep.")
    seed: int = Field(42, ge=0, le=2**32 - 1, description="Decides which values DARE drops.")


class TrainedQuantizationKeys(Config):
    """Quantization of the base in training"""

    quant_type: Literal["nf4", "fp4", "int4", "none"] | None = Field(
        None, description="By default as run.json beside the adapter says, and nf4 where there is none."
    )
    block_size: BlockSize | None = Field(None, description="Likewise, and 64.")
    double_quant: bool | None = Field(None, description="Likewise, and true.")
    compute_dtype: Literal["bfloat16", "float32"] | None = Field(None, description="Likewise, and bfloat16.")


class AuditKeys(Config):
    """Audit"""

    audit: bool = Field(False, description="Measure every way to merge against the adapter on the 4-bit base.")
    dataset: PathText | None = Field(None, description="Held-out rows to measure on; by default text is made up.")
    dataset_format: DatasetFormat = Field("auto", description="What a row looks like; auto looks at the first row.")
    max_length: int = Field(1024, ge=2, description="Longest row, in tokens; the beginning of a longer one is cut off.")
    limit: int | None = Field(None, ge=1, description="Look at the first so many rows only.")
    max_kl: float = Field(0.1, gt=0, description="Mean KL, in nats a token, above which the exit code is 1.")


class FinetuneConfig(
    ModelKeys, DataKeys, CheckKeys, QuantizationKeys, LoraKeys, BatchKeys, ScheduleKeys, HeldOutKeys, RunKeys
):
    """What `halfbyte finetune` reads."""

    @model_validator(mode="after")
    def _keys_agree(self) -> "FinetuneConfig":
        _check_training_keys(self)
        return self


class PlanConfig(
    ModelKeys, PlannedDataKeys, CheckKeys, QuantizationKeys, LoraKeys, BatchKeys, ScheduleKeys, HeldOutKeys,
    PlannedRunKeys,
):  # fmt: skip
    """What `halfbyte plan` reads: what `halfbyte finetune` does, of which the model alone is required."""

    @model_validator(mode="after")
    def _keys_agree(self) -> "PlanConfig":
        _check_training_keys(self)
        return self


class DataConfig(
    ModelKeys, DataKeys, CheckKeys, QuantizationKeys, LoraKeys, BatchKeys, ScheduleKeys, HeldOutKeys, PlannedRunKeys
):
    """What `halfbyte data` reads: what `halfbyte finetune` does, so that a run's file can be given as it is."""

    @model_validator(mode="after")
    def _keys_agree(self) -> "DataConfig":
        _check_training_keys(self)
        return self


class EvaluateConfig(ModelKeys, DataKeys, QuantizationKeys, EvaluationKeys):
    """What `halfbyte evaluate` reads."""


class GenerateConfig(ModelKeys, GenerationKeys, QuantizationKeys):
    """What `halfbyte generate` reads."""


class ChatConfig(ModelKeys, ChatKeys, QuantizationKeys):
    """What `halfbyte chat` reads."""

    @model_validator(mode="after")
    def _keys_agree(self) -> "ChatConfig":
        there = bool(self.adapter) or not self.compare
        _check([("compare", there, "compare sets adapters beside their base: name one with --adapter")])
        return self


class QuantizeConfig(ModelKeys, QuantizationKeys, CheckpointKeys):
    """What `halfbyte quantize` reads."""


class MergeConfig(ModelKeys, MergeKeys, CombinationKeys, TrainedQuantizationKeys, AuditKeys):
    """What `halfbyte merge` reads."""

    @model_validator(mode="after")
    def _keys_agree(self) -> "MergeConfig":
        _check_merge_keys(self)
        return self


def _check_training_keys(config: "FinetuneConfig | PlanConfig | DataConfig") -> None:
    """Raises what pydantic turns into its own error where two keys contradict each other."""
    epochs = config.num_train_epochs
    relations = [
        (
            "max_steps",
            config.max_steps < 0 or epochs == ScheduleKeys.model_fields["num_train_epochs"].default,
            f"max_steps ({config.max_steps}) and num_train_epochs ({epochs:g}) both say how long to train: "
            "leave one of them out",
        ),
        (
            "eval_dataset_split",
            config.eval_dataset_split is None or config.eval_dataset is not None,
            "eval_dataset_split is set but eval_dataset is not, so there is nothing to take that part of",
        ),
        (
            "eval_steps",
            config.eval_steps is None or config.eval_dataset is not None,
            "eval_steps is set but eval_dataset is not, so there is nothing to evaluate on",
        ),
        (
            "save_total_limit",
            config.save_total_limit is None or config.save_steps is not None,
            "save_total_limit is set but save_steps is not, so no checkpoint would be written",
        ),
        (
            "train_on_last_turn",
            not (config.train_on_last_turn and config.train_on_source),
            "train_on_last_turn and train_on_source contradict each other: leave one of them out",
        ),
        (
            "page_dir",
            config.page_dir is None or config.optim.startswith("paged_") or config.activation_offloading == "disk",
            f"page_dir is set, but optim is {config.optim}, which pages nothing: leave page_dir out, or set optim to "
            f"paged_{'adamw_32bit' if config.optim == 'adamw' else config.optim}",
        ),
        (
            "activation_offloading",
            config.activation_offloading == "none" or config.gradient_checkpointing is not False,
            f"activation_offloading is {config.activation_offloading}, which is for layers that are computed again, "
            "and gradient_checkpointing is false: leave one of them out",
        ),
        (
            "overwrite_output_dir",
            not (config.overwrite_output_dir and config.resume_from_checkpoint is True),
            "overwrite_output_dir would remove the checkpoint that resume_from_checkpoint goes on from: "
            "leave one of them out",
        ),
    ]
    _check(relations)


def _check_merge_keys(config: "MergeConfig") -> None:
    is_gguf, named_gguf = config.format == "gguf", config.output.endswith(".gguf")
    blocks, codes = config.dtype in ("q8_0", "q4_0"), config.dtype in ("nf4", "fp4", "int4")
    relations = [
        ("format", is_gguf or not named_gguf, f"{config.output} is the name of a GGUF file: add --format gguf"),
        ("output", named_gguf or not is_gguf, f"GGUF is a file: give {config.output} a name that ends in .gguf"),
        ("dtype", is_gguf or not blocks, f"dtype {config.dtype} is GGUF's: add --format gguf, or take another"),
        (
            "dtype",
            not (is_gguf and codes),
            f"GGUF has no {config.dtype}: take bfloat16, float16, float32, q8_0 or q4_0",
        ),
        ("adapter", is_gguf or bool(config.adapter), "there is no adapter to merge: name its directory with --adapter"),
        ("adapter_only", is_gguf or not config.adapter_only, "adapter_only is GGUF's: add --format gguf"),
        (
            "adapter_only",
            not config.adapter_only or len(config.adapter or []) == 1,
            "adapter_only writes one adapter: name one with --adapter",
        ),
        (
            "audit",
            bool(config.adapter and not config.adapter_only) or not (config.audit or config.base == "auto"),
            "audit and base auto measure a merge, and nothing is merged here: leave them out",
        ),
    ]
    _check(relations)


def _check(relations: list[tuple[str, bool, str]]) -> None:
    for key, holds, sentence in relations:
        if not holds:
            raise PydanticCustomError("keys_disagree", "{sentence}", {"key": key, "sentence": sentence})
