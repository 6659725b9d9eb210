"""LoRA through PEFT: its configuration, its wrapper, its file format; our arithmetic.

PEFT maps a base layer to a LoRA layer through `LoraConfig._register_custom_module`. seams.py does that whenever an
adapter is put on a model with 4-bit layers, so PEFT's own calls suffice; what is here adds errors for people.
"""

import copy
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
from torch import Tensor, nn
from transformers import PreTrainedModel

from halfbyte.errors import HalfbyteError
from halfbyte.huggingface.dora import Dora, row_factors
from halfbyte.huggingface.initial import check_initializer, dense_stand_in, reads_base
from halfbyte.huggingface.peft_experts import NO_DROPOUT
from halfbyte.huggingface.shared_input import SharedInput, find_shared_inputs
from halfbyte.huggingface.source import reason
from halfbyte.nn import Linear4bit, lora_linears
from halfbyte.ops import MOST_TERMS
from halfbyte.quant import QuantizedTensor, quantize_like


class LoraLinear4bit(PeftLinear):  # type: ignore[misc]
    """A LoRA layer over a Linear4bit: y = x·Wᵀ + s·B·A·dropout(x), gradients to x, A and B alone.

    With DoRA each output is scaled by its learned magnitude (halfbyte.nn.dora).
    """

    known_squares: tuple[Tensor, Tensor] | None = None  # codes, and the squares of the norms of their rows
    _before_merge: tuple[QuantizedTensor, nn.Parameter | None] | None = None

    def __init__(self, base_layer: Linear4bit, adapter_name: str, **kwargs: Any) -> None:
        super().__init__(base_layer, adapter_name, **kwargs)
        self.shared_input: SharedInput | None = None  # with the layers beside it, once that is found

    @property
    def fan_in_fan_out(self) -> bool:
        """False, whatever a configuration for GPT-2 says: its weights were transposed when they were quantized."""
        return False

    @fan_in_fan_out.setter
    def fan_in_fan_out(self, _: bool) -> None:
        pass

    @property
    def lora_variants(self) -> dict[tuple[str, ...], Any]:
        return {(): None, ("use_dora",): Dora}

    @property
    def unmerged(self) -> QuantizedTensor:
        """The base's weight from before any merge."""
        quantized: QuantizedTensor = (self._before_merge or [self.get_base_layer().quantized])[0]
        return quantized

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs: Any) -> None:
        """As PEFT's, with a dense base for initial values that are made from it: PEFT would read the codes."""
        check_initializer(config.init_lora_weights)
        try:
            self.resolve_lora_variant(config=config)
        except ValueError as error:
            raise HalfbyteError(
                f"Of LoRA's variants DoRA alone can be put on a base in 4 bits ({reason(error)}); leave others out."
            ) from error
        reads = reads_base(config.init_lora_weights)
        if config.init_lora_weights == "loftq" or (reads and self.get_base_layer().absmax is None):
            # LoftQ needs the 16-bit weights (seams.py); in an outline there are no numbers to begin with.
            config, reads = copy.copy(config), False
            config.init_lora_weights = True
        if not reads:
            super().update_layer(adapter_name, r, lora_alpha, config, **kwargs)
            return
        with dense_stand_in(self):
            super().update_layer(adapter_name, r, lora_alpha, config, **kwargs)
        if adapter_name in self.lora_variant:
            self.lora_variant[adapter_name].init(self, adapter_name)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        adapter = self._single_adapter(kwargs)
        if adapter is None:
            y: Tensor = super().forward(x, *args, **kwargs)
            return y
        if self.shared_input is None or len({layer._alike() for layer in self.shared_input.layers}) > 1:
            return _forward_of_all([self], x)[0]
        return self.shared_input.output_of(self, x, _forward_of_all)

    def _alike(self) -> tuple[Any, ...] | None:
        """In what layers that are computed together have to agree; None where this one cannot be."""
        adapter, base = self._single_adapter({}), self.get_base_layer()
        if adapter is None:
            return None
        stored = base.quant_type, base.block_size, base.double_quant, base.compute_dtype
        return adapter, self.scaling[adapter], self._drop_probability(adapter), *stored

    def _drop_probability(self, adapter: str) -> float:
        return getattr(self.lora_dropout[adapter], "p", 0.0) if self.training else 0.0

    def plain_adapter(self) -> str | None:
        """The adapter, where there is just one and it is plain LoRA."""
        adapter = self._single_adapter({})
        return None if adapter in self.lora_variant else adapter

    def _single_adapter(self, kwargs: dict[str, Any]) -> str | None:
        """The adapter, where there is just one, of LoRA or DoRA; PEFT's own forward serves the rest."""
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
        if not new:
            return
        before, bias = self._before_merge or (base.quantized, base.bias)
        merged_bias = bias
        with torch.no_grad():
            weight = before.dequantize(torch.float32)
            for name in (*self.merged_adapters, *new):
                weight += self.get_delta_weight(name).float()
                if name in self.lora_variant:
                    weight *= row_factors(self, name)[:, None]
                merged_bias = self._with_bias_of(name, merged_bias)
        merged = quantize_like(weight, before)
        self._before_merge = before, bias
        base.quantized, base.bias = merged, merged_bias
        self.merged_adapters.extend(new)

    def _with_bias_of(self, adapter: str, bias: nn.Parameter | None) -> nn.Parameter | None:
        """The bias and, if it has one, the adapter's."""
        if not self.lora_bias[adapter]:
            return bias
        if bias is None:
            raise HalfbyteError(f"Adapter {adapter!r} has a bias and the layer has none, so they cannot be merged.")
        total = (bias + self.lora_B[adapter].bias * self.scaling[adapter]).to(bias.dtype)
        if not total.isfinite().all():
            raise HalfbyteError(f"Adapter {adapter!r} has a bias that holds a NaN or an infinity; it is not merged.")
        return nn.Parameter(total, requires_grad=bias.requires_grad)

    def unmerge(self) -> None:
        """Restore the bits from before the first merge."""
        if self._before_merge is not None:
            base = self.get_base_layer()
            base.quantized, base.bias = self._before_merge
            self._before_merge = None
            self.merged_adapters.clear()


