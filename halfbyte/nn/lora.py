"""The low-rank product: s · B · A · dropout(x).  LoRA (arXiv 2106.09685), equation 3."""

import torch.nn.functional as F
from torch import Tensor


def lora_product(
    x: Tensor,  # (..., in), the dtype that products are computed in
    lora_A: Tensor,  # (r, in), float32 while it is trained
    lora_B: Tensor,  # (out, r), likewise
    scaling: float,  # lora_alpha / r, or lora_alpha / sqrt(r) (rsLoRA)
    dropout: float,  # probability that an input is dropped; 0 outside training
) -> Tensor:  # (..., out), the dtype of x
    """The adapters are kept in float32 and rounded to the dtype of `x` for the two products."""
    if dropout:
        x = F.dropout(x, dropout)
    return F.linear(F.linear(x, lora_A.to(x.dtype)), lora_B.to(x.dtype)) * scaling
