"""A weight in 4 bits: packed codes, one absmax a block, and the absmax itself in 8 bits.

QLoRA (arXiv 2305.14314), section 3. A tensor of n values holds

    codes      n/2 bytes                      two 4-bit indices into a 16-entry codebook a byte
    absmax     n/block_size values            the scale of a block: float32, or, double-quantized,
      codes    n/block_size bytes               an 8-bit index into a 256-entry codebook,
      absmax   n/(block_size·256) float32       scaled in blocks of 256,
      offset   one float32                      after the mean was taken away

which at a block size of 64 is 4 + 8/64 + 32/(64·256) = 4.127 bits a parameter. The two codebooks are
constants of the format, shared by all tensors, and are not counted.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from halfbyte import formats, ops
from halfbyte.errors import HalfbyteError


@dataclass(frozen=True, eq=False)
class DoubleQuantized:
    """The absmax of a tensor's blocks in 8 bits: `map[codes] * absmax[i // 256] + offset`."""

    codes: Tensor  # (blocks,) uint8
    absmax: Tensor  # (ceil(blocks/256),) float32
    offset: float  # the mean of the float32 absmax, exact in float32

    @classmethod
    def from_absmax(cls, absmax: Tensor) -> "DoubleQuantized":
        """Quantize `(blocks,)` float32.  The mean is summed in float64, so that no thread count shows in it."""
        mean = absmax.double().mean() if absmax.numel() else torch.zeros((), dtype=torch.float64)
        offset = float(mean.float())
        codebook = codebook_8bit(absmax.device)
        codes, nested = ops.quantize_8bit(absmax - offset, codebook, formats.NESTED_BLOCK_SIZE)
        return cls(codes, nested, offset)

    def dequantize(self) -> Tensor:
        """`(blocks,)` float32."""
        codebook = codebook_8bit(self.codes.device)
        return ops.dequantize_8bit(self.codes, self.absmax, codebook, formats.NESTED_BLOCK_SIZE) + self.offset

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.absmax.nbytes + 4


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """A frozen tensor in 4 bits.  Immutable; plain tensors inside, on whatever device they are on."""

    packed: Tensor  # ((n+1)//2, 1) uint8; element 2i in the high nibble
    absmax: Tensor | DoubleQuantized  # one value a block
    shape: torch.Size  # of the tensor that was quantized; n = prod(shape)
    dtype: torch.dtype  # of the tensor that was quantized
    quant_type: str  # nf4, fp4 or int4
    block_size: int  # consecutive row-major values that share one absmax

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """`shape` in `dtype` (default: the original's): codebook[code] · absmax in float32, then cast."""
        return ops.dequantize_4bit(
            self.packed,
            self.absmax_float32(),
            self.codebook,
            self.block_size,
            list(self.shape),
            dtype or self.dtype,
        )

    def row_slices(self, values: int) -> Iterator[tuple[int, Tensor]]:
        """A matrix about so many values at a time: the first row of each slice, and its rows in float32."""
        rows, columns = self.shape
        unit = self.block_size // math.gcd(columns, self.block_size)  # rows that end where a block does
        step = max(unit, values // max(1, columns) // unit * unit)
        packed, absmax = self.packed.view(-1), self.absmax_float32()
        for begin in range(0, rows, step):
            end = min(begin + step, rows)
            first, last = begin * columns, end * columns
            codes = packed[first // 2 : -(-last // 2)]
            scales = absmax[first // self.block_size : -(-last // self.block_size)]
            shape = [end - begin, columns]
            yield begin, ops.dequantize_4bit(codes, scales, self.codebook, self.block_size, shape, torch.float32)

    def absmax_float32(self) -> Tensor:
        """`(blocks,)` float32, dequantized when it is stored in 8 bits."""
        return self.absmax.dequantize() if isinstance(self.absmax, DoubleQuantized) else self.absmax

    def matmul(
        self,
        x: Tensor,
        transpose: bool = False,
        low_rank: tuple[Tensor, Tensor] | None = None,
        dropout: ops.Dropout | None = None,
    ) -> Tensor:
        """`x · Wᵀ + t · Bᵀ`, or `x · W + drop(t · A)` when transposed: see `ops.matmul_4bit`.  A matrix's alone."""
        absmax, nested = self._constants()
        rows, columns = self.shape
        return ops.matmul_4bit(
            x,
            self.packed,
            absmax,
            self.codebook,
            self.block_size,
            (rows, columns),
            transpose=transpose,
            nested=nested,
            low_rank=low_rank,
            dropout=dropout,
        )

    def _constants(self) -> tuple[Tensor, ops.Nested | None]:
        if isinstance(self.absmax, DoubleQuantized):
            nested = ops.Nested(self.absmax.absmax, codebook_8bit(self.packed.device), self.absmax.offset)
            return self.absmax.codes, nested
        return self.absmax, None

    def part(self, index: int) -> "QuantizedTensor | Tensor":
        """`self[index]`: in 4 bits and in the same memory where it begins with a block, else dequantized, in float32.

        Where the part's absmax do not begin with a block of their own, they alone are dequantized.
        """
        shape = self.shape[1:]
        n = math.prod(shape)
        begin, end = index * n, (index + 1) * n
        first, last = begin // self.block_size, formats.block_count(end, self.block_size)
        start = first * self.block_size
        stop = min(last * self.block_size, math.prod(self.shape))
        packed = self.packed.view(-1, 1)[start // 2 : (stop + 1) // 2]
        absmax = _absmax_of_blocks(self.absmax, first, last)
        if start == begin and (stop == end or end % self.block_size == 0):
            return QuantizedTensor(packed, absmax, shape, self.dtype, self.quant_type, self.block_size)
        around = QuantizedTensor(
            packed, absmax, torch.Size((stop - start,)), self.dtype, self.quant_type, self.block_size
        )
        return around.dequantize(torch.float32)[begin - start : end - start].view(shape)

    @property
    def codebook(self) -> Tensor:
        """`(16,)` float32 on the device of the codes."""
        return codebook_4bit(self.quant_type, self.packed.device)

    @property
    def nbytes(self) -> int:
        """Bytes that this tensor alone holds: codes and constants, without the shared codebooks."""
        return self.packed.nbytes + self.absmax.nbytes

    @property
    def bits_per_parameter(self) -> float:
        return 8 * self.nbytes / max(1, math.prod(self.shape))


def _absmax_of_blocks(absmax: Tensor | DoubleQuantized, first: int, last: int) -> Tensor | DoubleQuantized:
    """Of blocks `first` to `last`: the same memory if it can be."""
    if not isinstance(absmax, DoubleQuantized):
        return absmax[first:last]
    outer = formats.NESTED_BLOCK_SIZE
    start = first // outer
    around = DoubleQuantized(
        absmax.codes[start * outer : last],
        absmax.absmax[start : formats.block_count(last, outer)],
        absmax.offset,
    )
    return around if first % outer == 0 else around.dequantize()[first - start * outer :]


def matmul_sum(
    xs: Sequence[Tensor],  # each (..., out), with an `out` of its own
    weights: Sequence["QuantizedTensor"],  # each (out, in), all of one type, block size and storage of absmax
    low_rank: tuple[Tensor, Tensor] | None = None,  # t (..., r) and A (r, in)
    dropout: ops.Dropout | None = None,
) -> Tensor:  # (..., in)
    """`Σ x · W + drop(t · A)`: see `ops.matmul_4bit_sum`."""
    terms = []
    for x, weight in zip(xs, weights, strict=True):
        absmax, nested = weight._constants()
        terms.append(ops.Term(x, weight.packed, absmax, weight.shape[0], nested))
    first = weights[0]
    return ops.matmul_4bit_sum(terms, first.codebook, first.block_size, first.shape[1], low_rank, dropout)


def take_rows(
    weight: QuantizedTensor,  # (rows, width)
    index: Tensor,  # (n,) int64
    dtype: torch.dtype,
) -> Tensor:  # (n, width)
    """`weight.dequantize(dtype)[index]`, of which no more is dequantized where a row is whole blocks."""
    rows, width = weight.shape
    size = weight.block_size
    if width % size:
        return weight.dequantize(dtype)[index]
    absmax = weight.absmax
    if isinstance(absmax, DoubleQuantized):
        blocks = (index[:, None] * (width // size) + torch.arange(width // size, device=index.device)).flatten()
        outer = absmax.absmax[blocks // formats.NESTED_BLOCK_SIZE]
        chosen = codebook_8bit(absmax.codes.device)[absmax.codes[blocks].int()] * outer + absmax.offset
    else:
        chosen = absmax.view(rows, -1)[index].flatten()
    packed = weight.packed.view(rows, width // 2)[index].view(-1, 1)
    shape = torch.Size((len(index), width))
    return QuantizedTensor(packed, chosen, shape, weight.dtype, weight.quant_type, size).dequantize(dtype)


def quantize_4bit(
    weight: Tensor,
    quant_type: str = "nf4",
    block_size: int = 64,
    double_quant: bool = True,
) -> QuantizedTensor:
    """Quantize a float tensor of any shape.  QLoRA (arXiv 2305.14314), section 3.

    Args:
        weight: any shape, float32, bfloat16 or float16; read row-major.
        quant_type: `nf4`, `fp4` or `int4`.
        block_size: a power of two, 32 to 4096.
        double_quant: store the blocks' absmax in 8 bits.

    Raises:
        HalfbyteError: an unknown type, a block size out of range, NaN or infinity in the weight.
    """
    codebook = codebook_4bit(quant_type, weight.device)
    packed, absmax = ops.quantize_4bit(weight.detach().contiguous(), codebook, block_size)
    return QuantizedTensor(
        packed=packed.reshape(-1, 1),
        absmax=DoubleQuantized.from_absmax(absmax) if double_quant else absmax,
        shape=weight.shape,
        dtype=weight.dtype,
        quant_type=quant_type,
        block_size=block_size,
    )


def quantize_like(weight: Tensor, like: QuantizedTensor) -> QuantizedTensor:
    """A weight rounded to the other's dtype, then in 4 bits as that is.  Raises HalfbyteError as `quantize_4bit`."""
    double_quant = isinstance(like.absmax, DoubleQuantized)
    return quantize_4bit(weight.to(like.dtype), like.quant_type, like.block_size, double_quant)


def quantized_bytes(n: int, block_size: int = 64, double_quant: bool = True) -> int:
    """What `quantize_4bit` makes of `n` values holds so many bytes: `QuantizedTensor.nbytes`, before there is one."""
    blocks = formats.block_count(n, block_size)
    nested = blocks + 4 * formats.block_count(blocks, formats.NESTED_BLOCK_SIZE) + 4
    return formats.packed_bytes(n) + (nested if double_quant else 4 * blocks)


# The codebooks are constants of the format: one copy a device, whatever the number of tensors. A dict, and not
# functools.cache, which torch.compile looks through, with a warning.
_codebooks: dict[tuple[str, torch.device], Tensor] = {}


def codebook_4bit(quant_type: str, device: torch.device) -> Tensor:
    """`(16,)` float32: what the codes 0 to 15 mean.  Raises HalfbyteError on an unknown type."""
    if quant_type not in formats.CODEBOOKS:
        raise HalfbyteError(f"quant_type {quant_type!r} is not known; use one of {', '.join(formats.CODEBOOKS)}.")
    return _codebook(quant_type, formats.CODEBOOKS[quant_type], device)


def codebook_8bit(device: torch.device) -> Tensor:
    """`(256,)` float32, ascending: what the codes of a double-quantized absmax mean."""
    return _codebook("dynamic", formats.DYNAMIC_SIGNED, device)


def _codebook(name: str, entries: tuple[float, ...], device: torch.device) -> Tensor:
    if (name, device) not in _codebooks:
        _codebooks[name, device] = torch.tensor(entries, dtype=torch.float32, device=device)
    return _codebooks[name, device]
