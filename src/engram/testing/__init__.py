"""Small real things for tests: a tokenizer, models of every architecture, tolerances. Imported by tests only."""

from engram.testing.processes import play_scenarios, run_processes
from engram.testing.tiny import TINY_CONFIGS, tiny_config, tiny_memory, tiny_model, tiny_tokenizer
from engram.testing.tolerances import EXACT_ENOUGH, HALF_ENOUGH, assert_close

__all__ = [
    "EXACT_ENOUGH",
    "HALF_ENOUGH",
    "TINY_CONFIGS",
    "assert_close",
    "play_scenarios",
    "run_processes",
    "tiny_config",
    "tiny_memory",
    "tiny_model",
    "tiny_tokenizer",
]
