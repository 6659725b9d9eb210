"""From an adapter to a model: check, merge tensor by tensor, measure what that did, and give it its name."""

import copy
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from halfbyte.checkpoint.alignment import align_tensors
from halfbyte.checkpoint.files import directory_written_aside, write_json
from halfbyte.checkpoint.fingerprint import file_sha256
from halfbyte.checkpoint.merge import MergedWeights, Onto, Settings, merge_weights
from halfbyte.checkpoint.output import check_writable
from halfbyte.config import MergeConfig, load_config, memory_bytes
from halfbyte.errors import HalfbyteError
from halfbyte.huggingface import QuantizationConfig, load_model, load_tokenizer
from halfbyte.huggingface.adapter_changes import AdapterFile, Change, find_changes
from halfbyte.huggingface.base_weights import BaseWeights, FourBitLayout, four_bit_layout, open_base
from halfbyte.huggingface.peft import load_adapter
from halfbyte.huggingface.source import reason
from halfbyte.recipes.audit import TRAINED, AuditResult, Figures, audit_examples, best_of, give_verdict, measure
from halfbyte.recipes.export import GgufExport, modelfile_of, write_gguf, write_lora, write_modelfile
from halfbyte.recipes.provenance import Origin, peak_resident_bytes, read_origin, tokenizer_fingerprints, versions

MERGE_FILE = "merge.json"


@dataclass(frozen=True)
class MergeResult:
    """What was merged, and what it is."""

    output: str
    onto: str  # original or quantized
    dtype: str
    bytes: int  # of the tensors
    files: int
    changed: int  # parameters that the adapters change
    base_sha256: str | None  # of the base in 4 bits
    verified: bool  # the base is the one that the adapters were trained on
    untied: bool  # the output layer is no longer the embedding
    modelfile: str | None  # of Ollama's, beside a .gguf file
    notes: list[str]
    seconds: float
    peak_bytes: int
    audit: AuditResult | None

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "audit": None if self.audit is None else self.audit.to_dict()}


def merge(
    model_name_or_path: str,
    adapter: str | Sequence[str] | None,
    output: str,
    *,
    console: Console | None = None,
    **keys: Any,
) -> MergeResult:
    """Merge adapters into a model, and write it: `merge("model", "runs/first", "merged", dtype="bfloat16")`.

    Args:
        model_name_or_path: the base: a directory, a `.gguf` file or a hub id; in 16 bits, or a 4-bit checkpoint.
        adapter: the directory of a LoRA adapter, or several; None writes the model alone, as GGUF.
        output: a directory that is not there yet, or with format="gguf" a .gguf file.
        keys: what `halfbyte merge` takes as flags (docs/configuration.md): base, dtype, weights, audit, …

    Raises:
        HalfbyteError: bad input; then nothing has the name `output`.
    """
    adapters = [adapter] if isinstance(adapter, str) else list(adapter or [])
    given = {"model_name_or_path": model_name_or_path, "adapter": adapters or None, "output": output, **keys}
    return run_merge(load_config(MergeConfig, None, given), console)


def run_merge(config: MergeConfig, console: Console | None = None) -> MergeResult:
    """What the command line calls: `merge`, with its keys as a configuration."""
    console = console or Console(stderr=True)
    started = time.perf_counter()
    output = Path(config.output)
    _check_output(output, is_file=config.format == "gguf")
    job = _prepare(config)
    bases = _bases(job)
    audited, modelfile = None, None
    try:
        if config.adapter_only:
            onto, weights = bases[0], job.write_adapter(output)
        elif config.audit or len(bases) > 1:
            onto, weights, audited = _merge_measured(job, bases, output, console)
        else:
            (onto,) = bases
            weights = job.write(job.wanted(onto), output)
        if job.is_gguf and not config.adapter_only:
            modelfile = write_modelfile(output, job.tokenizer, job.notes, job.base.model.generation_config)
    except OSError as error:
        raise HalfbyteError(
            f"output {output} cannot be written ({error.strerror or error}); make room there."
        ) from error
    for note in job.notes:
        console.print(f"  note: {note}", style="yellow", markup=False, highlight=False)
    return MergeResult(
        output=str(output),
        onto=onto,
        dtype="float32" if config.adapter_only else config.dtype,
        bytes=weights.bytes,
        files=weights.files,
        changed=weights.changed,
        base_sha256=weights.base_sha256,
        verified=job.is_verified(weights),
        untied=weights.untied,
        modelfile=None if modelfile is None else str(modelfile),
        notes=job.notes,
        seconds=time.perf_counter() - started,
        peak_bytes=peak_resident_bytes(),
        audit=audited,
    )


