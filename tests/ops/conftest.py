"""Every compiled implementation, forced one by one; those this machine cannot run are skipped and say why."""

from collections.abc import Iterator

import pytest
import torch

from halfbyte import ops
from halfbyte.ops import _dispatch


@pytest.fixture(params=_dispatch.NATIVE)
def implementation(request: pytest.FixtureRequest) -> Iterator[str]:
    """The name of the compiled implementation that every op of the test runs on."""
    known = {i.name: i for i in ops.available_implementations()}
    if request.param not in known:
        pytest.skip(f"{request.param} is not part of this build, which is for another architecture or compiler")
    if not known[request.param].available:
        pytest.skip(f"this machine cannot run {request.param}, which needs {known[request.param].needs}")
    with ops.forced_implementation(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def seed() -> None:
    """The same random values whatever runs before."""
    torch.manual_seed(0)


@pytest.fixture
def uninitialized_is_nan() -> Iterator[None]:
    """Memory that an op allocates and forgets to write shows as NaN in its result."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
