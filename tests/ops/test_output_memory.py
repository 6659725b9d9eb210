"""Memory for outputs: as torch's, but that malloc gave it."""

import pytest
import torch

from halfbyte.ops import _memory


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8], ids=str)
@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 5), (70_001,), (2, 3, 50_001)], ids=str)
def test_it_is_as_torchs(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor, expected = _memory.empty(shape, dtype), torch.empty(shape, dtype=dtype)
    assert (tensor.shape, tensor.dtype, tensor.stride()) == (expected.shape, expected.dtype, expected.stride())
    assert tensor.data_ptr() % 64 == 0
    assert torch.equal(tensor.fill_(3), torch.full(shape, 3, dtype=dtype))
    assert not tensor.requires_grad


def test_it_lives_as_long_as_its_views() -> None:
    part = _memory.empty((1000, 1000), torch.float32).fill_(1)[500:]
    others = [_memory.empty((1000, 1000), torch.float32).fill_(2) for _ in range(3)]
    assert bool((part == 1).all())
    assert len({tensor.data_ptr() for tensor in (*others, part)}) == 4


def test_what_is_not_written_shows_where_torch_fills_memory() -> None:
    torch.use_deterministic_algorithms(True)
    try:
        assert _memory.empty((300, 300), torch.float32).isnan().all()
    finally:
        torch.use_deterministic_algorithms(False)
