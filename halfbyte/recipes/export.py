"""A model as one .gguf file for llama.cpp, and the Modelfile with which Ollama takes it."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gguf import GGML_QUANT_VERSION, GGUFReader, GGUFWriter
from transformers import GenerationConfig, PreTrainedTokenizerBase

from halfbyte.checkpoint.files import file_written_aside, write_text
from halfbyte.checkpoint.gguf import (
    KINDS,
    GgufFile,
    GgufModel,
    copy_metadata,
    kind_of,
    read_extra_tensors,
)
from halfbyte.checkpoint.gguf_adapter import write_gguf_adapter
from halfbyte.checkpoint.merge import MergedWeights, Settings, merge_weights, untied_names
from halfbyte.data.go_template import go_template
from halfbyte.data.masks import turn_end_ids
from halfbyte.errors import HalfbyteError
from halfbyte.huggingface.adapter_changes import AdapterFile, Change
from halfbyte.huggingface.base_weights import BaseWeights
from halfbyte.huggingface.gguf_families import GgufLayout, gguf_layout, write_hyperparameters
from halfbyte.huggingface.gguf_tokenizer import (
    name_for_tokens,
    write_chat_template,
    write_special_tokens,
    write_tokenizer,
)

RECORD_KEY = "halfbyte.merge"  # what is in merge.json of a directory, as JSON


@dataclass(frozen=True)
class GgufExport:
    """What is to be one file."""

    base: BaseWeights
    changes: Mapping[str, Sequence[Change]]
    tokenizer: PreTrainedTokenizerBase
    settings: Settings
    dtype: str  # of checkpoint.gguf.KINDS
    notes: list[str]  # what there is to be said is added


def write_gguf(export: GgufExport, path: Path, record: dict[str, Any]) -> MergedWeights:
    """Merge into a .gguf file, which has its name when all of it is there.

    Args:
        record: where the weights are from; goes into the file.

    Raises:
        HalfbyteError: a model or a tokenizer that GGUF has no words for; whatever `merge_weights` refuses.
    """
    base = export.base
    reader = None if base.source.gguf_file is None else GGUFReader(base.source.gguf_file)
    layout = _layout(export, reader)
    shapes = {layout.names[name]: tuple(parameter.shape) for name, parameter in _parameters(base)}
    tensors = {place: (shape, kind_of(place, shape, export.dtype)) for place, shape in shapes.items()}
    tensors |= {place: (tuple(tensor.shape), KINDS["float32"][0]) for place, tensor in layout.extra.items()}
    writer = GGUFWriter(None, layout.architecture)
    _write_metadata(writer, export, reader)
    writer.add_string(RECORD_KEY, json.dumps(record, ensure_ascii=False))
    names = {file_name: name for name, file_name in base.file_names.items()}
    names |= {name: name for name in layout.names if name not in base.file_names}
    with file_written_aside(path) as aside:
        file = GgufModel(GgufFile(aside, writer, tensors), layout, names)
        return merge_weights(base, export.changes, file, export.settings)


def _layout(export: GgufExport, reader: GGUFReader | None) -> GgufLayout:
    base, where = export.base, str(export.base.source.path)
    layout = gguf_layout(base.model, where, base.tied.keys() - untied_names(base, export.changes))
    lacking = [name for name, _ in _parameters(base) if base.file_name(name) is None]
    if lacking:
        raise HalfbyteError(f"{where} has {lacking[0]} in other pieces; it cannot be written as GGUF.")
    export.notes.extend(note for note in layout.notes if note not in export.notes)
    if reader is None:
        return layout
    return replace(layout, extra=read_extra_tensors(reader, set(layout.names.values())))


def _parameters(base: BaseWeights) -> list[tuple[str, Any]]:
    return list(base.model.named_parameters(remove_duplicate=False))


def _write_metadata(writer: GGUFWriter, export: GgufExport, reader: GGUFReader | None) -> None:
    base, tokenizer = export.base, export.tokenizer
    rows = base.model.get_input_embeddings().weight.shape[0]
    if reader is not None:
        write_special_tokens(writer, tokenizer, rows)  # an adapter's template may end answers with another token
        write_chat_template(writer, tokenizer)
        copy_metadata(writer, reader)
    else:
        writer.add_type("model")
        writer.add_name(name_for_tokens(base.source.directory.absolute().name, tokenizer))
        write_hyperparameters(writer, base.config)
        notes = write_tokenizer(writer, tokenizer, rows, str(base.source.path))
        export.notes.extend(note for note in notes if note not in export.notes)
    writer.add_file_type(KINDS[export.dtype][1])
    writer.add_quantization_version(GGML_QUANT_VERSION)


def write_lora(
    base: BaseWeights, adapter: AdapterFile, changes: Mapping[str, Sequence[Change]], path: Path
) -> tuple[int, int]:
    """Write one adapter alone as a .gguf file: its bytes, and how many parameters it changes.

    Raises:
        HalfbyteError: a model that GGUF has no words for; whatever `write_gguf_adapter` refuses.
    """
    layout = gguf_layout(base.model, str(base.source.path), base.tied)
    with file_written_aside(path) as aside:
        plain = {name: change for name, (change,) in changes.items()}
        file = write_gguf_adapter(plain, layout, adapter.directory.absolute().name, aside)
    return file.total_bytes, len(plain)


# ── Ollama ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def modelfile_of(path: Path) -> Path:
    """Where the Modelfile of a .gguf file is."""
    return path.with_suffix(".Modelfile")


def write_modelfile(
    path: Path, tokenizer: PreTrainedTokenizerBase, notes: list[str], generation: GenerationConfig | None
) -> Path:
    """Write the Modelfile beside a .gguf file; without TEMPLATE where the tokenizer's own cannot be said in Go."""
    lines = [f"# ollama create NAME -f {modelfile_of(path).name}", f"FROM ./{path.name}"]
    try:
        template = go_template(tokenizer)
    except HalfbyteError as error:
        notes.append(f"{str(error).rstrip('.')}; the Modelfile has none, and Ollama takes what it finds in the file")
    else:
        notes.extend(template.notes)
        lines.append(f'TEMPLATE """{template}"""')
    vocabulary = {index: token for token, index in tokenizer.get_vocab().items()}
    lines += [f"PARAMETER stop {json.dumps(vocabulary[index])}" for index in turn_end_ids(tokenizer)]
    if generation is not None and generation.do_sample:
        for ours in ("temperature", "top_p", "top_k"):
            value = getattr(generation, ours, None)
            lines += [] if value is None else [f"PARAMETER {ours} {value:g}"]
    place = modelfile_of(path)
    write_text(place, "\n".join(lines) + "\n")
    return place