@dataclass(frozen=True)
class Variant:
    """A way to merge."""

    onto: Onto
    dtype: str  # a torch dtype's name, a 4-bit type, or a kind of GGUF's
    gguf: bool = False

    @property
    def in_4_bits(self) -> bool:
        return not self.gguf and not hasattr(torch, self.dtype)

    @property
    def name(self) -> str:
        return f"{self.dtype}{' in GGUF' if self.gguf else ''}, onto the {self.onto} base"


@dataclass(frozen=True)
class _Job:
    """A merge that is ready to begin."""

    config: MergeConfig
    base: BaseWeights
    adapters: list[AdapterFile]
    origins: list[Origin]
    changes: dict[str, list[Change]]
    tokenizer: PreTrainedTokenizerBase
    settings: QuantizationConfig | None  # how training had the base
    notes: list[str]

    @property
    def is_gguf(self) -> bool:
        return self.config.format == "gguf"

    def wanted(self, onto: Onto) -> Variant:
        """What was asked for."""
        return Variant(onto, self.config.dtype, self.is_gguf)

    def write(self, variant: Variant, output: Path) -> MergedWeights:
        """Merge into a directory, or a file, which has its name when all of it is there.

        Raises:
            HalfbyteError: the base is not the one of the training; whatever `merge_weights` refuses.
        """
        layout = self._layout(variant)
        settings = Settings(
            onto=variant.onto,
            dtype=None if variant.gguf else torch.bfloat16 if variant.in_4_bits else getattr(torch, variant.dtype),
            layout=layout,
            combination=self.config.combination,
            density=self.config.density,
            shard_bytes=memory_bytes(self.config.max_shard_size),
            fingerprint=any(origin.base_sha256 for origin in self.origins),
        )
        if variant.gguf:
            export = GgufExport(self.base, self.changes, self.tokenizer, settings, variant.dtype, self.notes)
            return write_gguf(export, output, self._record(variant, None), self._check_base)
        with directory_written_aside(output) as aside:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.config.seed)  # DARE drops at random
                weights = merge_weights(self.base, self.changes, aside, settings)
            self._check_base(weights)
            if layout is not None:
                for file in aside.glob("*.safetensors"):
                    align_tensors(file)
            self._write_config(aside, settings, weights)
            self.tokenizer.save_pretrained(aside)
            write_json(aside / MERGE_FILE, self._record(variant, weights))
        return weights

    def write_adapter(self, output: Path) -> MergedWeights:
        """The adapter alone, as llama.cpp loads it; the base is looked at and not read."""
        size, changed = write_lora(self.base, self.adapters[0], self.changes, output)
        return MergedWeights(size, files=1, tensors=2 * changed, changed=changed, base_sha256=None, untied=False)

    def is_verified(self, weights: MergedWeights) -> bool:
        known = {origin.base_sha256 for origin in self.origins}
        return weights.base_sha256 is not None and known == {weights.base_sha256}

    def _layout(self, variant: Variant) -> FourBitLayout | None:
        if not variant.in_4_bits:
            return None
        like = self.settings or QuantizationConfig()
        skip = None if self.settings is None else self.settings.skip_modules
        wanted = QuantizationConfig(variant.dtype, self._block_size(), like.double_quant, skip_modules=skip)
        return four_bit_layout(self.base.source, _without_quantization(self.base.config), wanted)

    def _block_size(self) -> int:
        if self.config.block_size is not None:
            return self.config.block_size
        name = next((name for name in sorted(self.base.layout.layers) if self.base.is_quantized), None)
        if name is not None:  # a 4-bit checkpoint says it beside its weights alone
            return self.base.quantized(name).block_size
        return self.settings.block_size if self.settings is not None else 64

    def _check_base(self, weights: MergedWeights) -> None:
        """Raises HalfbyteError where an adapter was trained on another base than this one."""
        for adapter, origin in zip(self.adapters, self.origins, strict=True):
            if weights.base_sha256 is None or origin.base_sha256 in (None, weights.base_sha256):
                continue
            differs = (
                f"{adapter.directory} was trained on other weights than those of {self.base.source.path}: their SHA-256"
                f" in 4 bits was {str(origin.base_sha256)[:12]}… and is {weights.base_sha256[:12]}…"
            )
            if not self.config.any_base:
                raise HalfbyteError(
                    f"{differs}; name the base it was trained on ({origin.base_name}), or merge all the same with"
                    " --any_base true."
                )
            if differs not in self.notes:
                self.notes.append(differs)

    def _write_config(self, directory: Path, settings: Settings, weights: MergedWeights) -> None:
        source = self.base.source
        if source.gguf_file:
            values = self.base.config.to_dict()
            values["architectures"] = [type(self.base.model).__name__]
        else:
            values = json.loads((source.directory / "config.json").read_text(encoding="utf-8"))
        values.pop("torch_dtype", None)
        values.pop("quantization_config", None)
        values["dtype"] = str(settings.dtype).removeprefix("torch.")
        if settings.layout is not None and settings.layout.settings is not None:
            values["quantization_config"] = settings.layout.settings.to_dict()
        if weights.untied:
            values["tie_word_embeddings"] = False
        write_json(directory / "config.json", values)
        generation = source.directory / "generation_config.json"
        if not source.gguf_file and generation.is_file():
            write_json(directory / generation.name, json.loads(generation.read_text(encoding="utf-8")))
        elif self.base.model.generation_config is not None:
            self.base.model.generation_config.save_pretrained(directory)

    def _record(self, variant: Variant, weights: MergedWeights | None) -> dict[str, Any]:
        """What was merged; without the weights, of which nothing is known before they are written."""
        scales = self.config.weights or [1.0] * len(self.adapters)
        return {
            "versions": versions(),
            "base_model": {
                "name_or_path": self.base.source.name,
                **({} if weights is None else {"weights_sha256": weights.base_sha256}),
                **({} if weights is None else {"verified": self.is_verified(weights)}),
            },
            "onto": variant.onto,
            "dtype": variant.dtype,
            "quantization_of_training": None if self.settings is None else _as_keys(self.settings),
            "adapters": [
                {"path": str(adapter.directory), "sha256": file_sha256(adapter.file), "weight": scale}
                for adapter, scale in zip(self.adapters, scales, strict=True)
            ],
            "combination": self.config.combination,
            "tokenizer": tokenizer_fingerprints(self.tokenizer),
            **({} if weights is None else {"tensors": weights.tensors, "bytes": weights.bytes}),
        }


