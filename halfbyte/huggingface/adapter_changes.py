"""What saved adapters change in a model, parameter by parameter: read from PEFT's files, computed in float32.

    LoRA      W + s·B·A                        s = alpha / r, or alpha / sqrt(r) with rsLoRA (arXiv 2312.03732)
    experts   W_e + s·B_e·A_e                  each of a mixture's own, in one parameter (PEFT's target_parameters)
    DoRA      m · (W + s·B·A) / ‖W + s·B·A‖    the norm is a row's (arXiv 2402.09353, equation 5)
    bias      b + s·b_B                        where B has one
    saved     another tensor in its place      modules_to_save, trained biases
    tokens    other rows in the place of some  trainable_token_indices

Which layers there are and what scales them is PEFT's to say: its wrapper is put on the model on the meta device, and
the file must have the tensors that the wrapper would save, all of them, in these shapes.
"""

import copy
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
from peft.utils.merge_utils import dare_linear, dare_ties, ties
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from halfbyte.errors import HalfbyteError
from halfbyte.huggingface.initial import INDEPENDENT
from halfbyte.huggingface.peft import add_lora, read_adapter_config
from halfbyte.huggingface.source import reason

_PREFIX = "base_model.model."
# Of what several adapters change in one weight: their sum, or PEFT's sparse sums (arXiv 2306.01708, 2311.03099).
COMBINATIONS: dict[str, Callable[..., Tensor] | None] = {
    "linear": None,
    "ties": ties,
    "dare_linear": dare_linear,
    "dare_ties": dare_ties,
}


@dataclass(frozen=True)
class LowRank:
    """An adapter's factors for one weight; each is the name of a tensor in its file."""

    a: str
    b: str
    scale: float  # of the layer, times the weight of the adapter
    transposed: bool  # the model has the weight as (in, out)
    magnitude: str | None = None
    experts: int | None = None  # the weight is of so many; A is `(r·experts, in)`, and B is `(out, r·experts)`


@dataclass(frozen=True)
class Tokens:
    """Rows of an embedding that were trained."""

    rows: list[int]
    values: str


@dataclass(frozen=True)
class Change:
    """What one adapter does to one parameter."""

    adapter: "AdapterFile"
    low_rank: LowRank | None = None
    bias: tuple[str, float] | None = None  # the name of what is added, and its scale
    saved: str | None = None
    tokens: Tokens | None = None

    def delta(self, weight: Tensor) -> Tensor:
        """B·A in the shape of the weight, float32, not scaled."""
        assert self.low_rank is not None
        a, b = self._factors(self.low_rank)
        product = b @ a
        return (product.mT if self.low_rank.transposed else product).to(weight.device)

    def add_to(self, weight: Tensor) -> None:
        """Adds s·B·A to a float32 weight; of experts one at a time, since all are as large as the weight."""
        low = self.low_rank
        assert low is not None
        a, b = self._factors(low)
        for part, lora_A, lora_B in [(weight, a, b)] if low.experts is None else zip(weight, a, b, strict=True):
            product = (lora_B @ lora_A).to(weight.device)
            part.add_(product.T if low.transposed else product, alpha=low.scale)

    def _factors(self, low: LowRank) -> tuple[Tensor, Tensor]:
        """A `(r, in)` and B `(out, r)`; of experts, one of each for every one."""
        a, b = self.adapter.read(low.a), self.adapter.read(low.b)
        if low.experts is None:
            return a, b
        # PEFT has all ranks of an expert together in A, and all experts of a rank in B.
        return a.view(low.experts, -1, a.shape[1]), b.view(b.shape[0], -1, low.experts).permute(2, 0, 1)


