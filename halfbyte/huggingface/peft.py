"""LoRA through PEFT: its configuration, its wrapper, its file format; our arithmetic.

PEFT maps a base layer to a LoRA layer through `LoraConfig._register_custom_module`. The mapping is not
saved with an adapter, so it is registered again on load.
"""

import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora.layer import Linear as PeftLinear
from peft.tuners.tuners_utils import check_adapters_to_merge
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from halfbyte.errors import HalfbyteError
from halfbyte.huggingface.shared_input import SharedInput, find_shared_inputs
from halfbyte.huggingface.source import reason
from halfbyte.nn import Linear4bit, lora_linears
from halfbyte.ops import MOST_TERMS
from halfbyte.quant import QuantizedTensor, quantize_4bit

# PEFT's initial values that do not look at the base weight.
INITIALIZERS = (True, False, "gaussian", "eva")


class LoraLinear4bit(PeftLinear):  # type: ignore[misc]
    """A LoRA layer over a Linear4bit: y = x·Wᵀ + s·B·A·dropout(x), gradients to x, A and B alone."""

    def __init__(self, base_layer: Linear4bit, adapter_name: str, **kwargs: Any) -> None:
        super().__init__(base_layer, adapter_name, **kwargs)
        self._before_merge: QuantizedTensor | None = None
        self.shared_input: SharedInput | None = None  # with the layers beside it, once that is found

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs: Any) -> None:
        """As PEFT's, for adapters that do not begin with numbers of the base weight: PEFT would read its codes."""
        if config.init_lora_weights not in INITIALIZERS:
            raise HalfbyteError(
                f"init_lora_weights {config.init_lora_weights!r} changes or reads the base weight, which is in 4 bits;"
                " leave it out."
            )
        if self.resolve_lora_variant(config=config) is not None:
            raise HalfbyteError("Only plain LoRA can be put on a base in 4 bits; leave use_dora and the like out.")
        super().update_layer(adapter_name, r, lora_alpha, config, **kwargs)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        adapter = self._plain_adapter(kwargs)
        if adapter is None:
            y: Tensor = super().forward(x, *args, **kwargs)
            return y
        if self.shared_input is None or len({layer._alike() for layer in self.shared_input.layers}) > 1:
            return _forward_of_all([self], x)[0]
        return self.shared_input.output_of(self, x, _forward_of_all)

    def _alike(self) -> tuple[Any, ...] | None:
        """In what layers that are computed together have to agree; None where this one cannot be."""
        adapter, base = self._plain_adapter({}), self.get_base_layer()
        if adapter is None:
            return None
        stored = base.quant_type, base.block_size, base.double_quant, base.compute_dtype
        return adapter, self.scaling[adapter], self._drop_probability(adapter), *stored

    def _drop_probability(self, adapter: str) -> float:
        return getattr(self.lora_dropout[adapter], "p", 0.0) if self.training else 0.0

    def _plain_adapter(self, kwargs: dict[str, Any]) -> str | None:
        """The adapter, where there is just one and it is plain LoRA; PEFT's own forward serves the rest."""
        active = [name for name in self.active_adapters if name in self.lora_A]
        if kwargs or self.disable_adapters or self.merged or len(active) != 1:
            return None
        (adapter,) = active
        return None if self.lora_bias[adapter] else adapter

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:  # noqa: ARG002
        """Add the adapters to the dequantized weight and quantize once; the codes are kept for `unmerge`.

        Those that are merged already are added anew to the first codes: what is rounded twice is further away. Every
        merge is a safe one: quantization refuses a weight that is not finite.
        """
        base = self.get_base_layer()
        new = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.lora_A]
        biased = next((name for name in new if self.lora_bias[name]), None)
        if biased is not None:
            raise HalfbyteError(f"Adapter {biased!r} has a bias; its merge into a base in 4 bits is not there yet.")
        if not new:
            return
        before = base.quantized if self._before_merge is None else self._before_merge
        with torch.no_grad():
            weight = before.dequantize(torch.float32)
            for name in (*self.merged_adapters, *new):
                weight += self.get_delta_weight(name).float()
        merged = quantize_4bit(weight.to(before.dtype), before.quant_type, before.block_size, base.double_quant)
        self._before_merge = before
        base.quantized = merged
        self.merged_adapters.extend(new)

    def unmerge(self) -> None:
        """Restore the bits from before the first merge."""
        if self._before_merge is not None:
            self.get_base_layer().quantized = self._before_merge
            self._before_merge = None
            self.merged_adapters.clear()