# ── Before anything is read at length ────────────────────────────────────────────────────────────────────────────────


def _check_output(output: Path, is_file: bool) -> None:
    taken = output if output.exists() else modelfile_of(output)
    if is_file and taken.exists():
        raise HalfbyteError(f"output {taken} exists, and is not overwritten; name another.")
    if output.is_file() or (output.is_dir() and any(output.iterdir())):
        raise HalfbyteError(f"output {output} exists, and is not overwritten; name another.")
    check_writable(output, "output")


def _prepare(config: MergeConfig) -> _Job:
    adapters = [AdapterFile(path) for path in config.adapter or []]
    scales = config.weights or [1.0] * len(adapters)
    if len(scales) != len(adapters):
        raise HalfbyteError(f"weights are {len(scales)} where adapters are {len(adapters)}; give one for each adapter.")
    origins = [read_origin(adapter.directory) for adapter in adapters]
    settings = _training_quantization(config, adapters, origins)
    base = open_base(config.model_name_or_path, settings)
    if base.layout.settings is not None:
        settings = base.layout.settings  # of a 4-bit checkpoint: its own
    notes: list[str] = []
    tokenizer = _tokenizer(base, adapters, origins, notes)
    changes: dict[str, list[Change]] = {}
    for adapter, scale in zip(adapters, scales, strict=True):
        for name, change in find_changes(base.model, str(base.source.path), adapter, scale).items():
            changes.setdefault(name, []).append(change)
    if adapters and not any(origin.base_sha256 for origin in origins):
        notes.append(
            f"{adapters[0].directory} does not say what weights it was trained on, so it is not checked that they are"
            " these"
        )
    elif base.unnamed:
        notes.append(
            f"{base.source.path} holds parts of what the model fuses; that it is the trained base is not checked"
        )
    return _Job(config, base, adapters, origins, changes, tokenizer, settings, notes)


