"""LoRA through PEFT: its configuration, its wrapper, its file format; our arithmetic.

PEFT maps a base layer to a LoRA layer through `LoraConfig._register_custom_module`. The mapping is not
saved with an adapter, so it is registered again on load.
"""

from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import Linear as PeftLinear
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor
from transformers import PreTrainedModel

from halfbyte.errors import HalfbyteError
from halfbyte.nn import Linear4bit, lora_product
from halfbyte.quant import QuantizedTensor, quantize_4bit


class LoraLinear4bit(PeftLinear):  # type: ignore[misc]
    """A LoRA layer over a Linear4bit: y = x·Wᵀ + s·B·A·dropout(x), gradients to x, A and B alone."""

    def __init__(self, base_layer: Linear4bit, adapter_name: str, **kwargs: Any) -> None:
        super().__init__(base_layer, adapter_name, **kwargs)
        self._before_merge: list[QuantizedTensor] = []

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        adapter = self._plain_adapter(kwargs)
        if adapter is None:
            y: Tensor = super().forward(x, *args, **kwargs)
            return y
        base = self.get_base_layer()
        dropout = self.lora_dropout[adapter]
        delta = lora_product(
            x.to(base.compute_dtype),
            self.lora_A[adapter].weight,
            self.lora_B[adapter].weight,
            self.scaling[adapter],
            getattr(dropout, "p", 0.0) if self.training else 0.0,
        )
        return base(x) + delta.to(x.dtype)  # type: ignore[no-any-return]

    def _plain_adapter(self, kwargs: dict[str, Any]) -> str | None:
        """The adapter, where there is just one and it is plain LoRA; PEFT's own forward serves the rest."""
        active = [name for name in self.active_adapters if name in self.lora_A]
        if kwargs or self.disable_adapters or self.merged or len(active) != 1:
            return None
        (adapter,) = active
        return None if adapter in self.lora_variant or self.lora_bias[adapter] else adapter

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:  # noqa: ARG002
        """Add the adapters to the dequantized weight and quantize again; the codes are kept for `unmerge`.

        Every merge is a safe one: quantization refuses a weight that is not finite.
        """
        base = self.get_base_layer()
        for adapter in check_adapters_to_merge(self, adapter_names):
            if adapter not in self.lora_A:
                continue
            if adapter in self.lora_variant or self.lora_bias[adapter]:
                raise HalfbyteError(f"Adapter {adapter!r} is not plain LoRA; its merge into 4 bits is not there yet.")
            before = base.quantized
            weight = before.dequantize() + self.get_delta_weight(adapter).to(before.dtype)
            self._before_merge.append(before)
            base.quantized = quantize_4bit(weight, before.quant_type, before.block_size, base.double_quant)
            self.merged_adapters.append(adapter)

    def unmerge(self) -> None:
        """Restore the bits from before the first merge."""
        if self._before_merge:
            self.get_base_layer().quantized = self._before_merge[0]
            self._before_merge.clear()
            self.merged_adapters.clear()


def add_lora(model: PreTrainedModel, config: LoraConfig) -> PeftModel:
    """Freeze the model and put LoRA layers on it: `add_lora(model, LoraConfig(r=16, target_modules="all-linear"))`.

    The adapters are float32, whatever the model computes in.

    Raises:
        HalfbyteError: `target_modules` names nothing in the model.
    """
    _register(config)
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        raise HalfbyteError(f"target_modules {config.target_modules!r}: {error}") from error


def load_adapter(model: PreTrainedModel, directory: Path | str, is_trainable: bool = False) -> PeftModel:
    """Put a saved adapter on the model that it was trained on.

    Raises:
        HalfbyteError: the directory holds no adapter, or one that does not fit the model.
    """
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (Path(directory) / name).is_file():
            raise HalfbyteError(f"{directory} holds no {name}, so it is not a saved adapter.")
    try:
        config = LoraConfig.from_pretrained(str(directory))
        _register(config)
        return PeftModel.from_pretrained(model, str(directory), config=config, is_trainable=is_trainable)
    except (RuntimeError, ValueError, TypeError, OSError) as error:
        reason = " ".join(str(error).split())[:300]
        raise HalfbyteError(f"{directory}: the adapter does not fit the model: {reason}") from error


def _register(config: LoraConfig) -> None:
    config._register_custom_module({Linear4bit: LoraLinear4bit})
