"""The compiled kernels, csrc/bindings.cpp. Addresses and sizes in; nothing is checked here."""

# ruff: noqa: N999  (the name of a compiled module)

from collections.abc import Sequence

def implementations() -> list[tuple[str, bool, str]]: ...
def select(name: str) -> bool: ...
def selected() -> str: ...
def executed() -> str | None: ...
def quantize_4bit(
    values: int, dtype: int, n: int, block_size: int, codebook: int, packed: int, absmax: int, threads: int, /
) -> int: ...
def dequantize_4bit(
    packed: int, absmax: int, codebook: int, n: int, block_size: int, values: int, dtype: int, threads: int, /
) -> None: ...
def quantize_8bit(
    values: int, n: int, block_size: int, codebook: int, codes: int, absmax: int, threads: int, /
) -> int: ...
def dequantize_8bit(
    codes: int, absmax: int, codebook: int, n: int, block_size: int, values: int, threads: int, /
) -> None: ...
def cross_entropy(
    logits: int,
    dtype: int,
    rows: int,
    vocabulary: int,
    targets: int,
    scale: float,
    softcap: float,
    gradient: bool,
    losses: int,
    threads: int,
    /,
) -> None: ...
def norm_forward(
    x: int,
    weight: int,
    bias: int,
    dtype: int,
    rows: int,
    columns: int,
    eps: float,
    offset: float,
    y: int,
    mean: int,
    rstd: int,
    threads: int,
    /,
) -> None: ...
def norm_backward(
    grad: int,
    x: int,
    weight: int,
    mean: int,
    rstd: int,
    dtype: int,
    rows: int,
    columns: int,
    offset: float,
    grad_x: int,
    threads: int,
    /,
) -> None: ...
def rotary(
    x: int,
    cos: int,
    sin: int,
    y: int,
    dtype: int,
    sizes: Sequence[int],
    strides: Sequence[int],
    backward: bool,
    threads: int,
    /,
) -> None: ...
def gated_forward(
    gate: int,
    up: int,
    out: int,
    dtype: int,
    activation: int,
    rows: int,
    columns: int,
    gate_stride: int,
    up_stride: int,
    threads: int,
    /,
) -> None: ...
def gated_backward(
    grad: int,
    gate: int,
    up: int,
    grad_gate: int,
    grad_up: int,
    dtype: int,
    activation: int,
    rows: int,
    columns: int,
    gate_stride: int,
    up_stride: int,
    grad_stride: int,
    threads: int,
    /,
) -> None: ...
def adamw_step(
    tensors: int,
    table: int,
    keep: float,
    one_minus_beta1: float,
    beta2: float,
    one_minus_beta2: float,
    step_size: float,
    root_correction2: float,
    eps: float,
    threads: int,
    /,
) -> None: ...

class DynamicMap:
    def __init__(self, codebook: int, /) -> None: ...

def adamw_8bit_step(
    tensors: int,
    table: int,
    exp_avg_map: DynamicMap,
    exp_avg_sq_map: DynamicMap,
    keep: float,
    one_minus_beta1: float,
    beta2: float,
    one_minus_beta2: float,
    step_size: float,
    root_correction2: float,
    eps: float,
    threads: int,
    /,
) -> None: ...
def matmul_4bit(
    terms: list[tuple[int, int, int, int, int, int, float, int]],
    dtype: int,
    rows: int,
    nested_codebook: int,
    codebook: int,
    block_size: int,
    in_features: int,
    transposed: bool,
    left: int,
    left_stride: int,
    right: int,
    rank: int,
    seed: int,
    threshold: int,
    y: int,
    threads: int,
    /,
) -> None: ...
def matmul_dense(
    x: int,
    x_stride: int,
    w: int,
    w_stride: int,
    dtype: int,
    rows: int,
    depth: int,
    columns: int,
    transposed: bool,
    scale: float,
    seed: int,
    threshold: int,
    y: int,
    y_float32: bool,
    threads: int,
    /,
) -> None: ...

_Shape = tuple[int, int, int, int, int, int]  # batches, heads, kv_heads, queries, keys, head_dim
_Rows = tuple[int, int, int, int]  # address; strides of batch, head and row in elements

def attention(
    shape: _Shape,
    dtype: int,
    q: _Rows,
    k: _Rows,
    v: _Rows,
    segment_start: int,
    window: int,
    scale: float,
    softcap: float,
    out: int,
    logsumexp: int,
    workspace: int,
    threads: int,
    /,
) -> None: ...
def attention_backward(
    shape: _Shape,
    dtype: int,
    q: _Rows,
    k: _Rows,
    v: _Rows,
    segment_start: int,
    window: int,
    scale: float,
    softcap: float,
    out: int,
    logsumexp: int,
    dout: _Rows,
    dq: int,
    dk: int,
    dv: int,
    workspace: int,
    threads: int,
    /,
) -> None: ...
def attention_workspace_bytes(shape: _Shape, /) -> int: ...
def attention_backward_workspace_bytes(shape: _Shape, threads: int, /) -> int: ...

class DecodeModel:
    def __init__(
        self,
        hidden: int,
        intermediate: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        vocabulary: int,
        epsilon: float,
        attention_scale: float,
        final_norm: int,
        head: int,
        /,
    ) -> None: ...
    def add_layer(self, attention_norm: int, mlp_norm: int, query_norm: int, key_norm: int, /) -> None: ...
    def add_linear(
        self,
        packed: int,
        absmax: int,
        absmax_codes: int,
        nested_absmax: int,
        nested_codebook: int,
        nested_offset: float,
        codebook: int,
        block_size: int,
        out_features: int,
        in_features: int,
        bias: int,
        lora_a: int,
        lora_b: int,
        rank: int,
        /,
    ) -> None: ...
    def step(
        self,
        embedding: int,
        cos: int,
        sin: int,
        keys: int,
        values: int,
        capacity: int,
        position: int,
        logits: int,
        threads: int,
        /,
    ) -> None: ...
