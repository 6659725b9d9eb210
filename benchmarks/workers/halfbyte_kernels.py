"""halfbyte's kernels alone, and torch's for the same: a 4-bit product, causal attention (workload P).

A request names a kernel, who runs it and a shape. Before its first timing a kernel of ours is held to the same rule as
the correctness gate: no further from float32 than torch's in bf16 is.
"""

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from halfbyte_model import executed
from protocol import Measure, Reply, Request, serve
from torch import Tensor

import halfbyte as hb
from halfbyte import ops

SLACK = 1.25
Call = Callable[[], Any]


def prepare(settings: Request) -> tuple[Measure, Reply]:
    torch.set_num_threads(settings["threads"])
    made: dict[str, dict[str, tuple[Call, float]]] = {}

    def measure(request: Request) -> Reply:
        key = f"{request['kernel']} {request['shape']}"
        if key not in made:  # inputs are drawn once; a check that fails ends the worker
            torch.manual_seed(0)
            made[key] = {"product": _product, "attention": _attention}[request["kernel"]](*request["shape"])
        call, flops = made[key][f"{request['who']} {request['direction']}"]
        call()
        calls, started = 0, time.perf_counter()
        while (seconds := time.perf_counter() - started) < request["seconds"] or not calls:
            call()
            calls += 1
        return {"seconds": seconds, "units": calls * flops, "implementation": executed()}

    return measure, {"has": [name for name, there in _kernels_here().items() if there]}


def _kernels_here() -> dict[str, bool]:
    return {
        "product": hasattr(hb.QuantizedTensor, "matmul"),
        "attention": hasattr(ops, "attention") and hasattr(ops, "attention_backward"),
    }


def _product(m: int, n: int, k: int) -> dict[str, tuple[Call, float]]:
    """x (m, k) · Wᵀ forward, dy (m, n) · W backward."""
    quantized = hb.quantize_4bit(torch.randn(n, k) * 0.02, quant_type="nf4")
    dense = quantized.dequantize(torch.bfloat16)
    x, dy = torch.randn(m, k).bfloat16(), torch.randn(m, n).bfloat16()
    flops = 2.0 * m * n * k
    calls: dict[str, tuple[Call, float]] = {
        "halfbyte forward": (lambda: quantized.matmul(x), flops),
        "halfbyte backward": (lambda: quantized.matmul(dy, transpose=True), flops),
        "torch forward": (lambda: x @ dense.T, flops),
        "torch backward": (lambda: dy @ dense, flops),
    }
    _hold("product forward", calls["halfbyte forward"][0](), x @ dense.T, x.float() @ dense.float().T)
    _hold("product backward", calls["halfbyte backward"][0](), dy @ dense, dy.float() @ dense.float())
    return calls


def _attention(batch: int, heads: int, kv_heads: int, length: int, head_dim: int) -> dict[str, tuple[Call, float]]:
    """Forward and backward together, causal, in transformers' memory layout."""

    def rows(count: int) -> Tensor:
        return torch.randn(batch, length, count, head_dim).bfloat16().transpose(1, 2)

    q, k, v, dout = rows(heads), rows(kv_heads), rows(kv_heads), rows(heads)
    scale = head_dim**-0.5

    def ours() -> list[Tensor]:
        out, logsumexp = ops.attention(q, k, v, None, scale, 0, 0.0)
        return [out, *ops.attention_backward(dout, q, k, v, out, logsumexp, None, scale, 0, 0.0)]

    # torch gets its keys repeated beforehand, which is in its favour.
    def leaves(dtype: torch.dtype) -> list[Tensor]:
        tall = [x.repeat_interleave(heads // kv_heads, dim=1) for x in (k, v)]
        return [x.detach().to(dtype).requires_grad_() for x in (q, *tall)]

    def torchs(inputs: list[Tensor]) -> list[Tensor]:
        out = F.scaled_dot_product_attention(*inputs, is_causal=True)
        return [out.detach(), *torch.autograd.grad(out, inputs, dout.to(out.dtype))]

    inputs = leaves(torch.bfloat16)
    mine, theirs, truth = ours(), torchs(inputs), torchs(leaves(torch.float32))
    for name, a, b, c in zip(("attention", "its dq"), mine, theirs, truth, strict=False):
        _hold(name, a, b, c)
    for name, a, b, c in zip(("its dk", "its dv"), mine[2:], theirs[2:], truth[2:], strict=True):
        _hold(name, a, _grouped(b, kv_heads), _grouped(c, kv_heads))
    flops = 7.0 * batch * heads * length * (length + 1) * head_dim  # two products forward, five backward, half a square
    return {"halfbyte both": (ours, flops), "torch both": (lambda: torchs(inputs), flops)}


def _grouped(gradient: Tensor, kv_heads: int) -> Tensor:
    """The gradient of a key that several queries share: the sum over them."""
    batch, heads, length, head_dim = gradient.shape
    return gradient.float().view(batch, kv_heads, heads // kv_heads, length, head_dim).sum(2)


def _hold(name: str, ours: Tensor, theirs: Tensor, truth: Tensor) -> None:
    mine, other = ((x.float() - truth).norm().item() for x in (ours, theirs))
    if not mine <= SLACK * other:
        raise ValueError(f"{name}: the error is {mine:.2e}, torch's {other:.2e}")


if __name__ == "__main__":
    serve(prepare)
