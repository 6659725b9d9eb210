"""A linear layer whose weight is frozen in 4 bits.

    y = x · dequantize(W)ᵀ + b          dx = dy · dequantize(W)

The weight is never trained, so there is no gradient to it and the backward needs no activation at all:
only the codes, which the module holds anyway. QLoRA (arXiv 2305.14314), equation 5.
"""

from typing import Any

import torch
from torch import Tensor, nn

from halfbyte.quant import DoubleQuantized, QuantizedTensor, from_keys, quantize_4bit, to_keys


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


class Linear4bit(nn.Linear):
    """`nn.Linear` with its weight in 4 bits.  It is one, so that PEFT's `all-linear` finds it.

    `weight` is the packed codes, `((out·in+1)//2, 1)` uint8, not trainable; the constants are buffers beside
    it, and all are written to a state dict under bitsandbytes' keys. `to(dtype)` moves a bias, never codes.
    """

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
        self.quant_type = quant_type
        self.block_size = block_size
        self.double_quant = double_quant
        self.compute_dtype = compute_dtype
        codes = torch.empty((in_features * out_features + 1) // 2, 1, dtype=torch.uint8, device=device)
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.bias: nn.Parameter | None = None  # type: ignore[assignment]  # as in nn.Linear, which says otherwise
        if bias:
            zeros = torch.zeros(out_features, dtype=compute_dtype, device=device)
            self.bias = nn.Parameter(zeros, requires_grad=False)
        self.weight_dtype = compute_dtype
        # Persistent, or transformers would make them anew after loading; written under other names all the same.
        self.absmax: Tensor | None
        self.nested_absmax: Tensor | None
        self.register_buffer("absmax", None)
        self.register_buffer("nested_absmax", None)
        self.nested_offset = 0.0

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
        if self.absmax is None:
            raise RuntimeError(f"Linear4bit {self.in_features}→{self.out_features} holds no weight yet.")
        absmax: Tensor | DoubleQuantized = self.absmax
        if self.nested_absmax is not None:
            absmax = DoubleQuantized(self.absmax, self.nested_absmax, self.nested_offset)
        shape = torch.Size((self.out_features, self.in_features))
        return QuantizedTensor(self.weight, absmax, shape, self.weight_dtype, self.quant_type, self.block_size)

    @quantized.setter
    def quantized(self, quantized: QuantizedTensor) -> None:
        if quantized.shape != (self.out_features, self.in_features):
            raise ValueError(f"{tuple(quantized.shape)} is not ({self.out_features}, {self.in_features})")
        self.weight = nn.Parameter(quantized.packed, requires_grad=False)
        self.quant_type, self.block_size = quantized.quant_type, quantized.block_size
        self.weight_dtype = quantized.dtype
        nested = quantized.absmax if isinstance(quantized.absmax, DoubleQuantized) else None
        self.double_quant = nested is not None
        self.absmax = quantized.absmax.codes if isinstance(quantized.absmax, DoubleQuantized) else quantized.absmax
        self.nested_absmax = nested.absmax if nested else None
        self.nested_offset = nested.offset if nested else 0.0

    def forward(self, x: Tensor) -> Tensor:
        """`(..., in)` to `(..., out)`, computed in `compute_dtype`, returned in the dtype of `x`."""
        y = frozen_linear(x.to(self.compute_dtype), self.quantized)
        if self.bias is not None:
            y = y + self.bias.to(y.dtype)
        return y.to(x.dtype)

    def extra_repr(self) -> str:
        nested = ", double_quant" if self.double_quant else ""
        return f"{super().extra_repr()}, {self.quant_type}, block_size={self.block_size}{nested}"

    def _apply(self, fn: Any, recurse: bool = True) -> "Linear4bit":
        # Module.to(dtype) casts every floating tensor, and constants in 16 bits would be another weight; seen as
        # bytes they only move.
        constants = (self.absmax, self.nested_absmax)

        def keep_constants(tensor: Tensor) -> Tensor:
            is_constant = any(tensor is constant for constant in constants)
            return fn(tensor.view(torch.uint8)).view(tensor.dtype) if is_constant else fn(tensor)  # type: ignore[no-any-return]

        super()._apply(keep_constants, recurse)  # type: ignore[no-untyped-call]
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.absmax is not None:
            for name in ("absmax", "nested_absmax"):
                destination.pop(prefix + name, None)
            for suffix, tensor in to_keys(self.quantized).items():
                destination[f"{prefix}weight.{suffix}"] = tensor

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Tensor],
        prefix: str,
        _metadata: Any,
        _strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        _error_messages: list[str],
    ) -> None:
        mine = {key.removeprefix(prefix): tensor for key, tensor in state_dict.items() if key.startswith(prefix)}
        # On the meta device the layer holds nothing yet, and takes the device of what comes.
        device = self.weight.device if self.weight.device.type != "meta" else None
        mine = {key: tensor.to(device) if device is not None else tensor for key, tensor in mine.items()}
        packed, bias = mine.pop("weight", None), mine.pop("bias", None) if self.bias is not None else None
        constants = {key.removeprefix("weight."): mine.pop(key) for key in list(mine) if key.startswith("weight.")}
        if packed is None:
            missing_keys.append(f"{prefix}weight")
        else:
            self.quantized = from_keys(f"{prefix}weight", packed, constants)
        if self.bias is not None:
            if bias is None:
                missing_keys.append(f"{prefix}bias")
            else:
                self.bias = nn.Parameter(bias.to(self.bias.dtype), requires_grad=False)
        unexpected_keys += [prefix + key for key in mine]
