"""AdamW: Adam with decoupled weight decay.  Loshchilov and Hutter (arXiv 1711.05101), algorithm 2.

    m ← β₁·m + (1−β₁)·g        v ← β₂·v + (1−β₂)·g²
    p ← p − lr·(λ·p + m̂ / (√v̂ + ε))        m̂ = m/(1−β₁ᵗ),  v̂ = v/(1−β₂ᵗ)

The arithmetic is float32: an adapter is small, and 16-bit moments lose small updates. Between steps the moments may be
kept in 8 bits (8-bit Optimizers, arXiv 2110.02861): a code of a dynamic map for each value and a scale for each 256,
2.03 bytes a parameter in place of 8. Parameters of fewer than 4,096 values keep 32 bits: there is nothing to save.
Either state may be kept in a file (`halfbyte.optim.paged`), which does not change a bit of it.
"""

import tempfile
from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from halfbyte import ops
from halfbyte.errors import HalfbyteError
from halfbyte.formats import OPTIMIZER_BLOCK_SIZE, block_count
from halfbyte.optim.paged import PageFile
from halfbyte.optim.unified import unified_state

MIN_8BIT_SIZE = 4096  # values below which a parameter's moments stay in 32 bits

# The tensors of a parameter's state, in the order of the ops' arguments and of a page file.
_32BIT = ("exp_avg", "exp_avg_sq")
_8BIT = ("exp_avg", "exp_avg_absmax", "exp_avg_sq", "exp_avg_sq_absmax")

# The names that configurations have for the ways of keeping the state.
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw": {"state_bits": 32, "paged": False},
    "adamw_8bit": {"state_bits": 8, "paged": False},
    "paged_adamw_32bit": {"state_bits": 32, "paged": True},
    "paged_adamw_8bit": {"state_bits": 8, "paged": True},
}


