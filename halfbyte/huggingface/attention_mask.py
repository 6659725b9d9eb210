"""From transformers' masks to the first key that each query sees.

transformers says a mask as a function of (batch, head, query, key) indices, put together from a few known parts, and a
(batch, positions) padding mask. Of the known parts the first key follows in time proportional to the length. Any other
function is evaluated, a block of queries at a time, and taken only if what it shows is exactly the keys from a first
one to the query's own; so a part that transformers renames costs time and not correctness.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import causal_mask_function, sdpa_mask

MaskFunction = Callable[..., Tensor]
_QUERIES_A_BLOCK = 256


def halfbyte_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: MaskFunction = causal_mask_function,
    attention_mask: Tensor | None = None,  # (batch, positions) bool, True where there is a token
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Tensor | None:
    """None for plain causal attention; (batch, queries) int32, the first key each query sees; or, for any other
    pattern and on any other device, transformers' own (batch, 1, queries, keys) bool."""
    first_query = int(q_offset) - kv_offset  # where it stands among the keys at hand
    if first_query + q_length == kv_length and torch.device(device).type == "cpu":
        positions = torch.arange(first_query, kv_length)
        at_hand = None if attention_mask is None else attention_mask[:, kv_offset : kv_offset + kv_length]
        starts = _of_known_parts(mask_function, at_hand, positions)
        if starts is None:
            starts = _of_evaluation(
                mask_function, at_hand, positions, batch_size, kv_offset, bool(kwargs.get("use_vmap"))
            )
        if starts is not None:
            return starts.expand(batch_size, -1).int().contiguous() if starts.any() else None
    mask: Tensor = sdpa_mask(
        batch_size,
        q_length,
        kv_length,
        q_offset,
        kv_offset,
        mask_function,
        attention_mask,
        device=device,
        **{**kwargs, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False},
    )
    return mask


@dataclass(frozen=True)
class _Parts:
    window: int | None = None
    sequences: Tensor | None = None  # (batch, positions): which of the packed sequences a position belongs to


def _of_known_parts(function: MaskFunction, attention_mask: Tensor | None, positions: Tensor) -> Tensor | None:
    parts = _known_parts(function)
    starts = None if parts is None else _of_padding(attention_mask, positions)
    if parts is None or starts is None:
        return None
    if parts.window is not None:
        starts = torch.maximum(starts, positions - parts.window + 1)
    if parts.sequences is not None:
        begins = torch.diff(parts.sequences, prepend=parts.sequences[:, :1]) != 0
        starts = torch.maximum(starts, (begins * positions).cummax(-1).values)
    return starts


def _known_parts(function: MaskFunction) -> _Parts | None:
    if function is causal_mask_function:
        return _Parts()
    both = _closure(function, "and_masks").get("mask_functions", ())
    if len(both) != 2:
        return None
    window = _closure(both[0], "sliding_window_overlay").get("sliding_window")
    if window is not None:
        return _Parts(window=window) if both[1] is causal_mask_function else None
    sequences = _closure(both[0], "packed_sequence_mask_function").get("packed_sequence_mask")
    # Within a sequence the positions it counts in rise by one, so that causal and window are the same in ours.
    inner = _closure(both[1], "remap_positions_for_packed_sequence").get("mask_function")
    within = None if sequences is None or inner is None else _known_parts(inner)
    return None if within is None else _Parts(within.window, sequences)


def _closure(function: MaskFunction, maker: str) -> dict[str, Any]:
    """What transformers' `maker` closed over when it made `function`; nothing if another made it."""
    made_by = getattr(function, "__qualname__", "").partition(".")[0]
    if made_by != maker or getattr(function, "__module__", None) != causal_mask_function.__module__:
        return {}
    return dict(inspect.getclosurevars(function).nonlocals)


def _of_padding(attention_mask: Tensor | None, positions: Tensor) -> Tensor | None:
    """First keys where tokens are one run a row; a query that is padding sees itself. None for gaps between tokens."""
    if attention_mask is None:
        return torch.zeros(1, len(positions), dtype=torch.int64)
    if attention_mask.shape[1] <= int(positions[-1]):
        return None
    token = attention_mask.to(torch.uint8)
    if bool(token.all()):
        return torch.zeros(1, len(positions), dtype=torch.int64)
    if bool((torch.diff(token.to(torch.int8), prepend=token.new_zeros(len(token), 1)) == 1).sum(1).gt(1).any()):
        return None
    first = token.argmax(1, keepdim=True)
    return torch.where(attention_mask[:, positions], first, positions)


def _of_evaluation(
    function: MaskFunction,
    attention_mask: Tensor | None,
    positions: Tensor,
    batch_size: int,
    kv_offset: int,
    index_by_vmap: bool,
) -> Tensor | None:
    keys = int(positions[-1]) + 1
    if index_by_vmap or (attention_mask is not None and attention_mask.shape[1] < keys):
        return None  # a function written for single indices
    key = torch.arange(keys)
    batch, head = torch.arange(batch_size)[:, None, None, None], torch.zeros(1, 1, 1, 1, dtype=torch.int64)
    starts = torch.empty(batch_size, len(positions), dtype=torch.int64)
    for begin in range(0, len(positions), _QUERIES_A_BLOCK):
        query = positions[begin : begin + _QUERIES_A_BLOCK]
        seen = function(batch, head, query[:, None] + kv_offset, key + kv_offset)
        seen = seen.expand(batch_size, 1, len(query), keys)[:, 0]
        if attention_mask is not None:
            seen = seen & attention_mask[:, None, :keys]
        seen = seen | ((key == query[:, None]) & ~seen.any(-1, keepdim=True))  # padding sees itself
        first = seen.to(torch.uint8).argmax(-1)
        if not torch.equal(seen, (key >= first[..., None]) & (key <= query[:, None])):
            return None
        starts[:, begin : begin + _QUERIES_A_BLOCK] = first
    return starts
