"""How much memory a run may use, and what is computed again so that it lives within that.

Before the first step the largest micro-batch is predicted at every level of recomputation, and the fastest that fits
is taken. If memory runs out all the same, a step is taken again in smaller passes, and when a pass is a single row, at
the next level. The loss is the mean over the whole step's supervised tokens, so its split into passes does not count.
"""

import ctypes
import gc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch
from torch import nn

from halfbyte.config import FinetuneConfig, memory_bytes
from halfbyte.data import Batch, Example, lengths_of
from halfbyte.errors import HalfbyteError
from halfbyte.huggingface.mapped import mapped_bytes
from halfbyte.huggingface.recompute import LEVELS, choose_recomputation, measure_activation_bytes, set_recomputation
from halfbyte.optim import OPTIMIZERS
from halfbyte.plan import LOGITS_BYTES, Plan, optimizer_bytes

_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1  # of glibc's mallopt
_LARGE_BYTES, _TOP_BYTES = 1 << 20, 32 << 20
MARGIN = 0.9  # of what is there: the allocator's gaps, and what other programs will ask for


@dataclass
class Memory:
    """The level at which a run recomputes, and the rows that go through the model at once."""

    model: nn.Module
    level: str
    rows: int
    bytes_a_token: Mapping[str, float]  # of activations, at the levels that the model can be run at
    tokens: int  # of the largest micro-batch, padding included
    budget_bytes: float  # for activations; what is left when the model and the optimizer have theirs
    wanted: str  # the key's value, as it is typed
    offloading: str = "none"  # of layers' inputs, where all is recomputed
    events: list[str] = field(default_factory=list)  # what was done when memory ran out

    def describe(self) -> str:
        """The line for a person: which level, and why."""
        need = self.bytes_a_token[self.level] * self.tokens
        why = (
            f"activations of {need / 1e9:.2f} GB for {self.tokens:,} tokens, {self.budget_bytes / 1e9:.2f} GB to spare"
        )
        if self.offloading != "none":
            why += f", of which layers' inputs are {'on disk' if self.offloading == 'disk' else 'in 8 bits'}"
        elif self.wanted != "auto":
            why += f"; gradient_checkpointing is {self.wanted}"
        elif "full" not in self.bytes_a_token:
            why += "; transformers cannot recompute the layers of this model"
        elif need > self.budget_bytes:
            why += "; this may not fit"
        return f"recomputation: {self.level} ({why})"

    def to_dict(self) -> dict[str, object]:
        """What run.json keeps."""
        return {
            "level": self.level,
            "offloading": self.offloading,
            "rows": self.rows,
            "activation_bytes": round(self.bytes_a_token[self.level] * self.tokens),
            "budget_bytes": round(self.budget_bytes),
            "events": self.events,
        }

    def split(self, micro_batches: list[Batch]) -> list[Batch]:
        """The same rows, at most `rows` of them in one pass."""
        return [
            {key: value[start : start + self.rows] for key, value in batch.items()}
            for batch in micro_batches
            for start in range(0, len(batch["input_ids"]), self.rows)
        ]

    def shrink(self, rows: int) -> str:
        """Take less memory than passes of `rows` rows do; says what was done.

        Raises:
            HalfbyteError: nothing is left that could be made smaller.
        """
        smaller = [level for level in LEVELS[LEVELS.index(self.level) + 1 :] if level in self.bytes_a_token]
        if rows > 1:
            self.rows = (rows + 1) // 2
            did = f"the step is taken again with {self.rows} of {rows} rows in a pass"
        elif smaller:
            self.level = smaller[0]
            set_recomputation(self.model, self.level)
            keep_large_tensors_apart()
            did = f"the step is taken again with recomputation: {self.level}"
        else:
            raise HalfbyteError(
                "memory ran out with a single row in a pass and nothing left to recompute; lower max_length, or give"
                " the run more memory."
            )
        self.events.append(did)
        return f"memory ran out; {did}"