class AdapterFile:
    """A saved adapter: its configuration, and its tensors, each read when it is asked for."""

    def __init__(self, directory: Path | str) -> None:
        """
        Raises:
            HalfbyteError: the directory holds no adapter that can be read, or one that is not LoRA's.
        """
        self.directory = Path(directory)
        self.config = read_adapter_config(self.directory)
        self.file = self.directory / "adapter_model.safetensors"
        try:
            handle: Any = safe_open(self.file, framework="pt", backend="pread")
            self.shapes = {name: tuple(handle.get_slice(name).get_shape()) for name in list(handle.keys())}
        except (SafetensorError, OSError) as error:
            raise HalfbyteError(f"{self.file} cannot be read ({reason(error)}); copy it again.") from error
        self._handle = handle
        if self.config.init_lora_weights not in INDEPENDENT:
            raise HalfbyteError(
                f"{self.directory}: init_lora_weights {self.config.init_lora_weights!r} changed the base as well;"
                " convert the adapter to plain LoRA with PEFT first."
            )

    def read(self, name: str) -> Tensor:
        """A tensor in float32.  Raises HalfbyteError where it cannot be read or is not finite."""
        try:
            tensor: Tensor = self._handle.get_tensor(name).float()
        except (SafetensorError, OSError) as error:
            raise HalfbyteError(f"{self.file}: {name} cannot be read ({reason(error)}).") from error
        if not tensor.isfinite().all():
            raise HalfbyteError(f"{self.directory}: the adapter's {name} holds a NaN or an infinity.")
        return tensor


def find_changes(model: PreTrainedModel, where: str, adapter: AdapterFile, weight: float) -> dict[str, Change]:
    """What the adapter changes in the model, by the model's own names.

    Args:
        model: on the meta device, nothing of it in 4 bits; left as it was.
        where: the model's name, for errors.
        weight: the adapter's, among others.

    Raises:
        HalfbyteError: the adapter is another model's, lacks tensors or has them in other shapes, or is of a kind
            that is no change of a weight.
    """
    wrapped = _wrap(model, where, adapter)
    expected = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    _check_fits(where, adapter, {name: tuple(tensor.shape) for name, tensor in expected.items()})
    changes: dict[str, Change] = {}
    for name, module in wrapped.get_base_model().named_modules():
        if isinstance(module, LoraLayer):
            changes |= _low_rank_changes(adapter, name.replace(".original_module", ""), module, weight)
        elif isinstance(module, TrainableTokensLayer) and not module.tied_adapter:
            owner = name.removesuffix(".token_adapter")
            tokens = Tokens(module.token_indices["default"], f"{_PREFIX}{owner}.token_adapter.trainable_tokens_delta")
            changes[f"{owner}.weight"] = Change(adapter, tokens=tokens)
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for key in adapter.shapes:
        name = key.removeprefix(_PREFIX)
        if name in parameters:
            changes[name] = Change(adapter, saved=key)
    return changes


def are_row_wise(changes: Sequence[Change], combination: str = "linear") -> bool:
    """Whether the rows of the merged weight can be had one after another, from `apply_to_rows`."""
    if len(changes) > 1 and combination != "linear":
        return False
    found = [change.low_rank for change in changes]
    return all(low is not None and not low.transposed and low.experts is None for low in found)


def apply_to_rows(
    slices: Iterable[tuple[int, Tensor]],  # the first row of each, and rows of the weight in float32, written over
    changes: Sequence[Change],  # that are row-wise
    merged: Tensor,  # (out, in), filled with the sum, rounded to its dtype
) -> Tensor:  # the same
    """What `apply_changes` does, for a few rows at a time, which stay in the cache meanwhile.

    Raises:
        HalfbyteError: an adapter's tensor is broken.
    """
    factors = []
    for change in changes:
        low_rank, read = change.low_rank, change.adapter.read
        assert low_rank is not None
        magnitude = None if low_rank.magnitude is None else read(low_rank.magnitude).flatten()
        factors.append((read(low_rank.a), read(low_rank.b), low_rank.scale, magnitude))
    for begin, rows in slices:
        end = begin + len(rows)
        for a, b, scale, magnitude in factors:
            rows.addmm_(b[begin:end], a, alpha=scale)
            if magnitude is not None:
                rows *= (magnitude[begin:end] / rows.norm(dim=1))[:, None]
        merged[begin:end] = rows
    return merged


def apply_changes(
    weight: Tensor,  # float32, the model's own shape; written over
    changes: Sequence[Change],
    combination: str = "linear",
    density: float = 0.5,
) -> Tensor:  # float32, the same shape
    """The parameter with all of the adapters' changes in it.

    Raises:
        HalfbyteError: an adapter's tensor is broken, or what comes out is not finite.
    """
    low_rank = [change for change in changes if change.low_rank is not None]
    if len(low_rank) > 1 and combination != "linear":
        combine = COMBINATIONS[combination]
        assert combine is not None
        scales = torch.tensor([change.low_rank.scale for change in low_rank if change.low_rank])
        weight += combine([change.delta(weight) for change in low_rank], scales, density)
    else:
        for change in low_rank:
            change.add_to(weight)
    for change in changes:
        if change.low_rank is not None and change.low_rank.magnitude is not None:
            rows = weight.T if change.low_rank.transposed else weight
            rows *= (change.adapter.read(change.low_rank.magnitude).flatten() / rows.norm(dim=1))[:, None]
        if change.bias is not None:
            weight.add_(change.adapter.read(change.bias[0]), alpha=change.bias[1])
        if change.saved is not None:
            weight = change.adapter.read(change.saved)
        if change.tokens is not None:
            weight[change.tokens.rows] = change.adapter.read(change.tokens.values)
    return weight