def _forward_of_all(layers: Sequence[LoraLinear4bit], x: Tensor) -> list[Tensor]:
    """What layers that are alike make of one input."""
    adapter = layers[0]._single_adapter({})
    assert adapter is not None, "whoever calls this has asked"
    bases = [layer.get_base_layer() for layer in layers]
    ys = lora_linears(
        x.to(bases[0].compute_dtype),
        [base.quantized for base in bases],
        [(layer.lora_A[adapter].weight, layer.lora_B[adapter].weight) for layer in layers],
        layers[0].scaling[adapter],
        layers[0]._drop_probability(adapter),
    )
    outputs = []
    for layer, base, y in zip(layers, bases, ys, strict=True):
        if adapter in layer.lora_variant:
            y = (y * row_factors(layer, adapter)).to(y.dtype)
        outputs.append((y if base.bias is None else y + base.bias.to(y.dtype)).to(x.dtype))
    return outputs


def add_lora(model: PreTrainedModel, config: LoraConfig) -> PeftModel:
    """Freeze the model and put LoRA layers on it: `add_lora(model, LoraConfig(r=16, target_modules="all-linear"))`.

    The adapters are float32, whatever the model computes in. `peft.get_peft_model` does the same.

    Raises:
        HalfbyteError: `target_modules` names nothing in the model.
    """
    try:
        with _quiet_peft():
            return get_peft_model(model, config)
    except (ValueError, re.error) as error:
        if "ParamWrapper does not work with lora_dropout" in str(error):  # of a router, or of experts in 16 bits
            raise HalfbyteError(NO_DROPOUT) from error
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


def share_inputs(model: nn.Module) -> None:
    """Compute layers that read one input together, where a trial run finds such."""
    for layers in find_shared_inputs(model, LoraLinear4bit):
        for begin in range(0, len(layers), MOST_TERMS):
            group = SharedInput(layers[begin : begin + MOST_TERMS])
            for layer in group.layers:
                layer.shared_input = group


@contextmanager
def _quiet_peft() -> Iterator[None]:
    """Without what peft 0.21 says about its own doings: a name of transformers' that it asks for, experts' patterns."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        warnings.filterwarnings("ignore", r"The following (rank|alpha)_pattern keys .*gate_up_proj", RuntimeWarning)
        warnings.filterwarnings("ignore", "Found missing adapter keys", UserWarning)  # told by load_adapter
        yield
