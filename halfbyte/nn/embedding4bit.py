"""An embedding whose table is frozen in 4 bits: the rows that are looked up are dequantized, and no others.

Where a row is whole blocks, its codes and absmax are gathered by row; elsewhere the whole table is dequantized for
every call, which is right and slow: choose a block size that divides the embedding's width.
"""

from typing import Any

import torch
from torch import Tensor, nn

from halfbyte.nn.packed import PackedWeights
from halfbyte.quant import QuantizedTensor, take_rows


class Embedding4bit(PackedWeights, nn.Embedding):
    """`nn.Embedding` with its weight in 4 bits, `((rows·width+1)//2, 1)` uint8; state and constants as Linear4bit's."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        *,
        kind: type[nn.Embedding] = nn.Embedding,
        quant_type: str = "nf4",
        block_size: int = 64,
        double_quant: bool = True,
        compute_dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
    ) -> None:
        """A table with room for codes: `quantized` must be set before the first forward.

        Args:
            kind: whose forward is run, on the rows that are looked up: a class of embeddings that does more, such as
                scale them, is told by it. What that needs are attributes of this module.
            compute_dtype: of the output.
        """
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim, self.padding_idx = num_embeddings, embedding_dim, padding_idx
        self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse = None, 2.0, False, False
        self.kind = kind
        shapes = {"weight": (num_embeddings, embedding_dim)}
        self._make_room(shapes, quant_type, block_size, double_quant, compute_dtype, device)

    @property
    def quantized(self) -> QuantizedTensor:
        """The table, `(rows, width)`."""
        return self.get_quantized("weight")

    @quantized.setter
    def quantized(self, quantized: QuantizedTensor) -> None:
        self.set_quantized("weight", quantized)

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """`(...)` integers to `(..., width)` in `compute_dtype`."""
        rows, places = torch.unique(input, return_inverse=True)
        table = self.as_kind(take_rows(self.quantized, rows, self.compute_dtype))
        result: Tensor = self.kind.forward(table, places, *args, **kwargs)
        return result

    def as_kind(self, rows: Tensor) -> nn.Embedding:
        """An embedding of these rows, of the class that this one stands for, with all else that it holds."""
        table = object.__new__(self.kind)
        table.__dict__.update(vars(self))
        table.__dict__["_parameters"] = {"weight": rows}
        table.padding_idx = None  # of another table, and it matters for gradients alone
        return table

    def extra_repr(self) -> str:
        nested = ", double_quant" if self.double_quant else ""
        return f"{super().extra_repr()}, {self.quant_type}, block_size={self.block_size}{nested}"
