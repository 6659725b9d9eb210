"""What a run holds in memory, planned and measured: `python -m benchmarks.memory`, which `make bench-memory` runs."""
