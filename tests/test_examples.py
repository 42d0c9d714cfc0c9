import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import CONFIG_MAPPING

from tests.children import run_python

ROOT = Path(__file__).parents[1]
GUIDES = ROOT / "docs" / "guides.md"
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


SAYS = {
    "teach_facts": (r"loaded again: .*door.* 4711", "-> 'Graphics Processing Unit'"),
    "train_jointly": ("trainable",),
    "train_in_processes": ("321,238 rows, 10,279,616 bytes of them in each of 1 process", r"losses: 3\.\d+"),
    "train_plain_loop": ("lower: True", "from what was saved: True"),
    "train_with_lora": ("adapters ([0-9,]+) of \\1, base 0 of", "same logits: True"),
    "memory_with_lora": (r"both: \['4711'\]", r"LoRA alone: \[(?!'4711)", r"loaded again: \['4711'\]"),
    "facts_over_trained_memory": (
        r"both: \['4711', 'Paris'\]",
        "as before: True",
        r"alone: \[(?!'4711)",
        r"loaded again: \['4711'\]",
    ),
    "table_on_disk": (r"layer-2\.rows', 25601664", "same logits in every tier: True"),
    "route_prompts": (r"\['4737', 'Paris\.'\]", "bypassed is base: True - routed is not: True"),
}


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing:FutureWarning"
)  # peft's, about a name that transformers will change
@pytest.mark.parametrize("file", EXAMPLES, ids=lambda p: p.stem)
def test_every_example_runs(file, capsys):
    assert len(file.read_text().splitlines()) <= 60
    runpy.run_path(str(file), run_name="__main__")
    out = capsys.readouterr().out
    for words in SAYS[file.stem]:
        assert re.search(words, out), out


@pytest.mark.slow
def test_the_example_of_processes_has_the_same_losses_in_two_as_in_one():
    outputs = []
    for count in (1, 2):
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)] if count > 1 else []
        file = ROOT / "examples" / "train_in_processes.py"
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run([sys.executable, *launcher, file], env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        outputs.append(done.stdout)
    losses = [re.findall(r"losses: (.*)", out) for out in outputs]
    assert losses[0] == losses[1]
    assert "5,139,808 bytes of them in each of 2 processes" in outputs[1]


@pytest.mark.slow
def test_the_readmes_example_runs_and_comes_early(tmp_path):
    readme = (ROOT / "README.md").read_text()
    block = re.search(r"```python\n(.*?)```", readme, re.DOTALL)
    assert block
    assert readme[: block.start()].count("\n") < 60
    done = subprocess.run([sys.executable, "-c", block[1]], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Graphics Processing Unit" in done.stdout
    assert (tmp_path / "my-memory" / "engram.json").is_file()


@pytest.mark.slow
def test_the_guides_training_runs(tmp_path):
    (block,) = (part for part in re.findall(r"```python\n(.*?)```", GUIDES.read_text(), re.DOTALL) if "EngramTrainer(" in part)
    (tmp_path / "texts").mkdir()
    for name in "ab":
        (tmp_path / "texts" / f"{name}.txt").write_text(f"The office of {name} is in Berlin. " * 20)
    code = block.replace("max_steps=100", "max_steps=2")
    done = run_python("-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "train_loss" in done.stdout
    assert (tmp_path / "my-memory" / "engram.json").is_file()


@pytest.mark.slow
def test_the_guides_own_parts_run(tmp_path):
    section = GUIDES.read_text().partition("## Your own loop, layer, hash and architecture")[2]
    code = "\n".join(re.findall(r"```python\n(.*?)```", section, re.DOTALL))
    done = run_python("-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "decoded as in one pass: True" in done.stdout
    saved = {"runs/theirs/memory", "own-gate", "own-hash"}
    assert all((tmp_path / name / "engram.json").is_file() for name in saved)


def test_the_readmes_tables_are_those_of_the_results():
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "readme_tables.py", "--check"], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


BENCHMARKS = [
    "train_step",
    "joint_training",
    "decode",
    "gpu",
    "formats",
    "throughput",
    "long_context",
    "copying",
    "looks",
    "memory_off",
    "larger_models",
    *(["own_tables"] if "qwen4_exp_text" in CONFIG_MAPPING else []),
]
ALL_OF_THEM = """
import json, runpy, sys, traceback
folder, out, *names = sys.argv[1:]
sys.path.insert(0, folder)
failed = {}
for name in names:
    sys.argv = [f"{folder}/{name}.py", "--quick", "--out", f"{out}/{name}.json"]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except BaseException:
        failed[name] = traceback.format_exc()
    with open(f"{out}/failed.json", "w") as file:
        json.dump(failed, file)
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Where all of them wrote, one after the other in one process: each by itself would load the libraries again."""
    out = tmp_path_factory.mktemp("results")
    done = run_python("-c", ALL_OF_THEM, ROOT / "benchmarks", out, *BENCHMARKS)
    assert done.returncode == 0, done.stderr
    return out


@pytest.mark.slow
@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_benchmark_runs(results, name):
    assert json.loads((results / "failed.json").read_text()).get(name) is None
    assert (results / f"{name}.json").is_file()
