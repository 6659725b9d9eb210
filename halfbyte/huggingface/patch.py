"""halfbyte's operations in place of a transformers model's own: norms, gated MLPs, rotary embedding, the loss.

Nothing is recognized by the name of its class. A module with a vector for a weight is run on random inputs, and is an
RMSNorm if it computes what one does; so for the other kinds. Each distinct class and shape is then compared with its
replacement in the model's dtype (equivalence.py), and is left as it was where they differ or anything goes wrong: an
architecture that nobody has heard of loads and runs as transformers wrote it.

transformers' own seam for kernels (`use_kernel_forward_from_hub`) needs the `kernels` package, covers neither MLPs nor
the Gemma norms, and does nothing without it. So a `forward` is put on the instance, where PEFT, hooks and gradient
checkpointing find it as they would the class's. The rotary embedding is a function that attention looks up in its
modelling module: it is exchanged there for one that hands anything unusual to the original.
"""

import copy
import inspect
import itertools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import MethodType, ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from halfbyte import ops
from halfbyte.huggingface.attention import NAME as ATTENTION
from halfbyte.huggingface.equivalence import agrees, is_no_worse, random_values
from halfbyte.huggingface.install_attention import use_attention
from halfbyte.nn import gated, gated_halves, layer_norm, logit_transform, rms_norm, rotate_queries_and_keys

_RECORD = "halfbyte_replacements"
_ROTARY = "apply_rotary_pos_emb"
_EPSILON_NAMES = ("variance_epsilon", "eps", "epsilon", "layer_norm_epsilon")

Forward = Callable[..., Any]


@dataclass(frozen=True)
class Replacement:
    """What became of one class, or function, of a model."""

    name: str  # what it computes: rms_norm, layer_norm, gated_mlp, rotary, loss
    target: str  # the class or function of the model's
    count: int  # instances
    status: str  # "replaced" or "kept"
    reason: str  # how it was found to be equal, or why it was kept


def accelerate_model(model: PreTrainedModel) -> list[Replacement]:
    """Replace what halfbyte computes faster and no less exactly; what was done, and what was not and why.

    Before or after an adapter is put on the model. Doing it twice changes nothing. Never raises because of the model.
    """
    replacements = [*_replace_modules(model), *_replace_rotary(model), _replace_attention(model), _examine_loss(model)]
    setattr(model, _RECORD, replacements)
    return replacements


def replacements_of(model: nn.Module) -> list[Replacement]:
    """What `accelerate_model` did to the model, under whatever now wraps it; empty if it was not asked."""
    return list(getattr(model, _RECORD, []))


def describe_replacements(replacements: list[Replacement]) -> str:
    """One line for a person."""
    parts = []
    for status in ("replaced", "kept"):
        found = [f"{r.name} ({r.target} ×{r.count})" for r in replacements if r.status == status]
        if found:
            parts.append(f"{status}: {', '.join(found)}")
    return "; ".join(parts) or "nothing replaced"


def _replace_attention(model: Any) -> Replacement:
    before = model.config._attn_implementation
    words = use_attention(model)
    status = "replaced" if model.config._attn_implementation == ATTENTION else "kept"
    return Replacement("attention", before, model.config.get_text_config().num_hidden_layers, status, words)


# ── Modules ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class _Found:
    """A module that computes something we know, and the forward that would compute it."""

    name: str
    forward: Forward


def _replace_modules(model: nn.Module) -> Iterator[Replacement]:
    groups: dict[Any, list[nn.Module]] = {}
    for module in model.modules():
        for kind, find in ((_norm_signature, _find_norm), (_mlp_signature, _find_mlp)):
            signature = kind(module)
            if signature is not None:
                groups.setdefault((type(module), find, signature), []).append(module)
                break
    for (kind, find, _), modules in groups.items():
        yield _replace_group(kind, find, modules)


def _replace_group(kind: type, find: Callable[[nn.Module], _Found | str], modules: list[nn.Module]) -> Replacement:
    """Modules of one class and shape stand and fall together; the first of them speaks for all."""
    first = modules[0]
    if "forward" in vars(first):
        known = getattr(first.forward, "halfbyte_name", None)
        if known is not None:
            return Replacement(known, kind.__name__, len(modules), "replaced", "as before")
        return Replacement("unknown", kind.__name__, len(modules), "kept", "something else has replaced it")
    if any(parameter.device.type != "cpu" for parameter in first.parameters()):
        return Replacement("unknown", kind.__name__, len(modules), "kept", "the kernels are for the CPU")
    try:
        with torch.no_grad():
            found = find(first)
    except Exception as error:  # whatever a stranger's forward raises on inputs that are not its own
        found = f"it could not be examined: {type(error).__name__}: {error}"
    if isinstance(found, str):
        return Replacement("unknown", kind.__name__, len(modules), "kept", found)
    for module in modules:
        module.forward = MethodType(found.forward, module)
    return Replacement(found.name, kind.__name__, len(modules), "replaced", "equal on random inputs")


