"""halfbyte's attention at transformers' own seam: `attn_implementation="halfbyte"`.

A layer's call runs on the compiled kernels where they cover it, and otherwise on transformers' `sdpa` or the model's
own eager function. Which and why is decided a call at a time and counted: `attention_calls()`.
"""

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from halfbyte.huggingface.attention_mask import halfbyte_mask
from halfbyte.nn.attention import attention
from halfbyte.ops._checks import FLOAT_DTYPES
from halfbyte.ops.attention._checks import MAX_HEAD_DIM

NAME = "halfbyte"

_calls: Counter[str] = Counter()


def attention_calls() -> dict[str, int]:
    """Calls so far by where they ran and why: `halfbyte`, `sdpa: dropout`, `eager: attention sinks` ..."""
    return dict(_calls)


def reset_attention_calls() -> None:
    _calls.clear()


@contextmanager
def uncounted() -> Iterator[None]:
    """Calls within are trials, not work."""
    before = dict(_calls)
    try:
        yield
    finally:
        _calls.clear()
        _calls.update(before)


def halfbyte_attention(
    module: nn.Module,
    query: Tensor,  # (batch, heads, queries, head_dim)
    key: Tensor,  # (batch, kv_heads, keys, head_dim)
    value: Tensor,
    attention_mask: Tensor | None,  # from halfbyte_mask, or any 4-D mask
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:  # (batch, queries, heads, head_dim); the weights, where eager was needed for them
    """What a layer calls. A window is in the mask already, so `sliding_window` is not read (as in `sdpa`)."""
    for_eager, for_sdpa = _needs(module, query, key, value, attention_mask, dropout, kwargs)
    if not for_eager and not for_sdpa:
        _calls[NAME] += 1
        out = attention(query, key, value, attention_mask, scaling, softcap=softcap or 0.0)
        return out.transpose(1, 2), None
    common = {"dropout": dropout, "scaling": scaling, **kwargs}
    if for_eager or softcap is not None:  # which sdpa refuses
        _calls[f"eager: {for_eager or for_sdpa}"] += 1
        eager = eager_of(module)
        mask = _additive_mask(query, key, attention_mask, _is_causal(module, kwargs))
        if softcap is not None:
            common["softcap"] = softcap
        attended: tuple[Tensor, Tensor | None] = eager(module, query, key, value, mask, **common)
        return attended
    _calls[f"sdpa: {for_sdpa}"] += 1
    mask = _bool_mask(query, key, attention_mask, _is_causal(module, kwargs))
    result: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, mask, **common)
    return result


def _needs(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float,
    kwargs: dict[str, Any],
) -> tuple[str, str]:
    """Why the call must run on the model's eager function, and why on sdpa; empty where it need not."""
    if kwargs.get("s_aux") is not None:
        return "attention sinks", ""
    if kwargs.get("output_attentions"):
        return "output_attentions", ""
    reasons = {
        f"on {query.device.type}": not query.is_cpu,
        f"in {query.dtype}": query.dtype not in FLOAT_DTYPES or {key.dtype, value.dtype} != {query.dtype},
        "dropout": dropout > 0,
        "not causal": not _is_causal(module, kwargs),
        "position bias": kwargs.get("position_bias") is not None,
        "paged cache": kwargs.get("cache") is not None,
        "a mask of another form": attention_mask is not None and attention_mask.ndim != 2,
        "values of another size": key.shape != value.shape,
        f"head_dim above {MAX_HEAD_DIM}": query.shape[-1] > MAX_HEAD_DIM,
        "fewer keys than queries": key.shape[2] < query.shape[2],
        # One query against many keys is a matrix-vector product, and the tiles are made for many.
        "one query": query.shape[2] == 1,
    }
    return "", next((reason for reason, holds in reasons.items() if holds), "")


def _is_causal(module: nn.Module, kwargs: dict[str, Any]) -> bool:
    asked = kwargs.get("is_causal")
    return bool(getattr(module, "is_causal", True) if asked is None else asked)


def _bool_mask(query: Tensor, key: Tensor, mask: Tensor | None, causal: bool) -> Tensor | None:
    """What sdpa and eager read: (batch or 1, 1, queries, keys), a 4-D mask as it is."""
    queries, keys = query.shape[2], key.shape[2]
    if mask is not None and mask.ndim == 4:
        return mask
    if mask is None and (not causal or queries in (1, keys)):
        return None  # sdpa is causal by itself, but by the first key: right for as many keys as queries
    at = torch.arange(keys, device=query.device)
    position = torch.arange(keys - queries, keys, device=query.device)[:, None]
    seen = (at <= position)[None, None]
    return seen if mask is None else seen & (at >= mask[:, None, :, None])


def _additive_mask(query: Tensor, key: Tensor, mask: Tensor | None, causal: bool) -> Tensor | None:
    if mask is None and causal and query.shape[2] > 1:
        mask = torch.zeros(1, query.shape[2], dtype=torch.int32, device=query.device)  # None means no mask at all there
    seen = _bool_mask(query, key, mask, causal)
    if seen is None or seen.dtype != torch.bool:
        return seen
    zero = torch.zeros((), dtype=query.dtype, device=query.device)
    return torch.where(seen, zero, torch.finfo(query.dtype).min)


def eager_of(module: nn.Module) -> Callable[..., Any]:
    """The function that a model falls back to itself: every modeling file of transformers has one under this name."""
    eager: Callable[..., Any] = sys.modules[type(module).__module__].eager_attention_forward
    return eager


def register() -> None:
    """Make `attn_implementation="halfbyte"` known to transformers."""
    AttentionInterface.register(NAME, halfbyte_attention)
    AttentionMaskInterface.register(NAME, halfbyte_mask)
