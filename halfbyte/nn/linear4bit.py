"""A linear layer whose weight is frozen in 4 bits.

    y = x · dequantize(W)ᵀ + b          dx = dy · dequantize(W)

The weight is never trained, so there is no gradient to it and the backward needs no activation at all:
only the codes, which the module holds anyway. QLoRA (arXiv 2305.14314), equation 5.
"""

from typing import Any

import torch
from torch import Tensor, nn

from halfbyte.nn.packed import PackedWeights
from halfbyte.quant import QuantizedTensor, quantize_4bit


class _FrozenProduct(torch.autograd.Function):
    """x · Wᵀ, or x · W when transposed.  Nothing is saved but a reference to the codes.

    The gradient is to x alone, and is the other of the two products, so that it can be differentiated in turn.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, quantized: QuantizedTensor, transpose: bool) -> Tensor:
        ctx.quantized, ctx.transpose = quantized, transpose
        return quantized.matmul(x, transpose)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None]:
        (dy,) = grads
        dx: Tensor | None = None
        if ctx.needs_input_grad[0]:
            dx = _FrozenProduct.apply(dy, ctx.quantized, not ctx.transpose)  # type: ignore[no-untyped-call]
        return dx, None, None


def frozen_linear(
    x: Tensor,  # (..., in), the dtype that the product is computed in; (..., out) when transposed
    quantized: QuantizedTensor,  # (out, in)
    transpose: bool = False,
) -> Tensor:  # (..., out), or (..., in); the dtype of x
    """`x · Wᵀ`, or `x · W` when transposed, with its gradient to `x` and none to the weight."""
    if not torch.is_grad_enabled():  # a token's 210 layers: autograd's bookkeeping would be a part of the time
        return quantized.matmul(x, transpose)
    y: Tensor = _FrozenProduct.apply(x, quantized, transpose)  # type: ignore[no-untyped-call]
    return y


class Linear4bit(PackedWeights, nn.Linear):
    """`nn.Linear` with its weight in 4 bits.  It is one, so that PEFT's `all-linear` finds it.

    `weight` is the packed codes, `((out·in+1)//2, 1)` uint8, not trainable; the constants are buffers beside
    it, and all are written to a state dict under bitsandbytes' keys. `to(dtype)` moves a bias, never codes.
    """

    absmax: Tensor | None
    nested_absmax: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        *,
        quant_type: str = "nf4",
        block_size: int = 64,
        double_quant: bool = True,
        compute_dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
    ) -> None:
        """A layer with room for codes and no constants yet: `quantized` must be set before the first forward."""
        nn.Module.__init__(self)
        self.in_features = in_features
        self.out_features = out_features
        shapes = {"weight": (out_features, in_features)}
        self._make_room(shapes, quant_type, block_size, double_quant, compute_dtype, device)
        self.bias: nn.Parameter | None = None  # type: ignore[assignment]  # as in nn.Linear, which says otherwise
        if bias:
            zeros = torch.zeros(out_features, dtype=compute_dtype, device=device)
            self.bias = nn.Parameter(zeros, requires_grad=False)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        quant_type: str = "nf4",
        block_size: int = 64,
        double_quant: bool = True,
        compute_dtype: torch.dtype = torch.bfloat16,
    ) -> "Linear4bit":
        """Quantize a linear layer's weight `(out, in)`; its bias is kept as it is.

        Raises:
            HalfbyteError: NaN or infinity in the weight, an unknown type, a block size out of range.
        """
        layer = cls(
            linear.in_features,
            linear.out_features,
            quant_type=quant_type,
            block_size=block_size,
            double_quant=double_quant,
            compute_dtype=compute_dtype,
            device="meta",
        )
        layer.quantized = quantize_4bit(linear.weight, quant_type, block_size, double_quant)
        if linear.bias is not None:
            layer.bias = nn.Parameter(linear.bias.detach(), requires_grad=False)
        return layer

    @property
    def quantized(self) -> QuantizedTensor:
        """The weight, `(out, in)`."""
        return self.get_quantized("weight")

    @quantized.setter
    def quantized(self, quantized: QuantizedTensor) -> None:
        self.set_quantized("weight", quantized)

    def forward(self, x: Tensor) -> Tensor:
        """`(..., in)` to `(..., out)`, computed in `compute_dtype`, returned in the dtype of `x`."""
        y = frozen_linear(x.to(self.compute_dtype), self.quantized)
        if self.bias is not None:
            y = y + self.bias.to(y.dtype)
        return y.to(x.dtype)

    def extra_repr(self) -> str:
        nested = ", double_quant" if self.double_quant else ""
        return f"{super().extra_repr()}, {self.quant_type}, block_size={self.block_size}{nested}"
