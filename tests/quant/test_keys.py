"""The keys on disk: bitsandbytes' names and order, and one sentence for whatever else a file holds."""

import json
import math
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from halfbyte import HalfbyteError, formats, quantize_4bit
from halfbyte.quant import from_keys, to_keys

STATE = "quant_state.bitsandbytes__nf4"
NAME = "model.layers.7.mlp.up_proj.weight"
Keys = dict[str, Tensor]


def written(double_quant: bool = True, quant_type: str = "nf4") -> tuple[Tensor, Keys]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(96, 200, generator=generator).bfloat16()
    quantized = quantize_4bit(weight, quant_type, double_quant=double_quant)
    return quantized.packed, to_keys(quantized)


def state_of(keys: Keys) -> dict[str, Any]:
    (key,) = [key for key in keys if key.startswith("quant_state")]
    return json.loads(bytes(keys[key].tolist()))  # type: ignore[no-any-return]


def as_state(state: Any) -> Tensor:
    return torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)


@pytest.mark.parametrize("quant_type", list(formats.CODEBOOKS))
def test_names_dtypes_and_the_order_of_the_json(quant_type: str) -> None:
    _, keys = written(True, quant_type)
    described = {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in keys.items()}
    state_key = f"quant_state.bitsandbytes__{quant_type}"
    assert described == {
        "absmax": (torch.uint8, (300,)),
        "quant_map": (torch.float32, (16,)),
        "nested_absmax": (torch.float32, (2,)),
        "nested_quant_map": (torch.float32, (256,)),
        state_key: (torch.uint8, (len(keys[state_key]),)),
    }
    state = state_of(keys)
    assert list(state) == [
        "quant_type",
        "blocksize",
        "dtype",
        "shape",
        "nested_blocksize",
        "nested_dtype",
        "nested_offset",
    ]
    offset = state.pop("nested_offset")
    assert offset == torch.tensor(offset).item()  # a float32, exactly
    assert state == {
        "quant_type": quant_type,
        "blocksize": 64,
        "dtype": "bfloat16",
        "shape": [96, 200],
        "nested_blocksize": 256,
        "nested_dtype": "float32",
    }


def test_without_double_quantization_nothing_nested_is_written() -> None:
    _, keys = written(double_quant=False)
    assert set(keys) == {"absmax", "quant_map", STATE}
    assert keys["absmax"].dtype == torch.float32
    assert list(state_of(keys)) == ["quant_type", "blocksize", "dtype", "shape"]


@pytest.mark.parametrize("quant_type", list(formats.CODEBOOKS))
@pytest.mark.parametrize("double_quant", [False, True])
def test_what_is_written_reads_back_and_is_written_the_same(double_quant: bool, quant_type: str) -> None:
    packed, keys = written(double_quant, quant_type)
    read = from_keys(NAME, packed, keys)
    assert (read.quant_type, read.block_size, read.dtype) == (quant_type, 64, torch.bfloat16)
    assert torch.equal(read.packed, packed)
    again = to_keys(read)
    assert list(again) == list(keys)
    assert all(torch.equal(again[key], keys[key]) for key in keys)


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float16, torch.float32])
def test_codes_that_were_stored_as_another_dtype_are_the_same_bytes(storage: torch.dtype) -> None:
    packed, keys = written()
    stored = packed.flatten().view(storage).view(-1, 1)
    assert torch.equal(from_keys(NAME, stored, keys).packed, packed)


@pytest.mark.parametrize("double_quant", [False, True])
def test_a_missing_key_is_named(double_quant: bool) -> None:
    packed, keys = written(double_quant)
    for missing in keys:
        rest = {key: tensor for key, tensor in keys.items() if key != missing}
        with pytest.raises(HalfbyteError) as caught:
            from_keys(NAME, packed, rest)
        told = str(caught.value)
        assert NAME in told
        assert "quant_state" in told if missing == STATE else f"{NAME}.{missing}" in told, missing


CONTRADICTIONS: list[tuple[str, Any]] = [
    ("quant_type", "fp4"),
    ("quant_type", "nf5"),
    ("quant_type", ["nf4"]),
    ("quant_type", None),
    ("blocksize", 128),
    ("blocksize", 48),
    ("blocksize", 0),
    ("blocksize", -64),
    ("blocksize", 64.0),
    ("blocksize", True),
    ("blocksize", "64"),
    ("dtype", "int8"),
    ("dtype", "Tensor"),
    ("dtype", "__name__"),
    ("dtype", 5),
    ("shape", [200, 97]),
    ("shape", [96.0, 200]),
    ("shape", [-96, -200]),
    ("shape", [10**30, 1]),
    ("shape", "ab"),
    ("shape", 19200),
    ("nested_blocksize", 128),
    ("nested_blocksize", 256.0),
    ("nested_dtype", "float64"),
    ("nested_offset", "1"),
    ("nested_offset", [1.0]),
    ("nested_offset", math.nan),
    ("nested_offset", math.inf),
    ("nested_offset", 10**400),
]