def _named(name: str, forward: Forward) -> _Found:
    forward.halfbyte_name = name  # type: ignore[attr-defined]
    return _Found(name, forward)


def _takes_one(module: nn.Module) -> bool:
    """Whether one argument is enough for its forward."""
    _, *parameters = inspect.signature(type(module).forward).parameters.values()
    positional = [p for p in parameters if p.kind is not p.VAR_KEYWORD and p.default is p.empty]
    return len(positional) == 1


def _is_plain(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """One tensor on the CPU in a dtype that the kernels have, and nothing else."""
    return len(args) == 1 and not kwargs and args[0].device.type == "cpu" and args[0].dtype in ops.FLOAT_DTYPES


# ── Norms ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _norm_signature(module: nn.Module) -> Any:
    """Shape and dtype of what may be a norm: no children, a vector as weight, perhaps one as bias, an epsilon."""
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    if next(module.children(), None) is not None or _epsilon_name(module) is None or not _takes_one(module):
        return None
    if not isinstance(weight, nn.Parameter) or weight.ndim != 1 or not weight.is_floating_point():
        return None
    if bias is not None and (not isinstance(bias, Tensor) or bias.shape != weight.shape or bias.dtype != weight.dtype):
        return None
    return weight.shape, weight.dtype, bias is None, getattr(module, _epsilon_name(module) or "")


def _epsilon_name(module: nn.Module) -> str | None:
    return next((name for name in _EPSILON_NAMES if isinstance(getattr(module, name, None), float)), None)


def _find_norm(module: Any) -> _Found | str:
    original = type(module).forward
    wide = copy.deepcopy(module).float()
    # Weights that tell an offset, and rows of such sizes that the epsilon tells too.
    for seed, parameter in enumerate(wide.parameters()):
        parameter.copy_(1 + 0.5 * random_values(*parameter.shape, seed=seed + 2))
    columns = wide.weight.numel()
    x = random_values(4, 3, columns) * torch.tensor([1e-4, 1e-2, 1.0, 100.0]).view(4, 1, 1)
    expected = original(wide, x)
    candidates = _norm_forwards(original, str(_epsilon_name(module)))
    fitting = (c for c in candidates if torch.allclose(c.forward(wide, x), expected, rtol=1e-4, atol=1e-5))
    found = next(fitting, None)
    if found is None:
        return "a norm of a kind of its own"
    forward = found.forward
    exact = copy.deepcopy(module).float()
    values = random_values(2, 5, columns, dtype=module.weight.dtype)
    same = agrees(lambda v: original(module, v), lambda v: original(exact, v), lambda v: forward(module, v), values)
    return found if same else f"{found.name} would be further from float32 than it is"


def _norm_forwards(original: Forward, eps_name: str) -> Iterator[_Found]:
    def rms_forward(offset: float) -> Forward:
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            if _is_plain(args, kwargs) and args[0].dtype == self.weight.dtype:
                return rms_norm(args[0], self.weight, getattr(self, eps_name), offset)
            return original(self, *args, **kwargs)

        return forward

    def layer_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if _is_plain(args, kwargs) and args[0].dtype == self.weight.dtype:
            return layer_norm(args[0], self.weight, getattr(self, "bias", None), getattr(self, eps_name))
        return original(self, *args, **kwargs)

    yield _named("rms_norm", rms_forward(0.0))
    yield _named("rms_norm", rms_forward(1.0))
    yield _named("layer_norm", layer_forward)


# ── Gated MLPs ───────────────────────────────────────────────────────────────────────────────────────────────────────


class _StandIn(nn.Module):
    """A projection of a layer's shape and next to no memory: of rank eight."""

    def __init__(self, in_features: int, out_features: int, dtype: torch.dtype, seed: int) -> None:
        super().__init__()
        self.first = random_values(8, in_features, dtype=dtype, seed=seed) / in_features**0.5
        self.second = random_values(out_features, 8, dtype=dtype, seed=seed + 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.first.to(x.dtype)), self.second.to(x.dtype))


