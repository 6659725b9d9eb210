"""A fine-tuning run, told in order: check, read the data, load the model in 4 bits, train, save."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from rich.console import Console
from safetensors import SafetensorError
from transformers import PreTrainedTokenizerBase

from halfbyte.checkpoint.adapter import save_adapter
from halfbyte.checkpoint.fingerprint import weights_sha256
from halfbyte.checkpoint.output import check_output_dir, clear_run
from halfbyte.checkpoint.resume import (
    find_checkpoint,
    list_checkpoints,
    read_state,
    restore_checkpoint,
    save_checkpoint,
)
from halfbyte.config import FinetuneConfig
from halfbyte.data import Batch, Example, fingerprint, pack, preview, training_steps
from halfbyte.data.checks import find_control_tokens
from halfbyte.data.masks import special_tokens
from halfbyte.errors import HalfbyteError
from halfbyte.huggingface import add_lora, describe_replacements, load_model, prepare_tokenizer, replacements_of
from halfbyte.huggingface.offload import offloaded
from halfbyte.huggingface.segments import keeps_packed_apart
from halfbyte.optim import OPTIMIZERS, AdamW, check_page_dir, learning_rate_factor
from halfbyte.plan import Plan
from halfbyte.recipes.data_sources import held_out_sources, training_sources
from halfbyte.recipes.display import Display
from halfbyte.recipes.interrupt import heard_at_step_end
from halfbyte.recipes.memory import give_back_freed_memory, plan_memory
from halfbyte.recipes.metrics import Metrics, check_trackers, forget_after
from halfbyte.recipes.planning import (
    UnplannableError,
    check_fits,
    count_steps,
    describe_plan,
    lora_config,
    plan_run,
)
from halfbyte.recipes.provenance import peak_resident_bytes, write_run_file
from halfbyte.recipes.tokenizing import read_data
from halfbyte.recipes.training import PassOutOfMemoryError, evaluate_loss, evaluation_batches, train_step
from halfbyte.report.masked import masked_text

# What may differ between a run and its continuation: nothing here changes a number of the training. Where the model
# and the data lie may change; that they are the same is told by their fingerprints.
_FREE_TO_CHANGE = {
    "model_name_or_path",
    "dataset",
    "dataset_split",
    "columns",
    "output_dir",
    "overwrite_output_dir",
    "resume_from_checkpoint",
    "eval_dataset",
    "eval_dataset_split",
    "eval_steps",
    "per_device_eval_batch_size",
    "skip_bad_rows",
    "save_steps",
    "save_total_limit",
    "logging_steps",
    "report_to",
    "gradient_checkpointing",
    "max_memory",
    "over_budget",
    "page_dir",
    "data_cache_dir",
}
# Keys of which only a part changes a number: bits do, and where they lie does not.
_SAME_NUMBERS: dict[str, Callable[[Any], object]] = {
    "optim": lambda value: OPTIMIZERS.get(value or "", {}).get("state_bits"),
    "activation_offloading": lambda value: value == "8bit",
}


@dataclass(frozen=True)
class RunResult:
    """How a run ended."""

    output_dir: str
    steps: int
    total_steps: int
    loss: float  # mean over the last step's supervised tokens
    eval_loss: float | None
    training_seconds: float  # of this process: from the first step to the last
    tokens_per_second: float  # without padding
    peak_bytes: int  # the largest resident set of this process
    base_sha256: str  # of the 4-bit weights, the same before and after
    interrupted: bool
    planned_bytes: int | None = None  # what `peak_bytes` was expected to be


def finetune(config: FinetuneConfig, console: Console | None = None) -> RunResult:
    """Fine-tune a model in 4 bits with LoRA; what the command line calls.  QLoRA (arXiv 2305.14314).

    Raises:
        HalfbyteError: bad input, found before anything is written over.
    """
    console = console or Console(stderr=True)
    check_inputs(config)
    if config.threads:
        torch.set_num_threads(config.threads)
    tokenizer = prepare_tokenizer(config.model_name_or_path, None, config.chat_template, config.system_prompt)
    train, held_out = read_data(config, tokenizer, console)
    rows = pack(train, config.max_length) if config.packing else train
    if config.packing:
        console.print(f"packed into {len(rows):,} rows of at most {config.max_length} tokens", highlight=False)
    plan = make_plan(config, rows, held_out, console)
    if plan is not None and config.over_budget == "refuse":
        check_fits(plan, config.max_memory)
    torch.manual_seed(config.seed)  # the adapter's initial values, and dropout after them
    model, _ = load_model(
        config.model_name_or_path,
        config.quant_type,
        config.block_size,
        config.double_quant,
        getattr(torch, config.compute_dtype),
        _device(),
    )
    console.print(describe_replacements(replacements_of(model)), highlight=False)
    if config.packing and not keeps_packed_apart(model):
        rows = train
        console.print(
            "  note: this model does not keep packed rows apart, so they are not packed: those of like length share a"
            " batch",
            style="yellow",
            highlight=False,
        )
    give_back_freed_memory()  # what loading worked in
    run = Run(config, add_lora(model, lora_config(config)), tokenizer, rows, held_out, console, plan)
    return run.execute()


def dry_run(config: FinetuneConfig, console: Console) -> None:
    """Check everything that a run would, and show the first example: what is learned, and what is only read."""
    check_inputs(config)
    tokenizer = prepare_tokenizer(config.model_name_or_path, None, config.chat_template, config.system_prompt)
    train, held_out = read_data(config, tokenizer, console)
    make_plan(config, pack(train, config.max_length) if config.packing else train, held_out, console)
    # Where there are no colours, brackets tell the two apart.
    told_by = "green" if console.color_system else "in ⟦brackets⟧"
    console.print(f"\nthe first example; what is learned is {told_by}:\n", highlight=False)
    control_tokens = find_control_tokens(special_tokens(tokenizer))
    console.print(masked_text(preview(tokenizer, train[0]), control_tokens, console.color_system is not None))


def make_plan(
    config: FinetuneConfig, train: Sequence[Example], held_out: Sequence[Example], console: Console
) -> Plan | None:
    """What the run will hold, said to a person; None where that is not known beforehand.

    Raises:
        HalfbyteError: there is no such model, or `target_modules` names nothing in it.
    """
    if _device().type != "cpu":
        return None  # what kernels keep on another device is not what is measured here
    try:
        plan, _, _ = plan_run(config, train, held_out)
    except UnplannableError as error:
        console.print(f"  note: there is no plan, for {error}", style="yellow", highlight=False)
        return None
    console.print(describe_plan(plan), highlight=False)
    return plan


def check_inputs(config: FinetuneConfig) -> None:
    """Everything that can be found wrong in a blink, before a model is looked for."""
    output_dir = Path(config.output_dir)
    resume = bool(config.resume_from_checkpoint)
    if resume:
        checkpoint = find_checkpoint(output_dir, config.resume_from_checkpoint)
        read_state(checkpoint)
        # The checkpoint of another run may be gone on from in a new directory.
        resume = _is_within(checkpoint, output_dir)
    check_output_dir(output_dir, resume=resume, overwrite=config.overwrite_output_dir)
    read = {
        "model_name_or_path": [config.model_name_or_path],
        "dataset": [source.path for source in training_sources(config)],
        "eval_dataset": [source.path for source in held_out_sources(config)],
    }
    for key, path in [(key, path) for key, paths in read.items() for path in paths if config.overwrite_output_dir]:
        if _is_within(Path(path), output_dir):
            raise HalfbyteError(f"{key} {path} is in output_dir, which overwrite_output_dir would remove; move it.")
    if config.page_dir is not None:
        check_page_dir(Path(config.page_dir))
    check_trackers(config.report_to)


@dataclass
class Run:
    """A training that is ready to begin, and what it needs."""

    config: FinetuneConfig
    model: PeftModel
    tokenizer: PreTrainedTokenizerBase
    train: Sequence[Example]
    held_out: Sequence[Example]
    console: Console
    plan: Plan | None = None

    def __post_init__(self) -> None:
        config = self.config
        self.directory = Path(config.output_dir)
        self.device = _device()
        self.steps_per_epoch, self.total_steps = count_steps(config, len(self.train))
        page_dir = _page_dir(config)
        self.optimizer = AdamW(
            [parameter for parameter in self.model.parameters() if parameter.requires_grad],
            lr=config.learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_epsilon,
            weight_decay=config.weight_decay,
            **OPTIMIZERS[config.optim],
            page_dir=page_dir if OPTIMIZERS[config.optim]["paged"] else None,
        )
        self.kept = partial(offloaded, config.activation_offloading, page_dir)
        self.memory = plan_memory(config, self.model, self.train, self.device, self.plan)
        self.console.print(self.memory.describe(), highlight=False)
        self.base_sha256 = weights_sha256(self.model)
        self.data_sha256 = fingerprint(self.train)

    def execute(self) -> RunResult:
        """Train, from the start or from a checkpoint, and save.

        Raises:
            HalfbyteError: the checkpoint is another run's, the gradient is not finite, the disk is full.
        """
        try:
            return self._execute()
        except (OSError, SafetensorError) as error:
            checkpoints = list_checkpoints(self.directory)
            way_out = (
                f"go on from {checkpoints[-1].name} with --resume_from_checkpoint true"
                if checkpoints
                else "run it again"
            )
            raise HalfbyteError(
                f"output_dir {self.directory} cannot be written ({error}); make room there and {way_out}."
            ) from error

    def _execute(self) -> RunResult:
        last = self._begin()
        write_run_file(self.directory, self.config, self.base_sha256, self.memory.to_dict(), None)
        self.tokenizer.save_pretrained(self.directory)
        metrics = Metrics(self.directory, self.config.report_to, self.config.to_dict())
        started = time.perf_counter()
        try:
            self._train(last, metrics)
        finally:
            metrics.close()
        seconds = time.perf_counter() - started
        save_adapter(self.model, self.directory)
        if weights_sha256(self.model) != self.base_sha256:
            raise RuntimeError("the frozen weights have changed during training")
        result = RunResult(
            output_dir=str(self.directory),
            steps=last["step"],
            total_steps=self.total_steps,
            loss=last["loss"],
            eval_loss=last["eval_loss"],
            training_seconds=seconds,
            tokens_per_second=last["tokens"] / seconds,
            peak_bytes=peak_resident_bytes(),
            base_sha256=self.base_sha256,
            interrupted=last["step"] < self.total_steps,
            planned_bytes=self._planned_bytes(),
        )
        write_run_file(self.directory, self.config, self.base_sha256, self.memory.to_dict(), vars(result))
        return result

    def _planned_bytes(self) -> int | None:
        """The plan's peak, at the level of recomputation that was taken."""
        if self.plan is None or self.memory.level not in self.plan.levels():
            return None
        return self.plan.with_settings(level=self.memory.level).peak_bytes

    def _begin(self) -> dict[str, Any]:
        """Clear the directory, or restore a checkpoint; what is known of the last step that is done."""
        config = self.config
        last: dict[str, Any] = {"step": 0, "loss": math.nan, "eval_loss": None, "tokens": 0}
        if not config.resume_from_checkpoint:
            clear_run(self.directory)
            return last
        checkpoint = find_checkpoint(self.directory, config.resume_from_checkpoint)
        state = read_state(checkpoint)
        self._check_same_run(checkpoint, state)
        restore_checkpoint(checkpoint, self.model, self.optimizer)
        if not _is_within(checkpoint, self.directory):  # another run's: this is a new one, that begins in its midst
            clear_run(self.directory)
        forget_after(self.directory, state["step"])
        self.console.print(f"resuming {checkpoint} at step {state['step']}", highlight=False)
        if state.get("threads") != torch.get_num_threads():
            self.console.print(
                f"  note: it was made with {state.get('threads')} threads, and this is run with"
                f" {torch.get_num_threads()}: the last bits of the result may differ",
                style="yellow",
                highlight=False,
            )
        return last | {key: state.get(key, last[key]) for key in ("step", "loss", "eval_loss")}

    def _check_same_run(self, checkpoint: Path, state: dict[str, Any]) -> None:
        now = self._state()
        for key, value in now["config"].items():
            then = state["config"].get(key)
            if key in _SAME_NUMBERS and _SAME_NUMBERS[key](then) == _SAME_NUMBERS[key](value):
                continue
            if key not in _FREE_TO_CHANGE and then != value:
                raise HalfbyteError(
                    f"{checkpoint} was trained with {key} {then!r}, not {value!r};"
                    " a run is resumed with its own settings."
                )
        for key, what in (("base_sha256", "base model"), ("data_sha256", "training data")):
            if state.get(key) != now[key]:
                raise HalfbyteError(f"{checkpoint} was trained on another {what} than this one; start a new run.")

    def _state(self) -> dict[str, Any]:
        return {
            "config": self.config.to_dict(),
            "base_sha256": self.base_sha256,
            "data_sha256": self.data_sha256,
            "threads": torch.get_num_threads(),
        }

    def _train(self, last: dict[str, Any], metrics: Metrics) -> None:
        """Take the steps that are left; `last` is kept up to date."""
        config, first_step = self.config, last["step"]
        with heard_at_step_end() as interrupt, Display(self.console, self.total_steps, first_step) as display:
            for step, micro_batches in self._micro_batches(first_step):
                values = self._one_step(step, micro_batches, display)
                done = step + 1
                final = done == self.total_steps
                last |= {"step": done, "loss": values["loss"], "tokens": last["tokens"] + values["tokens"]}
                if self.held_out and (final or (config.eval_steps and done % config.eval_steps == 0)):
                    last["eval_loss"] = values["eval_loss"] = self._evaluate()
                    display.say(f"step {done}: loss on held-out rows {values['eval_loss']:.4f}")
                if done % config.logging_steps == 0 or "eval_loss" in values:
                    metrics.log(done, values)
                display.step(done, values)
                if interrupt or (config.save_steps and (final or done % config.save_steps == 0)):
                    checkpoint = save_checkpoint(
                        self.directory,
                        done,
                        self.model,
                        self.optimizer,
                        {**self._state(), "loss": last["loss"], "eval_loss": last["eval_loss"]},
                        config.save_total_limit,
                    )
                if interrupt:
                    display.say(f"interrupted; go on from {checkpoint} with --resume_from_checkpoint true")
                    break

    def _one_step(self, step: int, micro_batches: list[Batch], display: Display) -> dict[str, float | int]:
        config = self.config
        warmup_steps = math.ceil(config.warmup_ratio * self.total_steps)
        factor = learning_rate_factor(config.lr_scheduler_type, step, self.total_steps, warmup_steps)
        started = time.perf_counter()
        try:
            values = self._train_step(micro_batches, config.learning_rate * factor, display)
        except HalfbyteError as error:
            raise HalfbyteError(f"step {step + 1}: {error}") from error
        seconds = time.perf_counter() - started
        return {
            **values,
            "epoch": (step + 1) / self.steps_per_epoch,
            "step_seconds": seconds,
            "tokens_per_second": values["tokens"] / seconds,
            "peak_bytes": peak_resident_bytes(),
        }

    def _train_step(self, micro_batches: list[Batch], learning_rate: float, display: Display) -> dict[str, float | int]:
        """One optimizer step, in passes as small as memory asks for."""
        while True:
            passes = self.memory.split(micro_batches)
            try:
                return train_step(
                    self.model, self.optimizer, passes, learning_rate, self.config.max_grad_norm, self.device, self.kept
                )
            except PassOutOfMemoryError:
                display.say(self.memory.shrink(max(len(batch["input_ids"]) for batch in passes)))

    def _micro_batches(self, first_step: int) -> Iterator[tuple[int, list[Batch]]]:
        """Every step that is still to be taken, with its micro-batches: a function of seed and step alone."""
        config = self.config
        step = first_step
        while step < self.total_steps:
            epoch, start = divmod(step, self.steps_per_epoch)
            for micro_batches in training_steps(
                self.train,
                seed=config.seed,
                epoch=epoch,
                per_device_train_batch_size=config.per_device_train_batch_size,
                gradient_accumulation_steps=config.gradient_accumulation_steps,
                pad_token_id=self.tokenizer.pad_token_id,
                start_step=start,
            ):
                yield step, micro_batches
                step += 1
                if step == self.total_steps:
                    return

    def _evaluate(self) -> float:
        size = self.config.per_device_eval_batch_size
        batches = evaluation_batches(self.held_out, size, self.tokenizer.pad_token_id)
        return evaluate_loss(self.model, batches, self.device)[0]


def _page_dir(config: FinetuneConfig) -> Path | None:
    """Where state or activations are paged to; None where nothing is."""
    if not OPTIMIZERS[config.optim]["paged"] and config.activation_offloading != "disk":
        return None
    if config.page_dir is not None:
        return Path(config.page_dir)
    # The file has no name, so it does not matter to a directory that is yet to be made, or cleared.
    output_dir = Path(config.output_dir).absolute()
    return next(place for place in (output_dir, *output_dir.parents) if place.is_dir())


def _is_within(path: Path, directory: Path) -> bool:
    return directory.resolve() in (path.resolve(), *path.resolve().parents)


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
