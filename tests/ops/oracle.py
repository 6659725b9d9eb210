"""What the tests of the ops share: codebooks as tensors, hostile values, the references, the error against float32."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from halfbyte import ops
from halfbyte.formats import CODEBOOKS, DYNAMIC_SIGNED, DYNAMIC_UNSIGNED

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIZES = (0, 1, 2, 31, 32, 33, 63, 64, 65, 127, 1000, 4095, 4096, 4097, 70001)
CODEBOOKS_16 = {name: torch.tensor(entries) for name, entries in CODEBOOKS.items()}
CODEBOOKS_256 = {"signed": torch.tensor(DYNAMIC_SIGNED), "unsigned": torch.tensor(DYNAMIC_UNSIGNED)}


def by_reference(op: Callable[..., Any], *arguments: Any) -> Any:
    with ops.forced_implementation("reference"):
        result = op(*arguments)
        assert ops.executed_implementation() == "reference"
    return result


def bits(tensor: Tensor) -> Tensor:
    """A view as integers: equality of bits tells -0 from 0 and holds for NaN."""
    return tensor.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[tensor.element_size()])


def hostile_values(n: int, codebook: Tensor, seed: int = 0) -> Tensor:
    """`n` float32 values around every decision of a nearest-entry search: midpoints, their neighbours, zeros of either
    sign, denormals; scaled by powers of two (which keeps midpoints exact) and with runs of zeros and of tiny values."""
    generator = torch.Generator().manual_seed(seed)
    ascending = codebook.sort().values
    midpoints = (ascending[:-1] + ascending[1:]) / 2
    up, down = torch.tensor(torch.inf), torch.tensor(-torch.inf)
    special = torch.cat(
        [
            midpoints,
            midpoints.nextafter(up),
            midpoints.nextafter(down),
            ascending,
            torch.tensor([0.0, -0.0, 1e-45, -1e-45, 1e-40, -1.0, 1.0]),
            torch.randn(64, generator=generator).clamp(-1, 1),
        ]
    )
    values = special[torch.randint(len(special), (n,), generator=generator)]
    scale = torch.exp2(torch.randint(-20, 20, (n // 256 + 1,), generator=generator).float())
    scale[torch.rand(len(scale), generator=generator) < 0.1] = 0.0
    scale[torch.rand(len(scale), generator=generator) < 0.1] = 2.0**-130
    return values * scale.repeat_interleave(256)[:n]


def error(got: Tensor, exact: Tensor) -> float:
    """Root mean square distance from the float32 result, relative to that result."""
    difference = (got.double() - exact.double()).square().mean().sqrt()
    return float(difference / exact.double().square().mean().sqrt().clamp(min=1e-30))


def assert_no_worse(got: Any, reference: Any, exact: Any, slack: float = 0.02, floor: float = 1e-6) -> None:
    """`got` is no further from the float32 result than `reference` in the same dtype is.

    `slack` is a share of the reference's own distance: two correct roundings of nearly equal numbers differ by so much
    in the mean. `floor`, in units of the result, is what float32 arithmetic in another order comes to.
    """
    for ours, theirs, oracle in zip(_tensors(got), _tensors(reference), _tensors(exact), strict=True):
        assert ours.shape == theirs.shape
        assert ours.dtype == theirs.dtype
        assert ours.isfinite().all()
        if ours.numel():
            assert error(ours, oracle) <= error(theirs, oracle) * (1 + slack) + floor


def _tensors(result: Any) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)
