"""LoRA on experts in 4 bits, through PEFT's `target_parameters`: its names and its format; our products.

PEFT adds B·A to the whole tensor of experts before each forward, which cannot be done to codes and would take as much
memory as the experts have in 16 bits. Here each expert's rows go through its own A and B (halfbyte.nn.experts4bit).
PEFT nests a layer's wrappers, one for each of the two tensors.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from halfbyte.errors import HalfbyteError
from halfbyte.nn import Experts4bit
from halfbyte.quant import QuantizedTensor, quantize_like

NO_DROPOUT = "PEFT has no dropout for experts' tensors; set lora_dropout to 0, or name target_modules without experts."


class LoraExperts4bit(ParamWrapper):  # type: ignore[misc]
    """Low-rank adapters for one of the tensors of an Experts4bit: A `(r·experts, in)`, B `(out, r·experts)`."""

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, parameter_name: str, config: LoraConfig, **kwargs: Any
    ) -> None:
        self._before_merge: QuantizedTensor | None
        _check(config)
        super().__init__(base_layer, adapter_name, parameter_name=parameter_name, config=config, **kwargs)
        self._before_merge = None

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:  # noqa: ARG002
        # In the order of the tensor; PEFT swaps them where it is (experts, out, in).
        self.num_experts, first, second = self.get_base_layer().shapes[self.parameter_name]
        self._param_ndim = 3
        return first, second

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs: Any) -> None:
        """As PEFT's.  Raises HalfbyteError for what it has for layers and not for parameters."""
        _check(config)
        super().update_layer(adapter_name, r, lora_alpha, config, **kwargs)

    @contextmanager
    def _activate_lora(self, active_adapters: list[str]) -> Iterator[None]:
        """Within, the experts multiply with the adapters, which for several are those of all ranks."""
        base: Experts4bit = self.get_base_layer()
        factors = [self._factors(adapter) for adapter in active_adapters if adapter in self.lora_A]
        if factors:
            lora_A, lora_B = zip(*factors, strict=True)
            base.low_rank[self.parameter_name] = torch.cat(lora_A, 1), torch.cat(lora_B, 2)
        try:
            yield
        finally:
            base.low_rank.pop(self.parameter_name, None)

    def _factors(self, adapter: str) -> tuple[Tensor, Tensor]:
        """A `(experts, r, in)` and B `(experts, out, r)` times the scaling."""
        lora_A, lora_B = self.lora_A[adapter].weight, self.lora_B[adapter].weight
        lora_A = lora_A.view(self.num_experts, -1, lora_A.shape[1])
        lora_B = lora_B.view(lora_B.shape[0], -1, self.num_experts).permute(2, 0, 1)
        return lora_A, lora_B * self.scaling[adapter]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:  # noqa: ARG002
        """Add the adapters to the dequantized weights and quantize once; the codes are kept for `unmerge`.

        Those that are merged already are added anew to the first codes: what is rounded twice is further away.
        """
        base: Experts4bit = self.get_base_layer()
        new = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.lora_A]
        if not new:
            return
        before = self._before_merge or base.get_quantized(self.parameter_name)
        with torch.no_grad():
            merged = before.dequantize(torch.float32)
            for name in (*self.merged_adapters, *new):
                for expert, (lora_A, lora_B) in enumerate(zip(*self._factors(name), strict=True)):
                    delta = lora_B.float() @ lora_A.float()
                    merged[expert] += delta.t() if base.is_transposed else delta
        base.set_quantized(self.parameter_name, quantize_like(merged, before))
        self._before_merge = before
        self.merged_adapters.extend(new)

    def unmerge(self) -> None:
        """Restore the bits from before the first merge."""
        if self._before_merge is not None:
            self.get_base_layer().set_quantized(self.parameter_name, self._before_merge)
            self._before_merge = None
            self.merged_adapters.clear()


# PEFT knows its wrapper by this name when it puts a second adapter on.
LoraExperts4bit.__name__ = ParamWrapper.__name__


def _check(config: LoraConfig) -> None:
    if config.lora_dropout:
        raise HalfbyteError(NO_DROPOUT)
    if config.use_dora:
        raise HalfbyteError(
            "PEFT has no DoRA for experts' tensors; leave use_dora out, or name target_modules without experts."
        )
    if config.init_lora_weights not in (True, False, "gaussian"):
        raise HalfbyteError(
            f"init_lora_weights {config.init_lora_weights!r} is not there for experts' tensors;"
            " use True or gaussian, or name target_modules without experts."
        )
