"""What every benchmark records beside its figures."""

import json
import statistics
import sys
from pathlib import Path

import torch
import transformers

from engram import __version__
from engram.bench import machine

RESULTS = Path(__file__).parents[1] / "results"


def provenance(seed):
    return {
        "command": "python benchmarks/" + " ".join([Path(sys.argv[0]).name, *_arguments()]),
        "seed": seed,
        "hardware": machine()["hardware"],
        "versions": {"engram": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
    }


def _arguments():
    """As they were given, but for the place of somebody's environment."""
    before = [None, *sys.argv[1:]]
    return ["PYTHON" if flag == "--peer-python" else argument for flag, argument in zip(before, sys.argv[1:])]


def spread(values):
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "rounds": len(values)}


def write(path, result):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(result, indent=1) + "\n")
    print(f"written: {path}")
