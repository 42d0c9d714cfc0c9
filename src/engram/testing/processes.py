"""Several processes of one training run, as ``torchrun`` starts them, in which a test file runs scenarios of its own."""

from __future__ import annotations

import gc
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

__all__ = ["play_scenarios", "run_processes"]

_GRACE = 5.0


def run_processes(module: str, folder: Path, count: int = 2, timeout: float = 240) -> list[dict[str, Any]]:
    """Run ``python -m module folder`` in ``count`` processes that can find each other; what each has saved as ``folder/rank.pt``.

    Raises:
        AssertionError: a process failed; its output is in the message.
    """
    threads = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "WORLD_SIZE": str(count)}
    started = []
    for rank in range(count):
        environment = {**os.environ, **threads, **meeting, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        output = (folder / f"{rank}.txt").open("w")
        started.append(
            subprocess.Popen(
                [sys.executable, "-m", module, str(folder)], env=environment, stdout=output, stderr=subprocess.STDOUT
            )
        )
        output.close()
    try:
        _wait(started, timeout)
    finally:
        for process in started:
            process.kill()
            process.wait()
    codes = [process.returncode for process in started]
    said = "\n".join(
        f"process {rank}, rc {code}:\n{(folder / f'{rank}.txt').read_text()[-3000:]}" for rank, code in enumerate(codes)
    )
    assert not any(codes), said
    return [torch.load(folder / f"{rank}.pt") for rank in range(count)]


def _wait(started: list[subprocess.Popen[bytes]], timeout: float) -> None:
    """Until all are done; or, as the others of one that failed wait in vain, until a moment after the first failure."""
    end = time.monotonic() + timeout
    while any(process.poll() is None for process in started) and time.monotonic() < end:
        if any(process.poll() for process in started):
            end = min(end, time.monotonic() + _GRACE)
        time.sleep(0.05)


def play_scenarios(scenarios: Mapping[str, Callable[[Path], Any]], folder: Path) -> None:
    """In a process that ``run_processes`` started: run all in their order and save what they give back (tensors and plain values)."""
    gc.freeze()  # every training asks for a collection; what was imported need not be looked at each time
    results = {}
    for name, scenario in scenarios.items():
        (folder / name).mkdir(exist_ok=True)
        results[name] = scenario(folder / name)
    torch.save(results, folder / f"{os.environ['RANK']}.pt")


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
