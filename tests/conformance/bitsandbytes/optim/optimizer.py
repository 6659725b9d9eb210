"""halfbyte's AdamW with bitsandbytes' arguments, and with its names for the state."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

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


class GlobalOptimManager:
    """Settings of single parameters, of which there is one here: the bits of a parameter's state."""

    _instance: "GlobalOptimManager | None" = None

    def __init__(self) -> None:
        self.initialize()

    def initialize(self) -> None:
        self._bits: MutableMapping[Tensor, int] = WeakTensorKeyDictionary()
        self._of_modules: list[tuple[nn.Module, str, int]] = []  # for a parameter that a module may yet exchange

    @classmethod
    def get_instance(cls) -> "GlobalOptimManager":
        cls._instance = cls._instance or cls()
        return cls._instance

    def register_parameters(self, params: Any) -> None:
        """Parameters are known by themselves, wherever they are, and not by their number."""

    def override_config(
        self,
        parameters: Tensor | Iterable[Tensor],
        key: str | None = None,
        value: Any = None,
        key_value_dict: dict[str, Any] | None = None,
    ) -> None:
        bits = _bits_alone(key_value_dict or {key: value})
        for parameter in [parameters] if isinstance(parameters, Tensor) else parameters:
            self._bits[parameter] = bits

    def register_module_override(self, module: nn.Module, param_name: str, config: dict[str, Any]) -> None:
        self._of_modules.append((module, param_name, _bits_alone(config)))

    def bits(self, parameter: Tensor, otherwise: int) -> int:
        for module, name, bits in self._of_modules:
            if getattr(module, name) is parameter:
                return bits
        return self._bits.get(parameter, otherwise)


def _bits_alone(config: dict[Any, Any]) -> int:
    if config.keys() != {"optim_bits"}:
        raise NotInHalfbyteError("GlobalOptimManager", "settings of single parameters other than optim_bits")
    return config["optim_bits"]


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

    def state_layout(self, parameter: Tensor) -> dict[str, Tensor]:
        own = self.state_bits
        self.state_bits = GlobalOptimManager.get_instance().bits(parameter, own)
        try:
            return super().state_layout(parameter)
        finally:
            self.state_bits = own

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


OTHERS = {
    name: absent_class(name, OTHER_OPTIMIZER, torch.optim.Optimizer)
    for family in ("Adagrad", "LAMB", "LARS", "Lion", "RMSprop", "SGD")
    for name in (family, f"{family}8bit", f"{family}32bit")
} | {
    name: absent_class(name, OTHER_OPTIMIZER, torch.optim.Optimizer)
    for name in ("PagedLion", "PagedLion8bit", "PagedLion32bit", "PytorchLARS")
}
