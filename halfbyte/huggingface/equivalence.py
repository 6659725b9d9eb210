"""Does a replacement compute what it replaces?  Asked of every module class before it is replaced.

The judge is the original itself, run in float32: a replacement is accepted if its output and its gradient to the
input, in the model's dtype, are no further from that than the original's own are.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Function = Callable[[Tensor], Tensor]

# A share of the original's distance from float32 that a replacement may have more, since two correct roundings differ;
# and a distance, in units of the result, that float32 arithmetic in another order comes to.
SLACK = 0.1
FLOOR = 1e-5


def agrees(original: Function, in_float32: Function, replacement: Function, x: Tensor) -> bool:
    """Whether `replacement` may stand for `original` on inputs like `x`, in output and gradient.

    Args:
        in_float32: the original with its weights in float32.
        x: an input in the model's dtype.
    """
    y, grad = _run(original, x)
    exact_y, exact_grad = _run(in_float32, x.float())
    our_y, our_grad = _run(replacement, x)
    return is_no_worse(our_y, y, exact_y) and is_no_worse(our_grad, grad, exact_grad)


def is_no_worse(ours: Tensor, theirs: Tensor, exact: Tensor) -> bool:
    """Same shape and dtype, and no further from `exact` (float32) than `theirs`, in the mean of squares."""
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return False
    size = exact.float().norm()
    distance, allowed = (ours.float() - exact).norm(), (theirs.float() - exact).norm()
    return bool(distance <= allowed * (1 + SLACK) + size * FLOOR)  # false for NaN


def random_values(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Normal values from a generator of their own: checking must not move the run's random numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _run(function: Function, x: Tensor) -> tuple[Tensor, Tensor]:
    """The output, and the gradient of its sum weighted at random."""
    x = x.detach().clone().requires_grad_()
    with torch.enable_grad():
        y = function(x)
    (grad,) = torch.autograd.grad(y, x, random_values(*y.shape, dtype=y.dtype, seed=1))
    return y.detach(), grad
