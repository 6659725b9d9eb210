"""From an adapter to a model: check, merge tensor by tensor, measure what that did, and give it its name."""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from halfbyte.checkpoint.merge import Onto
from halfbyte.checkpoint.output import check_writable
from halfbyte.config import MergeConfig, load_config
from halfbyte.errors import HalfbyteError
from halfbyte.recipes.audit import AuditResult
from halfbyte.recipes.export import modelfile_of, write_modelfile
from halfbyte.recipes.fitting import warn
from halfbyte.recipes.merge_audit import merge_measured
from halfbyte.recipes.merge_job import MergeJob, prepare_merge
from halfbyte.recipes.provenance import peak_resident_bytes


@dataclass(frozen=True)
class MergeResult:
    """What was merged, and what it is."""

    output: str
    onto: str  # original or quantized; nothing for an adapter alone
    dtype: str
    bytes: int  # of the tensors
    files: int
    changed: int  # parameters that the adapters change
    base_sha256: str | None  # of the base in 4 bits
    verified: bool | None  # the base is the one that the adapters were trained on; None where that is not known
    untied: bool  # the output layer is no longer the embedding
    modelfile: str | None  # of Ollama's, beside a .gguf file
    warnings: list[str]  # what the base and that of the training do not have in common
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
    job = prepare_merge(config)
    bases = _choose_bases(job)
    onto: str = "nothing"
    audited, modelfile = None, None
    try:
        if config.adapter_only:
            weights = job.write_adapter(output)
        elif config.audit or len(bases) > 1:
            onto, weights, audited = merge_measured(job, bases, output, console)
        else:
            (onto,) = bases
            weights = job.write(job.wanted(onto), output)
        if config.format == "gguf" and not config.adapter_only:
            modelfile = write_modelfile(output, job.tokenizer, job.notes, job.base.model.generation_config)
    except OSError as error:
        raise HalfbyteError(
            f"output {output} cannot be written ({error.strerror or error}); make room there."
        ) from error
    for sentence in job.warnings:
        warn(sentence, console)
    for note in job.notes:
        console.print(f"  note: {note}", style="yellow", markup=False, highlight=False, soft_wrap=True)
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
        warnings=job.warnings,
        notes=job.notes,
        seconds=time.perf_counter() - started,
        peak_bytes=peak_resident_bytes(),
        audit=audited,
    )


def _check_output(output: Path, is_file: bool) -> None:
    taken = output if output.exists() else modelfile_of(output)
    if is_file and taken.exists():
        raise HalfbyteError(f"output {taken} exists, and is not overwritten; name another.")
    if output.is_file() or (output.is_dir() and any(output.iterdir())):
        raise HalfbyteError(f"output {output} exists, and is not overwritten; name another.")
    check_writable(output, "output")


def _choose_bases(job: MergeJob) -> list[Onto]:
    """Onto what to merge; both where that is to be measured.

    Raises:
        HalfbyteError: what was asked for is not there.
    """
    config, there = job.config, job.bases
    in_4_bits = job.wanted("original").in_4_bits
    if config.base == "auto":
        chosen = there
    elif config.base is not None:
        chosen = [config.base]
    else:
        # 4 bits of what was 4 bits already lose what was learned: most changes are smaller than a step of the code.
        chosen = [there[-1] if in_4_bits or not job.adapters else there[0]]
    if chosen == ["original"] and job.base.is_quantized:
        raise HalfbyteError(
            f"{job.base.source.path} is a 4-bit checkpoint, so there is no 16-bit original in it; name the original"
            " model, or use --base quantized."
        )
    if chosen == ["quantized"] and job.quantization is None:
        raise HalfbyteError("The adapter was trained on a base in 16 bits (quant_type none); use --base original.")
    if chosen == ["quantized"] and in_4_bits:
        job.notes.append(
            f"{config.dtype} of a base that is in 4 bits already loses most of what was learned, since most changes are"
            " smaller than a step of the code; take --dtype bfloat16, or name the 16-bit original"
        )
    return chosen