def plan_memory(
    config: FinetuneConfig, model: nn.Module, train: Sequence[Example], device: torch.device, plan: Plan | None = None
) -> Memory:
    """Choose what to recompute, and set the model to it; what a token takes is measured where no plan says it.

    Raises:
        HalfbyteError: `gradient_checkpointing` is true and the model's layers cannot be recomputed.
    """
    rows = config.per_device_train_batch_size
    bytes_a_token = measure_activation_bytes(model) if plan is None else plan.footprint.activation_bytes
    tokens = min(rows, len(train)) * int(lengths_of(train).max())
    spare = _spare_for_activations(config, model, device) if plan is None else plan.activation_budget
    if config.gradient_checkpointing == "auto" and config.activation_offloading == "none":
        level = choose_recomputation(bytes_a_token, tokens, spare)
    else:
        level = "full" if config.gradient_checkpointing else "none"
    set_recomputation(model, level)
    if level == "full":
        keep_large_tensors_apart()
    wanted = str(config.gradient_checkpointing).lower()
    return Memory(model, level, rows, bytes_a_token, tokens, spare, wanted, config.activation_offloading)


def _spare_for_activations(config: FinetuneConfig, model: nn.Module, device: torch.device) -> float:
    """What a loaded model leaves for them."""
    sizes = tuple(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    optimizer = OPTIMIZERS[config.optim]
    state = 0 if optimizer["paged"] else optimizer_bytes(sizes, optimizer["state_bits"])  # pages leave for what else is
    # Pages of files count as available, since they can leave, and are not yet there; each step wants them.
    return _spare_bytes(config.max_memory, device) - mapped_bytes(model) - 4 * sum(sizes) - state - LOGITS_BYTES


def give_back_freed_memory() -> None:
    """Let the system have what this process has freed: glibc keeps what lies between blocks that are still in use."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def keep_large_tensors_apart() -> None:
    """Give every large tensor a mapping of its own, for the rest of this process, where glibc is what allocates.

    Where each layer keeps its input alone, those lie in the heap among what the layers worked in, and between them are
    gaps that fit nothing: of a Llama-7B 0.2 GB. A mapping leaves none. But its pages are made anew each time, which is
    a tenth of a step, so it is for runs that give time for memory anyway.
    """
    give_back_freed_memory()  # or what the heap has free is filled first
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, _LARGE_BYTES)
        mallopt(_TRIM_THRESHOLD, _TOP_BYTES)


def whole_budget_bytes(max_memory: str | None, resident: int) -> int:
    """What this process may take in all: what it has by now, and what is there beside it."""
    return round(resident + _spare_bytes(max_memory, torch.device("cpu")))


def _spare_bytes(max_memory: str | None, device: torch.device) -> float:
    """What the run may take beside what it has by now."""
    if device.type == "cuda":
        used = torch.cuda.memory_allocated(device)
        if max_memory is not None:
            return memory_bytes(max_memory) - used
        return MARGIN * (torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - used)
    if max_memory is not None:
        return float(memory_bytes(max_memory) - psutil.Process().memory_info().rss)
    return MARGIN * float(min([psutil.virtual_memory().available, *limits_of_control_groups()]))


def limits_of_control_groups(
    membership: Path = Path("/proc/self/cgroup"), mounted: Path = Path("/sys/fs/cgroup")
) -> list[int]:
    """Bytes that each of the control groups that this process is in has left: Linux's bound on a container or a job."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return []
    left = []
    for line in lines:
        _, controllers, name = line.split(":", 2)
        if controllers == "":
            root, limit_file, usage_file, cache_key = mounted, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            root, limit_file, usage_file = mounted / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            cache_key = "total_inactive_file"
        else:
            continue
        own = root / name.lstrip("/")
        # Where a container sees its own group as the root, the path of /proc is not there, and the root is read.
        for group in [own, *(parent for parent in own.parents if parent == root or root in parent.parents)]:
            try:
                limit, usage = int((group / limit_file).read_text()), int((group / usage_file).read_text())
                statistics = dict(row.split() for row in (group / "memory.stat").read_text().splitlines())
            except (OSError, ValueError):  # no such group, or `max`: no limit
                continue
            left.append(max(0, limit - usage + int(statistics.get(cache_key, 0))))  # the cache of files gives way
    return left
