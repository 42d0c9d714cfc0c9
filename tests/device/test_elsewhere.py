"""A model on a device that is not the CPU: teaching, asking, placing, looking and generating do what they do on the CPU.

There is no GPU here, so a device of our own stands for one (``pretend.py``): it refuses what a real one refuses.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from engram.analysis import ANALYSES
from tests.device.walk import FACTS, PLACES

pytestmark = pytest.mark.skipif(
    not hasattr(torch.utils.backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this PyTorch cannot have a device in Python",
)
ROOT = Path(__file__).parents[2]
PROMPTS = sum(len(fact.prompts) for fact in FACTS)
TAUGHT = {
    "teach": {},
    "check": PROMPTS,
    "ask": [FACTS[0].answer],
    "route": [[fact.answer for fact in FACTS[:2]]] * 2,
    "why": [FACTS[0].id],
    "trace": 1,
    "drift": 0.0,
    "evaluate": 1.0,
    "save": None,
    "load": len(FACTS),
    "command line": FACTS[0].answer + "\n",
    "forget": [FACTS[0].id],
    "teach again": {},
}


@pytest.fixture(scope="module")
def walked():
    """What a process of its own found."""
    run = subprocess.run(
        [sys.executable, "-m", "tests.device.walk"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout)


def result(walked, name):
    found = walked["steps"][name]
    assert not (isinstance(found, dict) and "failed" in found), found["failed"]
    return found


@pytest.mark.parametrize("name", TAUGHT)
def test_a_taught_memory(walked, name):
    assert result(walked, name) == TAUGHT[name]


@pytest.mark.parametrize(("tier", "dtype"), PLACES)
def test_a_trained_memory(walked, tier, dtype):
    difference, said = result(walked, f"{tier} {dtype}")
    assert difference < (0.2 if dtype == "float8" else 1e-4)
    assert said == ["The capital of France is Paris."] * 2


@pytest.mark.parametrize("name", [*(f"look {name}" for name in ANALYSES), "recall"])
def test_looking(walked, name):
    assert result(walked, name)


def test_a_memory_on_two_devices_knows_who_it_is(walked):
    assert result(walked, "identity on two devices")


@pytest.mark.parametrize("name", ["add", "index", "numpy"])
def test_the_device_refuses_what_a_real_one_refuses(walked, name):
    assert "pretend" in walked["refused"][name]