def _training_quantization(
    config: MergeConfig, adapters: list[AdapterFile], origins: list[Origin]
) -> QuantizationConfig | None:
    """How the base was quantized in training: as the adapters' runs say, or as flags do."""
    said = [origin.quantization for origin in origins if origin.quantization is not None]
    given = {
        key: value
        for key in ("quant_type", "block_size", "double_quant", "compute_dtype")
        if (value := getattr(config, key)) is not None
    }
    for other in said[1:]:
        if {**other, **given} != {**said[0], **given}:
            raise HalfbyteError(
                f"{adapters[0].directory} and another adapter were trained on bases of different quantization; say with"
                " --quant_type and the like which one to merge onto."
            )
    # Where nothing is merged, the numbers of a .gguf file are passed on as they are.
    exact = not adapters and config.base != "quantized"
    usual = QuantizationConfig(compute_dtype=torch.float32 if exact else torch.bfloat16)
    values = {**(said[0] if said else _as_keys(usual)), **given}
    if values["quant_type"] == "none":
        return None
    return QuantizationConfig(**values)


def _as_keys(settings: QuantizationConfig) -> dict[str, Any]:
    return {
        "quant_type": settings.quant_type,
        "block_size": settings.block_size,
        "double_quant": settings.double_quant,
        "compute_dtype": str(settings.compute_dtype).removeprefix("torch."),
    }


def _tokenizer(
    base: BaseWeights, adapters: list[AdapterFile], origins: list[Origin], notes: list[str]
) -> PreTrainedTokenizerBase:
    """The tokenizer to write: the first adapter's where it has one, since it has the template of the training.

    Raises:
        HalfbyteError: an adapter's tokenizer has other tokens than the base's.
    """
    own = load_tokenizer(base.source)
    chosen = own
    for adapter, origin in reversed(list(zip(adapters, origins, strict=True))):
        theirs = _tokenizer_beside(adapter)
        if theirs is not None:
            differs = theirs.get_vocab() != own.get_vocab()
        else:
            told = (origin.tokenizer or {}).get("vocabulary_sha256")
            differs = told not in (None, tokenizer_fingerprints(own)["vocabulary_sha256"])
        if differs:
            raise HalfbyteError(
                f"{adapter.directory} was trained with another tokenizer than that of {base.source.path}, which has"
                f" {len(own):,} tokens; name the base it was trained on."
            )
        if theirs is not None:
            if theirs.chat_template != own.chat_template:
                notes.append(f"the chat template is that of {adapter.directory}, which differs from the base's")
            chosen = theirs
    return chosen


def _tokenizer_beside(adapter: AdapterFile) -> PreTrainedTokenizerBase | None:
    if not (adapter.directory / "tokenizer_config.json").is_file():
        return None
    try:
        return AutoTokenizer.from_pretrained(adapter.directory, trust_remote_code=False)
    except Exception as error:  # whatever transformers and tokenizers raise on files that they cannot read
        raise HalfbyteError(f"{adapter.directory} holds a tokenizer that cannot be read ({reason(error)}).") from error


def _bases(job: _Job) -> list[Onto]:
    """Onto what to merge; both where that is to be measured.

    Raises:
        HalfbyteError: what was asked for is not there.
    """
    config, base = job.config, job.base
    if config.base == "original" and base.is_quantized:
        raise HalfbyteError(
            f"{base.source.path} is a 4-bit checkpoint, so there is no 16-bit original in it; name the original model,"
            " or use --base quantized."
        )
    if config.base == "quantized" and job.settings is None:
        raise HalfbyteError("The adapter was trained on a base in 16 bits (quant_type none); use --base original.")
    there: list[Onto] = []
    if job.settings is not None:
        there.append("quantized")
    if not base.is_quantized:
        there.append("original")
    if config.base is not None:
        return there if config.base == "auto" else [config.base]
    return there[:1] if job.adapters else there[-1:]


