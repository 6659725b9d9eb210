"""Which pages are asked for and when, and that they come."""

import ctypes
import itertools
import math
import mmap
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig

from halfbyte import add_lora, load_model
from halfbyte.huggingface import prefetch
from halfbyte.huggingface.mapped import MappedFile, Span, map_safetensors
from halfbyte.huggingface.prefetch import Prefetcher
from halfbyte.huggingface.recompute import LEVELS, set_recomputation
from halfbyte.recipes.quantize import quantize
from models import save_model

LAYERS = 4
IDS = torch.arange(24).view(2, 12)


class Immediately:
    """A thread that is never behind."""

    def submit(self, function: Callable[..., None], *arguments: Any) -> None:
        function(*arguments)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("prefetch")
    sizes = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "num_hidden_layers": LAYERS}
    quantize(str(save_model(directory / "16-bit", "llama", **sizes)), str(directory / "nf4"))
    return directory / "nf4"


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """The system's count of major faults: constant, until it is called, and then it rises with every look."""
    count = itertools.repeat(7)
    monkeypatch.setattr(prefetch, "_major_faults", lambda: next(count))

    def rise() -> None:
        nonlocal count
        count = itertools.count(8)

    return rise


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Offsets and sizes of what is asked for, in order."""
    requests: list[tuple[int, int]] = []
    monkeypatch.setattr(MappedFile, "request", lambda _file, offset, nbytes: requests.append((offset, nbytes)))
    monkeypatch.setattr(prefetch, "ThreadPoolExecutor", lambda **_: Immediately())
    return requests


def places_of(requests: list[tuple[int, int]], prefetcher: Prefetcher) -> list[int]:
    """The layers that were asked for, by where they lie in the file; each as a whole, or this fails."""
    places, left = [], list(requests)
    starts = {spans[0].offset: place for place, spans in enumerate(prefetcher._places)}
    while left:
        place = starts[left[0][0]]
        parts = [(part.offset, part.nbytes) for span in prefetcher._places[place] for part in span.parts()]
        assert left[: len(parts)] == parts
        places.append(place)
        left = left[len(parts) :]
    return places


@pytest.fixture
def prefetchers(monkeypatch: pytest.MonkeyPatch) -> list[Prefetcher]:
    made: list[Prefetcher] = []
    original = Prefetcher.__init__

    def keep(self: Prefetcher, *arguments: Any) -> None:
        original(self, *arguments)
        made.append(self)

    monkeypatch.setattr(Prefetcher, "__init__", keep)
    return made


@pytest.mark.parametrize("level", LEVELS)
def test_the_next_layer_forward_and_the_one_before_backward(
    level: str,
    checkpoint: Path,
    faults: Callable[[], None],
    asked: list[tuple[int, int]],
    prefetchers: list[Prefetcher],
) -> None:
    settings = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    model = add_lora(load_model(str(checkpoint))[0], settings).train()
    set_recomputation(model, level)
    (prefetcher,) = prefetchers
    assert len(prefetcher._places) == LAYERS + 1
    assert asked == []  # load_model runs the model too, and no page was waited for
    faults()
    for _ in range(2):
        loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
        assert places_of(asked, prefetcher) == [1, 2, 3, LAYERS]
        asked.clear()
        loss.backward()
        assert places_of(asked, prefetcher) == [2, 1, 0, 1]
        asked.clear()
    with torch.no_grad():
        for _ in range(2):
            model(input_ids=IDS)
            assert places_of(asked, prefetcher) == [1, 2, 3, LAYERS]
            asked.clear()


def test_nothing_is_asked_for_when_no_page_was_waited_for(
    checkpoint: Path, faults: Callable[[], None], asked: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = load_model(str(checkpoint))
    with torch.no_grad():
        model(input_ids=IDS)
        assert asked == []
        count = 8
        monkeypatch.setattr(prefetch, "_major_faults", lambda: count)  # one fault, and then none any more
        passes = []
        for _ in range(5):
            model(input_ids=IDS)
            passes.append(len(asked))
            asked.clear()
    assert passes[0] == passes[1] > 0
    assert passes[3:] == [0, 0]


def test_a_layer_that_was_left_behind_is_not_asked_for(asked: list[tuple[int, int]], checkpoint: Path) -> None:
    _, (file,) = map_safetensors(checkpoint)
    prefetcher = Prefetcher([file], [[Span(file, 0, 10)], [Span(file, 10, 10)], []])
    prefetcher._wanted = 1
    prefetcher._request(0)
    assert asked == []
    prefetcher._request(1)
    assert asked == [(10, 10)]


def test_pages_leave_and_come_when_they_are_asked_for(checkpoint: Path, tmp_path: Path) -> None:
    if sys.platform != "linux":
        pytest.skip("mincore is asked, and posix_fadvise")
    shutil.copy(checkpoint / "model.safetensors", tmp_path)
    with (tmp_path / "model.safetensors").open("rb") as written:
        os.fsync(written.fileno())  # only clean pages can leave
    tensors, (file,) = map_safetensors(tmp_path)
    mapped = [tensor for tensor in tensors.values() if isinstance(tensor, torch.Tensor)]
    copies = [tensor.clone() for tensor in mapped]
    assert all(resident(tensor) == 1 for tensor in mapped)
    file.evict()
    if any(resident(tensor) for tensor in mapped):
        pytest.skip("the file is in memory itself")
    prefetcher = Prefetcher([file], [[file.span_of(tensor) for tensor in mapped], []])  # type: ignore[list-item]
    prefetcher._wanted = 0
    prefetcher._thread.submit(prefetcher._request, 0).result()
    deadline = time.monotonic() + 20
    while any(resident(tensor) < 1 for tensor in mapped) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert all(resident(tensor) == 1 for tensor in mapped)
    assert all(torch.equal(*pair) for pair in zip(mapped, copies, strict=True))


def resident(tensor: torch.Tensor) -> float:
    """The share of a tensor's pages that are in memory, whether or not this process has used them."""
    first = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    nbytes = tensor.data_ptr() + tensor.nbytes - first
    pages = (ctypes.c_ubyte * math.ceil(nbytes / mmap.PAGESIZE))()
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mincore(ctypes.c_void_p(first), ctypes.c_size_t(nbytes), pages) == 0, ctypes.get_errno()
    return sum(page & 1 for page in pages) / len(pages)
