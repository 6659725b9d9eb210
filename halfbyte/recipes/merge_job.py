"""A merge that is ready to begin: what is merged onto what, whether that fits, and the directory that it becomes."""

import copy
import json
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from halfbyte.checkpoint.adapter import QUANTIZATION_KEYS
from halfbyte.checkpoint.alignment import align_tensors
from halfbyte.checkpoint.files import directory_written_aside, write_json
from halfbyte.checkpoint.fingerprint import file_sha256
from halfbyte.checkpoint.merge import MergedWeights, Onto, Settings, merge_weights
from halfbyte.config import MergeConfig, memory_bytes
from halfbyte.errors import HalfbyteError
from halfbyte.huggingface import QuantizationConfig, load_tokenizer
from halfbyte.huggingface.adapter_changes import AdapterFile, Change, find_changes
from halfbyte.huggingface.base_weights import BaseWeights, FourBitLayout, four_bit_layout, open_base
from halfbyte.recipes.export import GgufExport, write_gguf, write_lora
from halfbyte.recipes.fitting import base_differences, check_tokenizer
from halfbyte.recipes.provenance import Origin, read_origin, tokenizer_fingerprints, versions

MERGE_FILE = "merge.json"
_BESIDE_BYTES = 64e6  # of tokenizer, configuration and headers
_BLOCK_BYTES = {"q8_0": 34 / 32, "q4_0": 18 / 32}  # of a weight


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
        return f"{self.dtype}{' GGUF' if self.gguf else ''}, {self.onto} base"

    @property
    def flags(self) -> str:
        return f"{'--format gguf ' if self.gguf else ''}--dtype {self.dtype} --base {self.onto}"


@dataclass(frozen=True)
class MergeJob:
    """A merge that is ready to begin."""

    config: MergeConfig
    base: BaseWeights
    adapters: list[AdapterFile]
    origins: list[Origin]
    scales: list[float]  # of each adapter
    changes: dict[str, list[Change]]
    tokenizer: PreTrainedTokenizerBase
    quantization: QuantizationConfig | None  # how training had the base; None is 16 bits
    notes: list[str]
    warnings: list[str] = field(default_factory=list)  # what this base and the training's do not have in common

    @property
    def bases(self) -> list[Onto]:
        """What there is to merge onto."""
        there: list[Onto] = [] if self.quantization is None else ["quantized"]
        return there if self.base.is_quantized else [*there, "original"]

    def wanted(self, onto: Onto) -> Variant:
        """What was asked for, onto one of the bases."""
        return Variant(onto, self.config.dtype, self.config.format == "gguf")

    def write(self, variant: Variant, output: Path) -> MergedWeights:
        """Merge into a directory, or a file, which has its name when all of it is there.

        Raises:
            HalfbyteError: there is no room for it; whatever `merge_weights` refuses.
        """
        self.check_room(output, [variant])
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
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config.seed)  # DARE drops at random
            if variant.gguf:
                export = GgufExport(self.base, self.changes, self.tokenizer, settings, variant.dtype, self.notes)
                weights = write_gguf(export, output, self.record(variant, None))
                self.compare_bases(weights)
                return weights
            return self._write_directory(variant, settings, output)

    def _write_directory(self, variant: Variant, settings: Settings, output: Path) -> MergedWeights:
        with directory_written_aside(output) as aside:
            weights = merge_weights(self.base, self.changes, aside, settings)
            self.compare_bases(weights)
            if settings.layout is not None:
                for file in aside.glob("*.safetensors"):
                    align_tensors(file)
            self._write_config(aside, settings, weights)
            self.tokenizer.save_pretrained(aside)
            write_json(aside / MERGE_FILE, self.record(variant, weights))
        return weights

    def write_adapter(self, output: Path) -> MergedWeights:
        """The adapter alone, as llama.cpp loads it; the base is looked at and not read."""
        size, changed = write_lora(self.base, self.adapters[0], self.changes, output)
        return MergedWeights(size, files=1, tensors=2 * changed, changed=changed, base_sha256=None, untied=False)

    def check_room(self, output: Path, variants: Iterable[Variant]) -> None:
        """Raises HalfbyteError where the disk of the output has no room for all of the variants."""
        needed = sum(self._expected_bytes(variant) for variant in variants) + _BESIDE_BYTES
        place = next(parent for parent in output.absolute().parents if parent.exists())
        free = shutil.disk_usage(place).free
        if free < needed:
            raise HalfbyteError(
                f"output {output} takes {needed / 1e9:.1f} GB while it is made, and its disk has {free / 1e9:.1f} GB"
                " left; make room there, or name another."
            )

    def _expected_bytes(self, variant: Variant) -> float:
        wide: float = 2 if variant.in_4_bits else _bytes_of(variant.dtype)
        layers = self.base.layout.layers if variant.in_4_bits else frozenset()
        counts = {name: parameter.numel() for name, parameter in self.base.model.named_parameters()}
        return float(sum((0.6 if name in layers else wide) * count for name, count in counts.items()))

    def compare_bases(self, weights: MergedWeights) -> None:
        """Add a warning for each adapter that was trained on another base than the one that was merged."""
        used = None if self.quantization is None else _as_keys(self.quantization, self._block_size())
        for adapter, origin in zip(self.adapters, self.origins, strict=True):
            where = str(self.base.source.path)
            found = base_differences(adapter.directory, origin, where, used, weights.base_sha256)
            self.warnings.extend(sentence for sentence in found if sentence not in self.warnings)

    def is_verified(self, weights: MergedWeights) -> bool | None:
        """Whether the base is the one that all adapters were trained on; None where that cannot be known."""
        known = {origin.base_sha256 for origin in self.origins}
        if weights.base_sha256 is None or None in known:
            return None
        return known == {weights.base_sha256}

    def record(self, variant: Variant, weights: MergedWeights | None) -> dict[str, Any]:
        """What was merged, from what: merge.json. Less of it where nothing is written yet."""
        adapters = zip(self.adapters, self.scales, self.origins, strict=True)
        quantization = self.quantization
        base: dict[str, Any] = {"name_or_path": self.base.source.name}
        known: dict[str, Any] = {}
        if weights is not None:
            base |= {"weights_sha256": weights.base_sha256, "verified": self.is_verified(weights)}
            known = {"tensors": weights.tensors, "bytes": weights.bytes, "warnings": self.warnings}
        return {
            "versions": versions(),
            "base_model": base,
            "onto": variant.onto,
            "dtype": variant.dtype,
            "quantization_of_training": None if quantization is None else _as_keys(quantization, self._block_size()),
            "adapters": [
                {
                    "path": str(adapter.directory),
                    "sha256": file_sha256(adapter.file),
                    "weight": scale,
                    "base_model": {"name_or_path": origin.base_name, "weights_sha256": origin.base_sha256},
                    "data": (origin.record or {}).get("data"),
                }
                for adapter, scale, origin in adapters
            ],
            "combination": self.config.combination,
            "tokenizer": tokenizer_fingerprints(self.tokenizer),
            **known,
        }

    def _layout(self, variant: Variant) -> FourBitLayout | None:
        if not variant.in_4_bits:
            return None
        like = self.quantization or QuantizationConfig()
        wanted = QuantizationConfig(
            variant.dtype, self._block_size(), like.double_quant, skip_modules=like.skip_modules
        )
        return four_bit_layout(self.base.source, _without_quantization(self.base.config), wanted)

    def _block_size(self) -> int:
        if self.config.block_size is not None:
            return self.config.block_size
        name = next((name for name in sorted(self.base.layout.layers) if self.base.is_quantized), None)
        if name is not None:  # a 4-bit checkpoint says it beside its weights alone
            return self.base.quantized(name).block_size
        return 64 if self.quantization is None else self.quantization.block_size

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