def _projections(module: nn.Module) -> dict[str, tuple[int, int]]:
    """The children that are linear layers or wrappers of such, and their sizes."""
    children = {}
    for name, child in module.named_children():
        sizes = getattr(child, "in_features", None), getattr(child, "out_features", None)
        if all(isinstance(size, int) for size in sizes):
            children[name] = sizes
    return children  # type: ignore[return-value]


def _mlp_signature(module: nn.Module) -> Any:
    """Sizes and dtype of what may be a gated MLP: three projections, or two of which one is twice as wide."""
    sizes = _projections(module)
    if len(sizes) not in (2, 3) or not any(_roles(sizes)) or not _takes_one(module):
        return None
    return tuple(sizes.items()), _compute_dtype(module)


def _roles(sizes: dict[str, tuple[int, int]]) -> Iterator[tuple[str, ...]]:
    """(gate, up, down), or (gate and up in one, down), in every way that the sizes allow."""
    for names in itertools.permutations(sizes):
        *inner, down = (sizes[name] for name in names)
        width = inner[0][1] if len(inner) == 2 else inner[0][1] // 2
        if all(projection == inner[0] for projection in inner) and down == (width, inner[0][0]):
            yield names


def _compute_dtype(module: nn.Module) -> torch.dtype:
    """What a module's products are computed in: a 4-bit layer says it, another's weight is it."""
    for child in module.modules():
        declared = getattr(child, "compute_dtype", None)
        if isinstance(declared, torch.dtype):
            return declared
        weight = getattr(child, "weight", None)
        if isinstance(weight, Tensor) and weight.is_floating_point():
            return weight.dtype
    return torch.float32


def _find_mlp(module: nn.Module) -> _Found | str:
    original, sizes, dtype = type(module).forward, _projections(module), _compute_dtype(module)
    skeleton = _with_stand_ins(module, sizes, torch.float32)
    in_features = sizes[next(_roles(sizes))[0]][0]
    x = random_values(3, 5, in_features)
    expected = original(skeleton, x)
    for names, activation in itertools.product(_roles(sizes), ops.ACTIVATIONS):
        forward = _mlp_forward(original, names, activation)
        if torch.allclose(forward(skeleton, x), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max())):
            break
    else:
        return "not activation(gate) · up between projections, or of an activation without a kernel"
    narrow = _with_stand_ins(module, sizes, dtype)
    exact = _with_stand_ins(
        module, sizes, dtype
    )  # its factors are widened as they are used: they equal the narrow ones
    same = agrees(
        lambda v: original(narrow, v), lambda v: original(exact, v), lambda v: forward(narrow, v), x.to(dtype)
    )
    return _named("gated_mlp", forward) if same else "a gated MLP would be further from float32 than it is"


def _with_stand_ins(module: nn.Module, sizes: dict[str, tuple[int, int]], dtype: torch.dtype) -> nn.Module:
    """The module with its own everything but the projections: none of the model's weights is used or copied."""
    skeleton = copy.copy(module)
    stand_ins = {name: _StandIn(*size, dtype, 10 * i) for i, (name, size) in enumerate(sizes.items())}
    skeleton._modules = {**module._modules, **stand_ins}
    return skeleton


def _mlp_forward(original: Forward, names: tuple[str, ...], activation: str) -> Forward:
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not _is_plain(args, kwargs):
            return original(self, *args, **kwargs)
        *inner, down = (getattr(self, name) for name in names)  # now, for an adapter may have wrapped them since
        outputs = [projection(args[0]) for projection in inner]
        if len(outputs) == 1:
            return down(gated_halves(outputs[0], activation))
        return down(gated(outputs[0], outputs[1], activation))

    return forward


# ── Rotary embedding ─────────────────────────────────────────────────────────────────────────────────────────────────


def _replace_rotary(model: PreTrainedModel) -> Iterator[Replacement]:
    names = dict.fromkeys(type(module).__module__ for module in model.modules())
    for modelling in (sys.modules[name] for name in names if name in sys.modules):
        original = getattr(modelling, _ROTARY, None)
        if original is not None:
            target = f"{modelling.__name__.rpartition('.')[2]}.{_ROTARY}"
            status, reason = _replace_rotary_in(modelling, original, model)
            yield Replacement("rotary", target, 1, status, reason)


