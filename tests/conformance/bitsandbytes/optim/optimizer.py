"""halfbyte's AdamW with bitsandbytes' arguments, and with its names for the state."""

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from halfbyte.formats import DYNAMIC_SIGNED, DYNAMIC_UNSIGNED
from halfbyte.optim import AdamW

from .._absent import OTHER_OPTIMIZER, NotInHalfbyteError, absent_class

_NAMES = {
    "state1": "exp_avg",
    "state2": "exp_avg_sq",
    "absmax1": "exp_avg_absmax",
    "absmax2": "exp_avg_sq_absmax",
}
_MAPS = {"qmap1": DYNAMIC_SIGNED, "qmap2": DYNAMIC_UNSIGNED}


class _State(dict[str, Any]):
    """A parameter's state as halfbyte has it, which answers to the other names too."""

    def __missing__(self, name: str) -> Any:
        return torch.tensor(_MAPS[name]) if name in _MAPS else self[_NAMES[name]]


class Optimizer2State(AdamW):
    """`weight_decay` is decoupled. What halfbyte has no setting for must have the value that it stands for."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        is_paged: bool = False,
        **others: Any,
    ) -> None:
        if amsgrad or args is not None or others or min_8bit_size != 4096:
            raise NotInHalfbyteError(type(self).__name__, "amsgrad, args and min_8bit_size")
        super().__init__(
            params, lr=lr, betas=tuple(betas), eps=eps, weight_decay=weight_decay, state_bits=optim_bits, paged=is_paged
        )
        self._answer_to_both_names()

    def _answer_to_both_names(self) -> None:
        self.state = defaultdict(_State, {key: _State(value) for key, value in self.state.items()})

    def state_dict(self) -> dict[str, Any]:
        saved = super().state_dict()
        saved["state"] = {number: dict(state) for number, state in saved["state"].items()}
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._answer_to_both_names()

    def set_state(self, parameter: Tensor, step: int, tensors: Mapping[str, Tensor]) -> None:
        super().set_state(parameter, step, tensors)
        self.state[parameter] = _State(self.state[parameter])


class GlobalOptimManager:
    """bitsandbytes' settings of single parameters, which halfbyte has none of."""

    _instance: "GlobalOptimManager | None" = None

    @classmethod
    def get_instance(cls) -> "GlobalOptimManager":
        cls._instance = cls._instance or cls()
        return cls._instance

    def __getattr__(self, name: str) -> Any:
        def refuse(*_: Any, **__: Any) -> None:
            raise NotInHalfbyteError(f"GlobalOptimManager.{name}", "settings of single parameters")

        return refuse


OTHERS = {
    name: absent_class(name, OTHER_OPTIMIZER, torch.optim.Optimizer)
    for family in ("Adagrad", "LAMB", "LARS", "Lion", "RMSprop", "SGD")
    for name in (family, f"{family}8bit", f"{family}32bit")
} | {
    name: absent_class(name, OTHER_OPTIMIZER, torch.optim.Optimizer)
    for name in ("PagedLion", "PagedLion8bit", "PagedLion32bit", "PytorchLARS")
}