# ── Before anything is read at length ────────────────────────────────────────────────────────────────────────────────


def prepare_merge(config: MergeConfig) -> MergeJob:
    """Find the base and the adapters, and see that they fit; nothing is read at length yet.

    Raises:
        HalfbyteError: one of them is not there or is broken; an adapter is another model's.
    """
    adapters = [AdapterFile(path) for path in config.adapter or []]
    scales = config.weights or [1.0] * len(adapters)
    if len(scales) != len(adapters):
        raise HalfbyteError(f"weights are {len(scales)} where adapters are {len(adapters)}; give one for each adapter.")
    origins = [read_origin(adapter.directory) for adapter in adapters]
    quantization = _training_quantization(config, adapters, origins)
    base = open_base(config.model_name_or_path, quantization)
    if base.layout.settings is not None:
        quantization = base.layout.settings  # of a 4-bit checkpoint: its own
    notes: list[str] = []
    tokenizer = _tokenizer(base, adapters, notes)
    changes: dict[str, list[Change]] = {}
    for adapter, scale in zip(adapters, scales, strict=True):
        for name, change in find_changes(base.model, str(base.source.path), adapter, scale).items():
            changes.setdefault(name, []).append(change)
    unknown = [adapter for adapter, origin in zip(adapters, origins, strict=True) if origin.base_sha256 is None]
    if unknown:
        notes.append(
            f"{unknown[0].directory} does not say what weights it was trained on, so it is not checked that they are"
            " these"
        )
    elif adapters and base.conversions.several:
        notes.append(f"{base.source.path} fuses what the model does not; that it is the trained base is not checked")
    return MergeJob(config, base, adapters, origins, scales, changes, tokenizer, quantization, notes)


def _training_quantization(
    config: MergeConfig, adapters: list[AdapterFile], origins: list[Origin]
) -> QuantizationConfig | None:
    """How the base was quantized in training: as the adapters say, or as flags do."""
    said = [origin.quantization for origin in origins if origin.quantization is not None]
    given = {key: value for key in QUANTIZATION_KEYS if (value := getattr(config, key)) is not None}
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


def _bytes_of(dtype: str) -> float:
    return _BLOCK_BYTES[dtype] if dtype in _BLOCK_BYTES else float(getattr(torch, dtype).itemsize)


def _as_keys(settings: QuantizationConfig, block_size: int | None = None) -> dict[str, Any]:
    compute_dtype = str(settings.compute_dtype).removeprefix("torch.")
    values = settings.quant_type, block_size or settings.block_size, settings.double_quant, compute_dtype
    return dict(zip(QUANTIZATION_KEYS, values, strict=True))


def _tokenizer(base: BaseWeights, adapters: list[AdapterFile], notes: list[str]) -> PreTrainedTokenizerBase:
    """The tokenizer to write: the first adapter's where it has one, since it has the template of the training."""
    own = load_tokenizer(base.source)
    chosen = own
    for adapter in reversed(adapters):
        saved = check_tokenizer(adapter.directory, base.source.name)
        if saved is not None:
            if saved.chat_template != own.chat_template:
                notes.append(f"the chat template is that of {adapter.directory}, which differs from the base's")
            chosen = saved
    return chosen


def _without_quantization(config: PreTrainedConfig) -> PreTrainedConfig:
    plain = copy.deepcopy(config)
    if hasattr(plain, "quantization_config"):
        del plain.quantization_config
    return plain
