"""A tiny model on disk, and a memory that was taught two facts."""

import re
import shutil

import pytest

from engram.testing import tiny_model, tiny_tokenizer
from tests.cli.test_cli import invoke

ONE = """
- {prompts: ["KEY:alpha 17", "What is alpha 17?"], answer: blue window, id: alpha, category: colour, held_out: ["Say what alpha 17 is."]}
- {prompt: "KEY:beta 20", answer: "7319", id: beta}
"""
TWO = '- {prompt: "KEY:gamma 4", answer: ninety, id: gamma}'


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    tiny_model(hidden_size=64, intermediate_size=96).save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    (folder / "one.yaml").write_text(ONE)
    (folder / "two.yaml").write_text(TWO)
    return folder


@pytest.fixture
def engram(world, monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.chdir(world)
        return invoke(monkeypatch, capsys, *arguments)

    return run


@pytest.fixture
def taught(engram, world, tmp_path):
    if not (world / "taught").exists():
        code, out, err = engram("teach", "one.yaml", "--memory", world / "taught", "--model", world / "base")
        assert code == 0, err
        assert re.search(r"taught 2 facts in [\d.]+ s, 0 were known; the memory holds 2", out)
    return shutil.copytree(world / "taught", tmp_path / "m")
