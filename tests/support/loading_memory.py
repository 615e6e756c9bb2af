"""How much memory one rank's loading takes at most: run as a script, so that nothing else is in the process.

python loading_memory.py CASE…, each case the arguments of an EngineConfig as JSON. Prints a JSON list: for each case
the bytes of private memory by which the process grew while it loaded rank 0, in the end and at the most.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from typing import Any

import torch

from stagemesh.config.engine import EngineArgs, EngineConfig
from stagemesh.stages.worker.model_runner import ModelRunner


def private_bytes() -> int:
    """Memory of the process that is not a view of a file, such as the checkpoint's."""
    with open("/proc/self/status") as lines:
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))


def growth(args: dict[str, Any]) -> tuple[int, int]:
    runner = ModelRunner(EngineConfig.resolve(EngineArgs(**args)), 0, 0, torch.device("cpu"))
    before = private_bytes()
    samples = [before]
    loaded = threading.Event()

    def watch() -> None:
        while not loaded.is_set():
            samples.append(private_bytes())
            time.sleep(0.0005)

    watcher = threading.Thread(target=watch)
    watcher.start()
    runner.load()
    loaded.set()
    watcher.join()
    return private_bytes() - before, max(samples) - before


def in_a_process_of_its_own(args: dict[str, Any]) -> tuple[int, int]:
    """A fork has everything imported, and nothing of what the cases before have left."""
    reading, writing = os.pipe()
    if not (child := os.fork()):
        os.write(writing, json.dumps(growth(args)).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as answer:
        text = answer.read()
    os.waitpid(child, 0)
    end, peak = json.loads(text)
    return end, peak


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps([in_a_process_of_its_own(json.loads(case)) for case in sys.argv[1:]]))
