"""Verify, then measure: all alternatives of a setting take turns, round after round, in one process."""

from __future__ import annotations

import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from engram import native
from engram._version import __version__
from engram.bench.registry import BENCHMARKS, Benchmark
from engram.bench.setting import Setting
from engram.errors import BenchError, ConfigError

__all__ = ["machine", "run_benchmark", "run_benchmarks", "take_turns"]

Report = Callable[[str, dict[str, Any]], None]
"""Called with the benchmark's name and each setting's result as it comes."""


def run_benchmarks(names: Iterable[str], rounds: int, quick: bool, report: Report | None = None) -> dict[str, Any]:
    """Measure several benchmarks; the result is JSON-ready and says on what machine it was made.

    Raises:
        ConfigError: a name is unknown.
        BenchError: results that should be equal are not; nothing is timed then.
    """
    names = list(names)
    unknown = [name for name in names if name not in BENCHMARKS]
    if unknown:
        raise ConfigError(f"benchmarks: got {', '.join(unknown)}, expected some of {', '.join(BENCHMARKS)}.")
    results = {name: run_benchmark(name, BENCHMARKS[name], rounds, quick, report) for name in names}
    return {**machine(), "rounds": rounds, "quick": quick, "benchmarks": results}


def run_benchmark(name: str, benchmark: Benchmark, rounds: int, quick: bool, report: Report | None = None) -> dict[str, Any]:
    """All settings of one benchmark, each verified before it is timed."""
    entries = []
    for setting in benchmark.settings(quick):
        wrong = setting.verify()
        if wrong is not None:
            raise BenchError(f"{name}, {setting.label}: {wrong}. No speed is reported of wrong results.")
        entry = _entry(setting, take_turns(setting, rounds))
        entries.append(entry)
        if report is not None:
            report(name, entry)
    described = {"title": benchmark.title, "unit": benchmark.unit, "size": benchmark.size, "notes": dict(benchmark.notes)}
    return {**described, "settings": entries}


def take_turns(setting: Setting, rounds: int) -> dict[str, list[float]]:
    """Seconds per call of each alternative, one value per round. The order is another one in every round, so that nobody always follows
    the same neighbour, whose work fills the caches; a first round is thrown away.
    """
    names, order = list(setting.calls), random.Random(0)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds + 1):
        for name in order.sample(names, len(names)):
            taken = _time(setting.calls[name], setting.before, setting.repeats)
            if number > 0:
                seconds[name].append(taken)
    return seconds


def _time(call: Callable[[], Any], before: Callable[[], None] | None, repeats: int) -> float:
    total = 0.0
    if before is None:
        started = time.perf_counter()
        for _ in range(repeats):
            call()
        return (time.perf_counter() - started) / repeats
    for _ in range(repeats):
        before()
        started = time.perf_counter()
        call()
        total += time.perf_counter() - started
    return total / repeats


def _entry(setting: Setting, seconds: Mapping[str, list[float]]) -> dict[str, Any]:
    variants = {}
    for name, times in seconds.items():
        ratios = [base / own for base, own in zip(seconds[setting.baseline], times)]
        variants[name] = {
            "seconds": _spread(times),
            "per_second": setting.amount / statistics.median(times),
            "speedup": _spread(ratios),
        }
    return {
        "label": setting.label,
        "size": setting.size,
        "amount": setting.amount,
        "baseline": setting.baseline,
        "variants": variants,
    }


def _spread(values: list[float]) -> dict[str, float]:
    """Median and quartiles: on a machine that others use too, the extremes say nothing."""
    if len(values) < 2:
        return {"median": values[0], "low": values[0], "high": values[0]}
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "low": low, "high": high}


def machine() -> dict[str, Any]:
    """Hardware and versions."""
    return {
        "hardware": f"{_cpu_name()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "instruction_set": native.instruction_set(),
        "versions": {"engram": __version__, "torch": torch.__version__, "python": platform.python_version()},
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