def _wrap(model: PreTrainedModel, where: str, adapter: AdapterFile) -> PeftModel:
    config: LoraConfig = copy.deepcopy(adapter.config)
    config.init_lora_weights = False  # numbers that nobody will read
    config.inference_mode = False
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # advice to whoever would train on it
            return add_lora(copy.deepcopy(model), config)
    except (HalfbyteError, RuntimeError, ValueError, TypeError, KeyError, NotImplementedError) as error:
        raise HalfbyteError(
            f"{adapter.directory}: the adapter does not fit {where}, {_base_of(adapter)}: {reason(error)}."
        ) from error


def _check_fits(where: str, adapter: AdapterFile, expected: dict[str, tuple[int, ...]]) -> None:
    refusal = f"{adapter.directory}: the adapter does not fit {where}, {_base_of(adapter)}"
    found = adapter.shapes
    # Embeddings are saved beside LoRA's tensors by some, trained or not.
    extra = sorted(name for name in found.keys() - expected.keys() if not name.endswith((".weight", ".bias")))
    extra += sorted(name for name in found.keys() - expected.keys() if "lora_" in name)
    missing = sorted(expected.keys() - found.keys())
    if missing and extra:
        raise HalfbyteError(f"{refusal}: it has {extra[0]} and not {missing[0]}.")
    if missing:
        raise HalfbyteError(
            f"{adapter.file} lacks {len(missing)} of the adapter's tensors, among them {missing[0]}; copy it again, or"
            f" take the base it is for."
        )
    if extra:
        raise HalfbyteError(f"{refusal}: the model has no place for {extra[0]}.")
    for name, shape in sorted(expected.items()):
        if found[name] != shape:
            raise HalfbyteError(f"{refusal}: {name} is {found[name]} where the model asks for {shape}.")


def _base_of(adapter: AdapterFile) -> str:
    name = adapter.config.base_model_name_or_path
    return f"and was trained on {name}" if name else "and does not say what it was trained on"


def _low_rank_changes(adapter: AdapterFile, name: str, layer: LoraLayer, weight: float) -> dict[str, Change]:
    if "default" not in layer.scaling:
        return {}
    scale = weight * float(layer.scaling["default"])
    base, key = layer.get_base_layer(), _PREFIX + name
    if isinstance(layer, ParamWrapper):
        parameter = f"{name.replace('.base_layer', '')}.{layer.parameter_name}"  # wrappers of one module are nested
        stacked = layer.get_param().ndim == 3
        transposed = stacked and getattr(base, "is_transposed", False)
        factors = f"{key}.lora_A.weight", f"{key}.lora_B.weight"
        experts = layer.num_experts if stacked else None
        return {parameter: Change(adapter, LowRank(*factors, scale, transposed, experts=experts))}
    is_embedding = "default" in layer.lora_embedding_A
    variant = layer.lora_variant.get("default")
    magnitude = None
    if variant is not None:
        magnitude = next((n for n in adapter.shapes if n.startswith(f"{key}.lora_magnitude_vector")), None)
        norm = layer.lora_magnitude_vector["default"] if magnitude is not None else None
        if type(norm) is not DoraLinearLayer or weight != 1:
            raise HalfbyteError(
                f"{adapter.directory}: {name} is of a kind of LoRA that cannot be merged, or not with a weight."
            )
    if is_embedding:
        low_rank = LowRank(f"{key}.lora_embedding_A", f"{key}.lora_embedding_B", scale, True)
    else:
        low_rank = LowRank(f"{key}.lora_A.weight", f"{key}.lora_B.weight", scale, isinstance(base, Conv1D), magnitude)
    changes = {f"{name}.weight": Change(adapter, low_rank)}
    if layer.lora_bias.get("default"):
        changes[f"{name}.bias"] = Change(adapter, bias=(f"{key}.lora_B.bias", scale))
    return changes
