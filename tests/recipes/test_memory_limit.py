"""Pages let a run finish in memory in which it could not without them, and its numbers are the same.

The limit is RLIMIT_DATA: what a process may have of memory that it can write to and that belongs to no shared file.
Pages of files do not count for it, as they do not where the system itself runs short. It needs no privilege.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from halfbyte.recipes.quantize import quantize
from runs import adapter_bytes, configure, write_rows

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Linux's RLIMIT_DATA counts anonymous memory")

STATE_BYTES = 8 * 4_884_480 * 4  # of SmolLM2's adapters at rank 64
WEIGHT_BYTES = 111_000_000  # of SmolLM2 in 4 bits, its 16-bit embeddings included

RUN = """
import json, resource, sys, threading, time
from pathlib import Path

limit, most = int(sys.argv[2]), 0
if limit:
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))

def watch():
    global most
    while True:  # what the limit is of, as the system counts it
        status = Path("/proc/self/status").read_text()
        most = max(most, 1024 * int(status.partition("VmData:")[2].split()[0]))
        time.sleep(0.002)

threading.Thread(target=watch, daemon=True).start()
from halfbyte import FinetuneConfig, finetune
finetune(FinetuneConfig.model_validate(json.loads(sys.argv[1])))
print(most)
"""


def test_a_paged_run_finishes_where_the_unpaged_one_cannot(smollm2_directory: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl")
    checkpoint = tmp_path / "4-bit"
    quantize(str(smollm2_directory), str(checkpoint))

    def train(name: str, model: Path, optim: str, limit: int) -> subprocess.CompletedProcess[str]:
        settings = {"optim": optim, "lora_r": 64, "max_length": 64, "max_steps": 2, "gradient_checkpointing": True}
        settings |= {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "save_steps": None}
        config = configure(model, rows, tmp_path / name, **settings | {"threads": 1, "learning_rate": 1e-4})
        command = [sys.executable, "-c", RUN, json.dumps(config.to_dict()), str(limit)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)

    free = train("free", smollm2_directory, "adamw", 0)
    assert free.returncode == 0, free.stderr
    # Halfway between what it takes and what it takes without what is paged.
    without_state = int(free.stdout.split()[-1]) - STATE_BYTES // 2
    without_weights = without_state - (STATE_BYTES + WEIGHT_BYTES) // 2

    killed = train("unpaged", smollm2_directory, "adamw", without_state)
    assert killed.returncode != 0
    assert "memory" in killed.stderr
    paged = train("paged", smollm2_directory, "paged_adamw_32bit", without_state)
    assert paged.returncode == 0, paged.stderr

    killed = train("state-paged", smollm2_directory, "paged_adamw_32bit", without_weights)
    assert killed.returncode != 0
    assert "memory" in killed.stderr.lower()
    both = train("both-paged", checkpoint, "paged_adamw_32bit", without_weights)
    assert both.returncode == 0, both.stderr

    expected = adapter_bytes(tmp_path / "free")
    assert adapter_bytes(tmp_path / "paged") == expected
    assert adapter_bytes(tmp_path / "both-paged") == expected
