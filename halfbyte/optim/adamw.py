"""AdamW: Adam with decoupled weight decay.  Loshchilov and Hutter (arXiv 1711.05101), algorithm 2.

    m ← β₁·m + (1−β₁)·g        v ← β₂·v + (1−β₂)·g²
    p ← p − lr·(λ·p + m̂ / (√v̂ + ε))        m̂ = m/(1−β₁ᵗ),  v̂ = v/(1−β₂ᵗ)

Parameters and moments are float32: an adapter is small, and 16-bit moments lose small updates.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from halfbyte import ops


class AdamW(torch.optim.Optimizer):
    """State a parameter: `exp_avg` and `exp_avg_sq`, float32 in its shape, and `step`, an int."""

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 2e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

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
        beta1, beta2 = group["betas"]
        # Parameters that have taken equally many steps, on one device, are updated together: almost always all.
        together: dict[tuple[int, torch.device], list[Tensor]] = {}
        for parameter in group["params"]:
            if parameter.grad is not None:
                together.setdefault((self._begin(parameter), parameter.device), []).append(parameter)
        for (step, _), parameters in together.items():
            states = [self.state[parameter] for parameter in parameters]
            wide = [parameter.to(torch.float32, memory_format=torch.contiguous_format) for parameter in parameters]
            ops.adamw_step(
                wide,
                [parameter.grad.float() for parameter in parameters],  # type: ignore[union-attr]
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                group["lr"],
                beta1,
                beta2,
                group["eps"],
                group["weight_decay"],
                step,
            )
            for parameter, updated in zip(parameters, wide, strict=True):
                if updated is not parameter:  # one that is not float32, or not contiguous
                    parameter.copy_(updated)

    def _begin(self, parameter: Tensor) -> int:
        """Make the parameter's state if it has none; the step that is now taken, from 1."""
        state = self.state[parameter]
        if not state:
            state["step"] = 0
            for moment in ("exp_avg", "exp_avg_sq"):
                state[moment] = torch.zeros(parameter.shape, dtype=torch.float32, device=parameter.device)
        state["step"] += 1
        return int(state["step"])
