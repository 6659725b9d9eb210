"""A mixture's experts: which of transformers' classes are put in 4 bits, and as what.

Since version 5 transformers keeps the experts of a layer as two tensors of three dimensions, which no replacement of
linear layers finds: they would silently stay in 16 bits, and they are nine tenths of such a model. Its classes of
experts carry a decorator, `use_experts_implementation`, that says how they are laid out. One that says so, and computes
on small random weights what `halfbyte.nn.Experts4bit` does, is replaced. Any other tensor of that kind is named.
"""

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from halfbyte.huggingface.equivalence import is_no_worse, random_values
from halfbyte.nn import Experts4bit
from halfbyte.quant import quantize_4bit

# A stand-in's: experts, hidden, intermediate, tokens, chosen by each.
_EXPERTS, _HIDDEN, _BETWEEN, _TOKENS, _CHOSEN = 3, 64, 32, 7, 2
_DECLARED = ("has_gate", "has_bias", "has_post_expert_norm", "is_transposed")
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def weights_of_experts(module: Any) -> dict[str, tuple[int, int, int]]:
    """The shapes of the two weights, in the order of their products; empty for what is not known as experts."""
    if not all(hasattr(module, name) for name in _DECLARED) or not hasattr(type(module).forward, "__wrapped__"):
        return {}
    names = ("gate_up_proj" if module.has_gate else "up_proj", "down_proj")
    allowed = {*names, *(f"{name}_bias" for name in names if module.has_bias)}
    if module.has_post_expert_norm or {name for name, _ in module.named_parameters()} != allowed:
        return {}
    shapes = {name: tuple(getattr(module, name).shape) for name in names}
    return shapes if all(len(shape) == 3 for shape in shapes.values()) else {}


def replace_experts(module: Any, **storage: Any) -> Experts4bit:
    """An empty module in the place of one that `weights_of_experts` knows, with all else that it holds.

    Args:
        storage: `quant_type`, `block_size`, `double_quant`, `compute_dtype`, `device`.
    """
    kind: Any = type(module)
    shapes = weights_of_experts(module)
    activate = kind._apply_gate if module.has_gate else _activate
    experts = Experts4bit(shapes, activate, is_transposed=module.is_transposed, **storage)
    for name, parameter in module.named_parameters(recurse=False):
        if name not in shapes:
            experts.register_parameter(name, nn.Parameter(parameter.detach(), requires_grad=False))
    experts._modules.update(module._modules)
    own = vars(experts)
    own.update({name: value for name, value in vars(module).items() if name not in own})
    return experts


def _activate(module: Any, x: Tensor) -> Tensor:
    y: Tensor = module.act_fn(x)
    return y


def computes_the_same(module: nn.Module) -> bool:
    """Whether a replacement gives what the class does, on small random weights of its layout, in float32."""
    kind: Any = type(module)
    try:
        with torch.device("cpu"), torch.no_grad():  # transformers loads in a context of the meta device
            twin = _small_twin(module)
            ours = replace_experts(twin, compute_dtype=torch.float32)
            for name in weights_of_experts(twin):
                ours.set_quantized(name, quantize_4bit(getattr(twin, name)))
                getattr(twin, name).data = ours.get_quantized(name).dequantize(torch.float32)
            x = random_values(_TOKENS, _HIDDEN, seed=1)
            index = torch.stack([torch.arange(_TOKENS) + i for i in range(_CHOSEN)], 1) % _EXPERTS
            weights = random_values(_TOKENS, _CHOSEN, seed=2).softmax(1)
            # What stands under the decorator: the class's own loop over experts.
            theirs = kind.forward.__wrapped__(twin, x, index, weights)
            return is_no_worse(ours(x, index, weights), theirs, theirs)
    except Exception:  # whatever a stranger's forward raises on weights that are not its own
        return False


def _small_twin(module: Any) -> nn.Module:
    """The same class with the same settings, and few numbers."""
    twin = object.__new__(type(module))
    twin.__dict__.update(vars(module))
    up, down = (_EXPERTS, _BETWEEN * (2 if module.has_gate else 1), _HIDDEN), (_EXPERTS, _HIDDEN, _BETWEEN)
    names = weights_of_experts(module)
    shapes = dict(zip(names, (up, down), strict=True))
    values: dict[str, nn.Parameter | None] = {}
    for seed, (name, (count, rows, columns)) in enumerate(shapes.items()):
        shape = (count, columns, rows) if module.is_transposed else (count, rows, columns)
        values[name] = nn.Parameter(0.2 * random_values(*shape, seed=seed), requires_grad=False)
        if module.has_bias:
            values[f"{name}_bias"] = nn.Parameter(random_values(count, rows, seed=seed + 8), requires_grad=False)
    twin._parameters = values
    twin.num_experts = _EXPERTS
    result: nn.Module = twin
    return result


def warn_of_wide_experts(model: nn.Module) -> None:
    """Say which tensors of three dimensions, as experts have, stay in 16 bits."""
    wide = {
        f"{name}.{own}" if name else own: parameter
        for name, module in model.named_modules()
        if not isinstance(module, _CONVOLUTIONS)
        for own, parameter in module.named_parameters(recurse=False)
        if parameter.ndim == 3 and parameter.is_floating_point() and min(parameter.shape) > 1
    }
    if wide:
        nbytes = sum(parameter.nbytes for parameter in wide.values())
        bits = 8 * max(parameter.element_size() for parameter in wide.values())
        warnings.warn(
            f"{len(wide)} tensors of three dimensions, as experts are, have a form that is not known and stay in"
            f" {bits} bits, {nbytes:,} bytes: {', '.join(list(wide)[:4])}{', …' if len(wide) > 4 else ''}.",
            stacklevel=2,
        )
