"""A parameter of any module in 4 bits, dequantized where it is read: the weights of experts, of any shape."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .. import functional
from ..functional import QuantState


class Bnb4bitParametrization(nn.Module):
    def __init__(self, quant_state: QuantState) -> None:
        super().__init__()
        self.quant_state = quant_state

    @torch.no_grad()
    def forward(self, quantized_param: Tensor) -> Tensor:
        return functional.dequantize_4bit(quantized_param, self.quant_state)


def replace_parameter_4bit(
    module: nn.Module,
    param_name: str,
    compress_statistics: bool = False,
    quant_type: str = "nf4",
    blocksize: int | None = None,
) -> None:
    codes, state = functional.quantize_4bit(
        _parameter(module, param_name).data,
        blocksize=blocksize,
        compress_statistics=compress_statistics,
        quant_type=quant_type,
    )
    setattr(module, param_name, nn.Parameter(codes, requires_grad=False))
    _parametrize(module, param_name, state)


def replace_parameter_4bit_prequantized(
    module: nn.Module, param_name: str, qs_dict: dict[str, Any], device: torch.device
) -> None:
    _parameter(module, param_name)
    _parametrize(module, param_name, QuantState.from_dict(qs_dict, device))


def _parameter(module: nn.Module, name: str) -> nn.Parameter:
    if not hasattr(module, name):
        raise AttributeError(f"Module does not have parameter '{name}'")
    parameter = getattr(module, name)
    if not isinstance(parameter, nn.Parameter):
        raise TypeError(f"Parameter '{name}' is not an instance of nn.Parameter")
    return parameter


def _parametrize(module: nn.Module, name: str, state: QuantState) -> None:
    parametrize.register_parametrization(module, name, Bnb4bitParametrization(state), unsafe=True)
    module.register_state_dict_post_hook(partial(_save_codes, name=name))


def _save_codes(module: nn.Module, state_dict: dict[str, Any], prefix: str, _metadata: Any, *, name: str) -> None:
    """Under the parameter's own name, with the constants beside it, as a layer's are."""
    codes = state_dict.pop(f"{prefix}parametrizations.{name}.original", None)
    if codes is not None:
        state_dict[prefix + name] = codes
        state = module.parametrizations[name][0].quant_state
        state_dict |= {f"{prefix}{name}.{key}": value for key, value in state.as_dict(packed=True).items()}
