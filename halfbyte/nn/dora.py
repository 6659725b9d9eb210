"""The row norms that DoRA divides by, from the factors: B·A is never made.

    y = m / ‖W + s·B·A‖ ⊙ (x · Wᵀ + s · drop(x) · Aᵀ · Bᵀ)

DoRA (arXiv 2402.09353), equation 5: m has one learned magnitude a row of the weight, and the norm of each row takes no
gradient (section 4.3). With w and b a row of W and of B,

    ‖w + s·b·A‖² = ‖w‖² + 2·s·b·(A·wᵀ) + s²·b·(A·Aᵀ)·bᵀ

where ‖w‖² is a constant of the frozen weight, A·Wᵀ is a product of r rows with it, and A·Aᵀ is r × r.
"""

import torch
from torch import Tensor

from halfbyte.quant import QuantizedTensor


@torch.no_grad()
def row_squares(quantized: QuantizedTensor) -> Tensor:  # (out,) float32
    """‖w‖² of every row."""
    return quantized.dequantize(torch.float32).square().sum(1)


@torch.no_grad()
def row_norms(
    quantized: QuantizedTensor,  # (out, in)
    squares: Tensor,  # (out,) float32: `row_squares` of it
    lora_A: Tensor,  # (r, in)
    lora_B: Tensor,  # (out, r)
    scaling: float,  # s
) -> Tensor:  # (out,) float32
    """‖W + s·B·A‖ of every row."""
    wide_A, wide_B = lora_A.float(), lora_B.float()
    crossed = (quantized.matmul(wide_A).t() * wide_B).sum(1)
    low_rank = ((wide_B @ (wide_A @ wide_A.t())) * wide_B).sum(1)
    return (squares + 2 * scaling * crossed + scaling**2 * low_rank).clamp_min(0).sqrt()