class AdamW(torch.optim.Optimizer):
    """State a parameter: `step`, an int, and what `state_layout` says."""

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 2e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        state_bits: int = 32,  # 32 or 8
        paged: bool = False,  # keep the state in a file, from which it leaves memory when that runs short
        page_dir: str | Path | None = None,  # where that file is; None: the system's directory for temporary files
    ) -> None:
        """Raises HalfbyteError if the page directory cannot be written or has too little room, or for other bits."""
        if state_bits not in (8, 32):
            raise HalfbyteError(f"AdamW: state_bits is {state_bits}; it must be 32 or 8.")
        if page_dir is not None and not paged:
            raise HalfbyteError(f"AdamW: page_dir is {page_dir}, but nothing is paged; set paged=True too.")
        self.state_bits = state_bits
        self._page_dir = Path(page_dir or tempfile.gettempdir()) if paged else None
        self._files: list[PageFile] = []  # a group each
        self._homes: dict[Tensor, dict[str, Tensor]] = {}  # parameter -> where its state goes, if it is paged
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def __getstate__(self) -> dict[str, Any]:
        # A copy has the same numbers in memory: a file is nobody's but its maker's.
        return super().__getstate__() | {"state_bits": self.state_bits, "_page_dir": None, "_homes": {}, "_files": []}

    def state_layout(self, parameter: Tensor) -> dict[str, Tensor]:
        """The tensors of a parameter's state, without values (on torch's `meta` device).

        32 bits: `exp_avg` and `exp_avg_sq`, float32 in the parameter's shape. 8 bits: the same as codes, uint8, each
        with its `..._absmax`, a float32 for 256 values.
        """
        shape, n = parameter.shape, parameter.numel()
        values = torch.empty(shape, dtype=torch.float32, device="meta")
        if self.state_bits == 32 or n < MIN_8BIT_SIZE:
            return dict.fromkeys(_32BIT, values)
        codes = torch.empty(shape, dtype=torch.uint8, device="meta")
        absmax = torch.empty(block_count(n, OPTIMIZER_BLOCK_SIZE), dtype=torch.float32, device="meta")
        return dict(zip(_8BIT, (codes, absmax, codes, absmax), strict=True))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; raises HalfbyteError if the group's state has no room in the page directory."""
        super().add_param_group(param_group)
        try:
            self._page(self.param_groups[-1]["params"])
        except HalfbyteError:
            del self.param_groups[-1]
            raise

    def _page(self, parameters: list[Tensor]) -> None:
        """Give the parameters' states a place in a file, or, where they are a GPU's, in unified memory."""
        if self._page_dir is None or not parameters:  # a trainer's group of what decays not may be empty
            return
        layouts = [self.state_layout(parameter) for parameter in parameters]
        if any(parameter.is_cuda for parameter in parameters):
            for parameter, layout in zip(parameters, layouts, strict=True):
                self._homes[parameter] = unified_state(layout, parameter.device)
            return
        file = PageFile(self._page_dir, layouts)
        self._homes |= zip(parameters, file.tensors, strict=True)
        self._files.append(file)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self._update(group)
        return loss

    def _update(self, group: dict[str, Any]) -> None:
        # Those that have taken equally many steps, with state of as many bits, on one device: almost always all.
        together: dict[tuple[int, tuple[str, ...], torch.device], list[Tensor]] = {}
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            step = self._begin(parameter)
            names: tuple[str, ...] = _8BIT if _8BIT[1] in self.state[parameter] else _32BIT
            together.setdefault((step, names, parameter.device), []).append(parameter)
        for (step, names, _), alike in together.items():
            wide = [parameter.to(torch.float32, memory_format=torch.contiguous_format) for parameter in alike]
            step_op: Callable[..., None] = ops.adamw_8bit_step if names is _8BIT else ops.adamw_step
            step_op(
                wide,
                [parameter.grad.float() for parameter in alike],  # type: ignore[union-attr]
                *([self.state[parameter][name] for parameter in alike] for name in names),
                group["lr"],
                *group["betas"],
                group["eps"],
                group["weight_decay"],
                step,
            )
            for parameter, updated in zip(alike, wide, strict=True):
                if updated is not parameter:  # one that is not float32, or not contiguous
                    parameter.copy_(updated)

    def _begin(self, parameter: Tensor) -> int:
        """Make the parameter's state if it has none; the step that is now taken, from 1."""
        state = self.state[parameter]
        if not state:
            state.update(step=0, **{name: tensor.zero_() for name, tensor in self._place(parameter).items()})
        state["step"] += 1
        return int(state["step"])

    def _place(self, parameter: Tensor) -> dict[str, Tensor]:
        """Tensors for a parameter's state, of whatever values: those that it has in pages, or new ones."""
        layout, device = self.state_layout(parameter), parameter.device
        return self._homes.get(parameter) or {
            name: torch.empty_like(like, device=device) for name, like in layout.items()
        }

    def evict(self) -> None:
        """Write paged state to its file and give its memory back now; the next step reads it again."""
        for file in self._files:
            file.evict()

    def set_state(self, parameter: Tensor, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Copy a saved state to where this optimizer keeps it.

        Raises:
            HalfbyteError: it was saved with other `state_bits`, or is another parameter's; nothing was set.
        """
        self._check_state(parameter, tensors)
        state = self._place(parameter)
        for name, tensor in state.items():
            tensor.copy_(tensors[name])  # which may be itself
        self.state[parameter] = {"step": step, **state}

    def _check_state(self, parameter: Tensor, tensors: Mapping[str, Tensor]) -> None:
        wanted, found = (
            {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in state.items()}
            for state in (self.state_layout(parameter), tensors)
        )
        if wanted != found:
            raise HalfbyteError(
                f"AdamW: the saved state of a parameter of shape {tuple(parameter.shape)} is {found}, and not {wanted};"
                " load it into an optimizer with the state_bits and the parameters that it was saved with."
            )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Copy a saved state, paged or not, to where this optimizer keeps it; the settings of groups as torch does.

        Raises:
            HalfbyteError: it was saved with other `state_bits`, or for other parameters; nothing was set.
        """
        saved = state_dict["state"]
        numbers = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        parameters = chain.from_iterable(group["params"] for group in self.param_groups)
        tensors = {}
        for number, parameter in zip(numbers, parameters, strict=False):  # that they are as many, torch checks below
            if number in saved:
                tensors[parameter] = {name: value for name, value in saved[number].items() if name != "step"}
                self._check_state(parameter, tensors[parameter])
        # torch would give the moments the parameter's dtype. It gets the numbers of steps alone.
        steps = {number: {"step": int(state["step"])} for number, state in saved.items()}
        super().load_state_dict({**state_dict, "state": steps})
        for parameter, state in tensors.items():
            self.set_state(parameter, self.state[parameter]["step"], state)
