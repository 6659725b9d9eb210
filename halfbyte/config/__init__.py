"""Typed configuration: which keys there are, what each may hold, and one sentence for everything else.

`load_config` merges a YAML file with flags, and turns whatever is wrong with either into one `HalfbyteError` that names
the file and line (or the flag), the key, the value that was found and what is allowed.
"""

from halfbyte.config.datasets import DatasetEntry
from halfbyte.config.keys import (
    ChatConfig,
    Config,
    DataConfig,
    EvaluateConfig,
    FinetuneConfig,
    GenerateConfig,
    MergeConfig,
    PlanConfig,
    QuantizeConfig,
)
from halfbyte.config.reading import ConfigT, load_config
from halfbyte.config.values import memory_bytes
from halfbyte.config.words import Allowed, allowed, alternatives, nearest

__all__ = [
    "Allowed",
    "ChatConfig",
    "Config",
    "ConfigT",
    "DataConfig",
    "DatasetEntry",
    "EvaluateConfig",
    "FinetuneConfig",
    "GenerateConfig",
    "MergeConfig",
    "PlanConfig",
    "QuantizeConfig",
    "allowed",
    "alternatives",
    "load_config",
    "memory_bytes",
    "nearest",
]
