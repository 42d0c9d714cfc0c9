"""Floor 6: benchmarks that run on anybody's machine. No speed is reported of anything that is not first shown to be right."""

from engram.bench.registry import BENCHMARKS, Benchmark, Setting
from engram.bench.runner import machine, run_benchmark, run_benchmarks, take_turns

__all__ = ["BENCHMARKS", "Benchmark", "Setting", "machine", "run_benchmark", "run_benchmarks", "take_turns"]
