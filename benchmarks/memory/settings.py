"""The runs that `make bench-memory` measures: the goals, and others around them."""

from dataclasses import dataclass, field

SMOLLM2 = "SmolLM2-135M"


@dataclass(frozen=True)
class Setting:
    """A run of a few optimizer steps, each of one pass."""

    model: str  # SMOLLM2, or a shape of checkpoints.LLAMA
    rows: int
    length: int
    changes: dict[str, str] = field(default_factory=dict)  # of the configuration: key -> value
    rank: int = 16
    steps: int = 2  # the second one begins with the optimizer's state in memory
    resident_goal: float | None = None  # GB
    anonymous_goal: float | None = None  # GB

    @property
    def name(self) -> str:
        said = ", ".join(f"{key} {value}" for key, value in self.changes.items())
        return f"{self.model}, {self.rows} × {self.length}, r {self.rank}" + (f", {said}" if said else "")

    def configuration(self) -> dict[str, str]:
        return {
            "max_length": str(self.length),
            "per_device_train_batch_size": str(self.rows),
            "gradient_accumulation_steps": "1",
            "lora_r": str(self.rank),
            "max_steps": str(self.steps),
            **self.changes,
        }


_KEPT = {"gradient_checkpointing": "false"}
_FULL = {"gradient_checkpointing": "true"}
_PAGED = {"optim": "paged_adamw_32bit"}
_PAGED_8 = {"optim": "paged_adamw_8bit"}

SETTINGS = (
    Setting(SMOLLM2, 4, 512, _KEPT),
    Setting(SMOLLM2, 4, 512, {"max_memory": "1.65GB"}, resident_goal=1.7),  # no product is computed again
    Setting(SMOLLM2, 4, 512, _FULL, resident_goal=1.0),
    Setting(SMOLLM2, 8, 512, _FULL),
    Setting(SMOLLM2, 1, 4096, _FULL),
    Setting(SMOLLM2, 1, 4096, {"activation_offloading": "disk"}),
    Setting(SMOLLM2, 1, 4096, {"activation_offloading": "8bit"}),
    Setting(SMOLLM2, 1, 1024, _FULL | {"optim": "adamw_8bit"}),
    Setting(SMOLLM2, 1, 512, _KEPT | _PAGED_8, rank=64),
    Setting("7B", 1, 512, _FULL, resident_goal=5.5),
    Setting("7B", 1, 512, _FULL, rank=64, resident_goal=7.5),
    Setting("7B", 1, 256, _KEPT),
    Setting("7B", 2, 256, _FULL | _PAGED_8),
    Setting("7B", 1, 64, {"max_memory": "5.2GB", "optim": "adamw_8bit"}),
    Setting("13B", 1, 512, _FULL, resident_goal=9.5),
    Setting("13B", 1, 128, _KEPT | _PAGED),
    Setting("33B", 1, 512, _FULL | _PAGED, steps=1, resident_goal=21.0),
    Setting("65B", 1, 256, _FULL | _PAGED, steps=1, anonymous_goal=6.0),
)

# To try the harness out.
SMOKE = (Setting("tiny", 2, 64, _KEPT), Setting("tiny", 1, 128, _FULL | _PAGED))
