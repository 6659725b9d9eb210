"""State in a file: that it leaves memory, that nothing is left of it, and what is said where it cannot be."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from halfbyte.errors import HalfbyteError
from halfbyte.optim import AdamW, check_page_dir, paged
from halfbyte.optim.paged import PageFile, is_in_memory

MEGABYTE = 2**20


def layout(*sizes: int) -> list[dict[str, torch.Tensor]]:
    return [{"m": torch.empty(size, device="meta"), "v": torch.empty(size, device="meta")} for size in sizes]


def resident(kind: str) -> int:
    """Bytes of this process in memory: `RssAnon`, that belong to no file, or `RssFile`."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{kind}:")]
    return int(line.split()[1]) * 1024


def test_tensors_are_zeros_and_lie_in_the_order_of_the_step(tmp_path: Path) -> None:
    file = PageFile(tmp_path, layout(3, 0, 5000))
    addresses = [tensor.data_ptr() for state in file.tensors for tensor in state.values() if tensor.numel()]
    assert addresses == sorted(addresses)
    assert all(address % 64 == 0 for address in addresses)
    assert [{name: t.shape.numel() for name, t in state.items()} for state in file.tensors] == [
        {"m": n, "v": n} for n in (3, 0, 5000)
    ]
    for state in file.tensors:
        for tensor in state.values():
            assert (tensor == 0).all()
            tensor.fill_(1.0)  # its own: no other tensor shows it
    assert file.nbytes == sum(-(-4 * n // 64) * 64 * 2 for n in (3, 0, 5000))


def test_values_outlive_eviction(tmp_path: Path) -> None:
    file = PageFile(tmp_path, layout(100_000, 7))
    values = torch.randn(100_000)
    file.tensors[0]["v"].copy_(values)
    file.tensors[1]["m"].fill_(2.0)
    file.evict()
    assert torch.equal(file.tensors[0]["v"], values)
    assert (file.tensors[1]["m"] == 2).all()


def test_tensors_outlive_the_file_object(tmp_path: Path) -> None:
    tensors = PageFile(tmp_path, layout(1000)).tensors
    tensors[0]["m"].fill_(3.0)
    assert tensors[0]["m"].sum() == 3000


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="there is no /proc/self/status to read")
def test_state_leaves_memory(tmp_path: Path) -> None:
    """64 MB of state: none of it anonymous, and after eviction none of it resident."""
    if is_in_memory(tmp_path):
        pytest.skip(f"{tmp_path} is in memory itself")
    parameters = [torch.nn.Parameter(torch.zeros(2 * MEGABYTE)) for _ in range(4)]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    before = resident("RssAnon"), resident("RssFile")
    optimizer = AdamW(parameters, paged=True, page_dir=tmp_path)
    optimizer.step()
    assert resident("RssAnon") - before[0] < 8 * MEGABYTE
    assert resident("RssFile") - before[1] > 60 * MEGABYTE
    optimizer.evict()
    assert resident("RssFile") - before[1] < 4 * MEGABYTE
    optimizer.step()
    unpaged = [torch.nn.Parameter(torch.zeros(2 * MEGABYTE)) for _ in range(4)]
    for parameter in unpaged:
        parameter.grad = torch.ones_like(parameter)
    other = AdamW(unpaged)
    before_anon = resident("RssAnon")
    other.step()
    assert resident("RssAnon") - before_anon > 60 * MEGABYTE  # the measure sees what is not paged
    other.step()
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(parameters, unpaged, strict=True))


KILLED = """
import os, signal, sys, torch
from halfbyte.optim import AdamW
parameter = torch.nn.Parameter(torch.zeros(1 << 20))
parameter.grad = torch.ones_like(parameter)
optimizer = AdamW([parameter], paged=True, page_dir=sys.argv[1])
optimizer.step()
assert os.listdir(sys.argv[1]) == []
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.filterwarnings("ignore:page_dir")
def test_a_kill_leaves_nothing(tmp_path: Path) -> None:
    ran = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], capture_output=True, text=True, check=False)
    assert ran.returncode == -signal.SIGKILL, ran.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_found_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(HalfbyteError, match=r"page_dir .* needs 8,589,934,592,000,000 bytes, and [\d,]+ are free"):
        PageFile(tmp_path, layout(2**30 * 1_000_000))

    def full(*_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    parameter = torch.nn.Parameter(torch.zeros(8))
    with pytest.raises(HalfbyteError, match=r"cannot hold the optimizer's state \(No space left.*4,096 bytes"):
        AdamW([parameter], paged=True, page_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_group_without_room_is_not_added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if is_in_memory(tmp_path):
        pytest.skip(f"{tmp_path} is in memory itself")
    first, second = torch.nn.Parameter(torch.zeros(8)), torch.nn.Parameter(torch.zeros(8))
    optimizer = AdamW([first], paged=True, page_dir=tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(paged, "check_page_dir", lambda _: (_ for _ in ()).throw(HalfbyteError("full")))
        with pytest.raises(HalfbyteError, match="full"):
            optimizer.add_param_group({"params": [second]})
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": [second]})
    first.grad, second.grad = torch.ones(8), torch.ones(8)
    optimizer.step()
    assert torch.equal(first, second)


def test_a_directory_that_cannot_be_written(tmp_path: Path) -> None:
    check_page_dir(tmp_path)
    with pytest.raises(HalfbyteError, match=r"page_dir .*absent is not a directory"):
        check_page_dir(tmp_path / "absent")
    (tmp_path / "file").touch()
    with pytest.raises(HalfbyteError, match=r"page_dir .*file is not a directory"):
        check_page_dir(tmp_path / "file")
    with pytest.raises(HalfbyteError, match=r"page_dir /proc cannot be written"):
        check_page_dir(Path("/proc"))


def test_a_directory_in_memory_is_warned_of(tmp_path: Path) -> None:
    shared = Path("/dev/shm")
    if not (shared.is_dir() and is_in_memory(shared)):
        pytest.skip("there is no /dev/shm")
    parameter = torch.nn.Parameter(torch.zeros(8))
    with pytest.warns(UserWarning, match="page_dir /dev/shm is kept in memory itself"):
        AdamW([parameter], paged=True, page_dir=shared)
    assert not is_in_memory(Path("/proc"))


def test_a_group_without_parameters_has_no_pages(tmp_path: Path) -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = AdamW([{"params": [parameter]}, {"params": []}], lr=0.1, paged=True, page_dir=tmp_path)
    parameter.grad = torch.ones(3)
    optimizer.step()
    assert (parameter < 1).all()