def _replace_rotary_in(modelling: ModuleType, original: Forward, model: PreTrainedModel) -> tuple[str, str]:
    if hasattr(original, "halfbyte_name"):
        return "replaced", "as before"
    if model.device.type != "cpu":
        return "kept", "the kernels are for the CPU"
    try:
        if list(inspect.signature(original).parameters)[:4] != ["q", "k", "cos", "sin"]:
            return "kept", "its arguments are not q, k, cos and sin"
        with torch.no_grad():
            whole, part = (_rotary_agrees(original, _compute_dtype(model), share) for share in (1.0, 0.5))
    except Exception as error:  # as above
        return "kept", f"it could not be examined: {type(error).__name__}: {error}"
    if not whole:
        return "kept", "a rotation of a kind of its own"
    setattr(modelling, _ROTARY, _named("rotary", _rotary_function(original, part)).forward)
    return "replaced", "equal on random inputs"


def _rotary_agrees(original: Forward, dtype: torch.dtype, share: float) -> bool:
    """Whether the function rotates this share of a head as ours does; false if it cannot rotate a part."""
    head_dim, length = 64, 5
    angles = random_values(2, length, int(head_dim * share) // 2).repeat(1, 1, 2) * 3
    q, k = (
        random_values(2, 4, length, head_dim, dtype=dtype),
        random_values(2, 2, length, head_dim, dtype=dtype, seed=1),
    )
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    ours = _rotary_function(original, share < 1)
    try:
        for dim in (1, 2):
            heads = (q, k) if dim == 1 else (q.transpose(1, 2), k.transpose(1, 2))
            exact = original(*(t.float() for t in heads), cos.float(), sin.float(), unsqueeze_dim=dim)
            theirs = original(*heads, cos, sin, unsqueeze_dim=dim)
            if not all(map(is_no_worse, ours(*heads, cos, sin, unsqueeze_dim=dim), theirs, exact)):
                return False
    except (RuntimeError, IndexError):
        return False
    return True


def _rotary_function(original: Forward, rotates_part: bool) -> Forward:
    def apply_rotary_pos_emb(*args: Any, **kwargs: Any) -> Any:
        if len(args) == 4 and kwargs.keys() <= {"unsqueeze_dim"}:
            q, k, cos, sin = args
            dim = kwargs.get("unsqueeze_dim", 1)
            if dim == 2:
                q, k = q.transpose(1, 2), k.transpose(1, 2)
            if dim in (1, 2) and _can_rotate(q, k, cos, sin, rotates_part):
                q, k = rotate_queries_and_keys(q, k, cos, sin)
                return (q, k) if dim == 1 else (q.transpose(1, 2), k.transpose(1, 2))
        return original(*args, **kwargs)

    return apply_rotary_pos_emb


def _can_rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, rotates_part: bool) -> bool:
    if q.device.type != "cpu" or q.ndim != 4 or k.ndim != 4 or cos.ndim != 3 or cos.shape != sin.shape:
        return False
    batch, _, length, head_dim = q.shape
    rotary_dim = cos.shape[-1]
    return (
        q.dtype == k.dtype == cos.dtype == sin.dtype
        and q.dtype in ops.FLOAT_DTYPES
        and (k.shape[0], k.shape[2], k.shape[3]) == (batch, length, head_dim)
        and cos.shape[0] in (1, batch)
        and cos.shape[1] == length
        and rotary_dim % 2 == 0
        and (rotary_dim == head_dim or (rotates_part and rotary_dim < head_dim))
        and not cos.requires_grad
    )


# ── The loss ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def _examine_loss(model: PreTrainedModel) -> Replacement:
    """`halfbyte.nn.supervised_loss` decides for itself; this says beforehand what it will do."""
    try:
        output_layer = model.get_output_embeddings()
        transform = None if output_layer is None else logit_transform(model)
    except Exception as error:  # as above
        return Replacement("loss", type(model).__name__, 1, "kept", f"it could not be examined: {error}")
    if transform is None:
        return Replacement("loss", type(output_layer).__name__, 1, "kept", "logits must be computed to know them")
    did = [f"scaled by {transform.scale:g}"] if transform.scale != 1 else []
    did += [f"soft-capped at {transform.softcap:g}"] if transform.softcap else []
    return Replacement(
        "loss", type(output_layer).__name__, 1, "replaced", "logits " + (", ".join(did) or "as they are")
    )
