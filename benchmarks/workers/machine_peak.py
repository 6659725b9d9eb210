"""The machine's bf16 peak, measured again in each turn (benchmarks/peak.cpp)."""

import json
import subprocess

from protocol import Measure, Reply, Request, serve


def prepare(settings: Request) -> tuple[Measure, Reply]:
    def measure(_: Request) -> Reply:
        command = [settings["binary"], str(settings["threads"]), "arithmetic"]
        answer = subprocess.run(command, check=True, capture_output=True, text=True)
        return {"seconds": 1.0, "units": json.loads(answer.stdout)["bf16_flops"]}

    return measure, {}


if __name__ == "__main__":
    serve(prepare)