def _without_quantization(config: PreTrainedConfig) -> PreTrainedConfig:
    plain = copy.deepcopy(config)
    if hasattr(plain, "quantization_config"):
        del plain.quantization_config
    return plain


# ── Measuring ────────────────────────────────────────────────────────────────────────────────────────────────────────


def _merge_measured(
    job: _Job, bases: list[Onto], output: Path, console: Console
) -> tuple[Onto, MergedWeights, AuditResult]:
    """Merge in every way that is to be compared, beside the output, and give the better one its name."""
    config = job.config
    _check_measurable(job)
    examples, made = audit_examples(
        job.tokenizer, config.dataset, config.dataset_format, config.max_length, config.limit
    )
    candidates = [job.wanted(onto) for onto in bases]
    variants = list(dict.fromkeys([*candidates, *(_audited(job) if config.audit else [])]))
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.merging-") as work:
        places = {v: Path(work) / (f"{index}.gguf" if v.gguf else f"{index}") for index, v in enumerate(variants)}
        written = {}
        for variant, place in places.items():
            console.print(f"merging: {variant.name}", highlight=False)
            written[variant] = job.write(variant, place)
        console.print(f"comparing on {len(examples)} rows", highlight=False)
        merges = {v.name: (written[v].bytes, partial(_load_merged, places[v], v)) for v in variants}
        figures = measure(partial(_load_trained, job), merges, examples, pad_token_id=job.tokenizer.pad_token_id)
        names = {variant.name: variant for variant in candidates}
        best = names[best_of([each for each in figures if each.name in names], made).name]
        audit = _audit_result(config, examples, made, figures, best)
        if not best.gguf:
            record = places[best] / MERGE_FILE
            write_json(record, {**json.loads(record.read_text()), "audit": audit.to_dict()})
        places[best].rename(output)
    return best.onto, written[best], audit


def _audit_result(
    config: MergeConfig, examples: Sequence[Any], made: bool, figures: list[Figures], best: Variant
) -> AuditResult:
    tokens = sum(example.supervised_tokens for example in examples)
    verdict = give_verdict(figures, config.max_kl, made)
    return AuditResult(len(examples), tokens, made, figures, best.name, config.max_kl, verdict)


def _audited(job: _Job) -> list[Variant]:
    """16 bits on either base, and 4 bits, as far as they can be had."""
    wide = job.config.dtype if hasattr(torch, job.config.dtype) else "bfloat16"
    found: list[Variant] = []
    if job.settings is not None:
        found.append(Variant("quantized", wide))
    if not job.base.is_quantized:
        found.append(Variant("original", wide))
    if job.settings is not None:
        found.append(Variant("quantized", job.settings.quant_type))
    return found


def _check_measurable(job: _Job) -> None:
    scales = job.config.weights or [1.0]
    changes = [change for found in job.changes.values() for change in found]
    plain = all(change.low_rank is not None and change.low_rank.magnitude is None for change in changes)
    if len(job.adapters) > 1 or scales != [1.0] or not plain:
        raise HalfbyteError(
            f"--audit and --base auto compare with what was trained, {TRAINED}, which is one plain LoRA adapter with a"
            " weight of 1; leave them out, and measure the merge with halfbyte evaluate."
        )


def _load_trained(job: _Job) -> nn.Module:
    settings, name = job.settings, job.config.model_name_or_path
    if settings is None:
        model, _ = load_model(name, "none")
    else:
        model, _ = load_model(
            name, settings.quant_type, settings.block_size, settings.double_quant, settings.compute_dtype
        )
    adapted: nn.Module = load_adapter(model, job.adapters[0].directory)
    return adapted


def _load_merged(directory: Path, variant: Variant) -> nn.Module:
    dtype = torch.float32 if variant.dtype in ("float16", "float32", "q8_0", "q4_0") else torch.bfloat16
    model, _ = load_model(str(directory), "none", compute_dtype=dtype)
    merged: nn.Module = model
    return merged