@pytest.mark.parametrize(("field", "value"), CONTRADICTIONS, ids=str)
def test_a_state_that_contradicts_the_tensors_is_refused(field: str, value: Any) -> None:
    packed, keys = written()
    keys[STATE] = as_state(state_of(keys) | {field: value})
    with pytest.raises(HalfbyteError, match=NAME):
        from_keys(NAME, packed, keys)


@pytest.mark.parametrize("field", ["quant_type", "blocksize", "dtype", "shape", "nested_blocksize", "nested_offset"])
def test_a_field_that_is_missing_from_the_state_is_named(field: str) -> None:
    packed, keys = written()
    state = state_of(keys)
    del state[field]
    keys[STATE] = as_state(state)
    with pytest.raises(HalfbyteError, match=field):
        from_keys(NAME, packed, keys)


@pytest.mark.parametrize(
    "state",
    [
        torch.zeros(4),
        torch.zeros(0, dtype=torch.uint8),
        torch.tensor([300], dtype=torch.int64),
        torch.zeros(2, 2, dtype=torch.uint8),
        torch.tensor([0xFF, 0xFE], dtype=torch.uint8),
        torch.tensor(list(b"[" * 100_000), dtype=torch.uint8),
        as_state([1, 2]),
        as_state(None),
        as_state("nf4"),
    ],
    ids=["float", "empty", "large", "matrix", "no UTF-8", "deep", "list", "null", "text"],
)
def test_a_state_that_is_no_json_object_is_refused(state: Tensor) -> None:
    packed, keys = written()
    keys[STATE] = state
    with pytest.raises(HalfbyteError, match=f"{NAME}.{STATE}"):
        from_keys(NAME, packed, keys)


def poisoned(tensor: Tensor) -> Tensor:
    copy = tensor.clone()
    copy.view(-1)[-1] = math.nan
    return copy


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("change", ["shorter", "longer", "half", "float64", "int8", "nan", "scaled"])
def test_a_tensor_that_is_not_what_the_format_has_is_refused(change: str, double_quant: bool) -> None:
    changes = {
        "shorter": lambda t: t.flatten()[:-1],
        "longer": lambda t: torch.cat([t.flatten(), t.flatten()[:1]]),
        "half": lambda t: t.half(),
        "float64": lambda t: t.double(),
        "int8": lambda t: t.to(torch.int8),
        "nan": poisoned,
        "scaled": lambda t: t * 2,
    }
    packed, keys = written(double_quant)
    for suffix in keys.keys() - {STATE}:
        is_codebook = suffix.endswith("quant_map")
        # Other finite constants are just another weight. A codebook counts by its values, whatever their dtype.
        harmless = change == "float64" if is_codebook else change == "scaled"
        if harmless or (change == "nan" and not keys[suffix].is_floating_point()):
            continue
        with pytest.raises(HalfbyteError, match=f"{NAME}.{suffix}"):
            from_keys(NAME, packed, keys | {suffix: changes[change](keys[suffix])})
    for wrong in (packed[:-1], torch.cat([packed, packed[:1]])):
        with pytest.raises(HalfbyteError, match=NAME):
            from_keys(NAME, wrong, keys)


def test_constants_of_both_kinds_are_refused() -> None:
    packed, nested = written(True)
    _, plain = written(False)
    for keys in (
        plain | {"nested_absmax": nested["nested_absmax"]},
        plain | {"nested_quant_map": nested["nested_quant_map"]},
        nested | {STATE: plain[STATE]},
        plain | {STATE: nested[STATE]},
        nested | {"absmax": plain["absmax"]},
        nested | {"quant_state.bitsandbytes__fp4": nested[STATE]},
    ):
        with pytest.raises(HalfbyteError, match=NAME):
            from_keys(NAME, packed, keys)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_no_json_makes_anything_but_a_sentence(data: st.DataObject) -> None:
    packed, keys = written(data.draw(st.booleans()))
    state = state_of(keys)
    values = st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
        lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=4), children, max_size=2),
        max_leaves=4,
    )
    changed = data.draw(st.dictionaries(st.sampled_from([*state, "extra"]), values, max_size=3))
    keys[STATE] = as_state(state | changed)
    try:
        read = from_keys(NAME, packed, keys)
    except HalfbyteError as error:
        told = str(error)
    else:
        told = NAME
        assert read.dequantize(torch.float32).isfinite().all()
    assert NAME in told
