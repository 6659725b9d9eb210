"""Every way to merge beside what was trained: all are written, loaded and measured, and the better one is kept."""

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from torch import nn

from halfbyte.checkpoint.files import write_json
from halfbyte.checkpoint.merge import MergedWeights, Onto
from halfbyte.huggingface import load_model
from halfbyte.huggingface.peft import load_adapter
from halfbyte.recipes.audit import AuditResult, audit_examples, best_of, give_verdict, measure
from halfbyte.recipes.merge_job import MERGE_FILE, MergeJob, Variant


def merge_measured(
    job: MergeJob, bases: Sequence[Onto], output: Path, console: Console
) -> tuple[Onto, MergedWeights, AuditResult]:
    """Merge in every way that is to be compared, beside the output, and give the better one its name.

    Args:
        bases: what the output may be merged onto.

    Raises:
        HalfbyteError: there is no room for all of them; whatever `MergeJob.write` and the readers of rows refuse.
    """
    config = job.config
    rows = config.dataset, config.dataset_format, config.max_length, config.limit
    examples, made = audit_examples(job.tokenizer, *rows)
    candidates = [job.wanted(onto) for onto in bases]
    variants = list(dict.fromkeys([*candidates, *(_audited(job) if config.audit else [])]))
    reference = None if _is_plain(job) else Variant(job.bases[0], "float32")
    everything = list(dict.fromkeys([*variants, *([] if reference is None else [reference])]))
    job.check_room(output, everything)
    with _workplace(output) as work:
        places = {v: work / (f"{index}.gguf" if v.gguf else f"{index}") for index, v in enumerate(everything)}
        written = {}
        for variant, place in places.items():
            console.print(f"merging: {variant.name}", highlight=False)
            written[variant] = job.write(variant, place)
        console.print(f"comparing {len(variants)} merges on {len(examples)} rows", highlight=False)
        trained = partial(_load_trained, job) if reference is None else _loader(places[reference], reference)
        merges = {each.name: (written[each].bytes, _loader(places[each], each)) for each in variants}
        figures = measure(_name_trained(job), trained, merges, examples, job.tokenizer.pad_token_id)
        names = {variant.name: variant for variant in variants}
        best = names[best_of([each for each in figures if names.get(each.name) in candidates], made).name]
        flags = {name: variant.flags for name, variant in names.items()}
        verdict = give_verdict(figures, best.name, config.max_kl, made, flags)
        tokens = sum(example.supervised_tokens for example in examples)
        audit = AuditResult(len(examples), tokens, made, figures, best.name, config.max_kl, verdict)
        if not best.gguf:
            record = places[best] / MERGE_FILE
            write_json(record, {**json.loads(record.read_text(encoding="utf-8")), "audit": audit.to_dict()})
        places[best].rename(output)
    return best.onto, written[best], audit


@contextmanager
def _workplace(output: Path) -> Iterator[Path]:
    """A directory beside the output, empty even where an audit was killed before, and gone at the end."""
    work = output.with_name(output.name + ".audited")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _audited(job: MergeJob) -> list[Variant]:
    """16 bits on either base, and 4 bits, as far as they can be had."""
    wide = job.config.dtype if hasattr(torch, job.config.dtype) else "bfloat16"
    found = [Variant(onto, wide) for onto in job.bases]
    if job.quantization is not None:
        found.append(Variant(job.bases[-1], job.quantization.quant_type))
    return found


# ── What was trained ─────────────────────────────────────────────────────────────────────────────────────────────────


def _is_plain(job: MergeJob) -> bool:
    """Whether what was trained can be run as it was: one adapter of plain LoRA, counting fully."""
    changes = [change for found in job.changes.values() for change in found]
    plain = all(change.low_rank is not None and change.low_rank.magnitude is None for change in changes)
    return job.scales == [1.0] and plain


def _name_trained(job: MergeJob) -> str:
    bits = "16-bit" if job.quantization is None else "4-bit"
    if _is_plain(job):
        return f"adapter on the {bits} base"
    return f"{'adapter' if len(job.adapters) == 1 else 'adapters'} on {bits}, float32"


def _load_trained(job: MergeJob) -> nn.Module:
    name, had = job.config.model_name_or_path, job.quantization
    if had is None:
        model, _ = load_model(name, "none")
    else:
        model, _ = load_model(name, had.quant_type, had.block_size, had.double_quant, had.compute_dtype)
    adapted: nn.Module = load_adapter(model, job.adapters[0].directory)
    return adapted


def _loader(directory: Path, variant: Variant) -> Callable[[], nn.Module]:
    exact = variant.gguf or variant.dtype in ("float16", "float32")
    dtype = torch.float32 if exact and variant.dtype != "bfloat16" else torch.bfloat16

    def load() -> nn.Module:
        merged: nn.Module = load_model(str(directory), "none", compute_dtype=dtype)[0]
        return merged

    return load