def _forward_of_all(layers: Sequence[LoraLinear4bit], x: Tensor) -> list[Tensor]:
    """What layers that are alike make of one input."""
    adapter = layers[0]._plain_adapter({})
    assert adapter is not None, "whoever calls this has asked"
    bases = [layer.get_base_layer() for layer in layers]
    ys = lora_linears(
        x.to(bases[0].compute_dtype),
        [base.quantized for base in bases],
        [(layer.lora_A[adapter].weight, layer.lora_B[adapter].weight) for layer in layers],
        layers[0].scaling[adapter],
        layers[0]._drop_probability(adapter),
    )
    return [
        (y if base.bias is None else y + base.bias.to(y.dtype)).to(x.dtype) for y, base in zip(ys, bases, strict=True)
    ]


def add_lora(model: PreTrainedModel, config: LoraConfig) -> PeftModel:
    """Freeze the model and put LoRA layers on it: `add_lora(model, LoraConfig(r=16, target_modules="all-linear"))`.

    The adapters are float32, whatever the model computes in.

    Raises:
        HalfbyteError: `target_modules` names nothing in the model.
    """
    adapted = wrap_model(model, config)
    share_inputs(adapted)
    return adapted


def wrap_model(model: PreTrainedModel, config: LoraConfig) -> PeftModel:
    """PEFT's wrapper with our layers in it, for a model on any device, `meta` too, where nothing can be run.

    Raises:
        HalfbyteError: `target_modules` names nothing in the model.
    """
    _register(config)
    try:
        with _quiet_peft():
            return get_peft_model(model, config)
    except (ValueError, re.error) as error:
        raise HalfbyteError(f"target_modules does not fit the model: {reason(error)}.") from error


def load_adapter(
    model: PreTrainedModel | PeftModel, directory: Path | str, is_trainable: bool = False, name: str = "default"
) -> PeftModel:
    """Put a saved adapter on the model that it was trained on; beside others, under another name, where there are some.

    Raises:
        HalfbyteError: the directory holds no adapter, or one that does not fit the model.
    """
    directory = Path(directory)
    config = read_adapter_config(directory)
    try:
        _register(config)
        with _quiet_peft():
            if isinstance(model, PeftModel):
                adapted = model
                model.load_adapter(str(directory), name, is_trainable, peft_config=config)
                model.set_adapter(name)
            else:
                adapted = PeftModel.from_pretrained(model, str(directory), name, is_trainable, config=config)
        saved = load_file(directory / "adapter_model.safetensors")
    except (RuntimeError, ValueError, TypeError, KeyError, OSError, re.error, SafetensorError) as error:
        raise HalfbyteError(f"{directory}: the adapter does not fit the model: {reason(error)}.") from error
    expected = get_peft_model_state_dict(adapted, adapter_name=name, save_embedding_layers=False)
    for key in sorted(expected.keys() ^ {key for key in saved if "lora_" in key}):
        raise HalfbyteError(f"{directory}: the adapter does not fit the model: {key} is in one of them only.")
    for key, tensor in saved.items():
        if not tensor.isfinite().all():
            raise HalfbyteError(f"{directory}: the adapter's {key} holds a NaN or an infinity.")
    share_inputs(adapted)
    return adapted


def read_adapter_config(directory: Path | str) -> LoraConfig:
    """A saved adapter's configuration, before any model is loaded.  Raises HalfbyteError if it is not LoRA's."""
    directory = Path(directory)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (directory / name).is_file():
            raise HalfbyteError(f"{directory} holds no {name}, so it is not a saved adapter.")
    try:
        config = LoraConfig.from_pretrained(str(directory))
    except Exception as error:  # PEFT raises what json, its own classes and the hub's client raise
        raise HalfbyteError(f"{directory}/adapter_config.json cannot be read: {reason(error)}.") from error
    if not isinstance(config, LoraConfig):
        raise HalfbyteError(f"{directory}/adapter_config.json: {config.peft_type} is not LoRA, which alone is read.")
    return config


def share_inputs(model: PeftModel) -> None:
    """Compute layers that read one input together, where a trial run finds such."""
    for layers in find_shared_inputs(model, LoraLinear4bit):
        for begin in range(0, len(layers), MOST_TERMS):
            group = SharedInput(layers[begin : begin + MOST_TERMS])
            for layer in group.layers:
                layer.shared_input = group


def _register(config: LoraConfig) -> None:
    config._register_custom_module({Linear4bit: LoraLinear4bit})


@contextmanager
def _quiet_peft() -> Iterator[None]:
    """Without what peft 0.21 says about its own doings: a name of transformers' that it asks for, experts' patterns."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        warnings.filterwarnings("ignore", r"The following (rank|alpha)_pattern keys .*gate_up_proj", RuntimeWarning)
        warnings.filterwarnings("ignore", "Found missing adapter keys", UserWarning)  # told by load_adapter
        yield
