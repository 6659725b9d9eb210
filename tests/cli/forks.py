"""Runs command lines, each in a fork of a process that has imported what takes seconds to import.

A line of standard input is JSON, `[folder, [argument, ...]]`; a line of standard output is the exit code. What
the command prints goes to `.stdout` and `.stderr` in its folder.
"""

import importlib
import json
import os
import sys
import traceback

from halfbyte.cli import main, quiet_dependencies

quiet_dependencies()
for name in ("evaluate", "finetune", "generate", "plan", "quantize"):
    importlib.import_module(f"halfbyte.recipes.{name}")
torch = importlib.import_module("torch")
torch.set_num_threads(1)  # a pool of threads does not survive a fork


def run(folder: str, arguments: list[str]) -> None:
    """In the child: as the script `halfbyte` would, down to the exit code of an exception."""
    os.chdir(folder)
    for descriptor, name in ((1, ".stdout"), (2, ".stderr")):
        os.dup2(os.open(name, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), descriptor)
    code = 1
    try:
        code = main(arguments)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


for line in sys.stdin:
    child = os.fork()
    if child == 0:
        run(*json.loads(line))
    _, status = os.waitpid(child, 0)
    print(os.waitstatus_to_exitcode(status), flush=True)
