"""docs/json.md has every field that commands give, and none that they do not."""

import json
import re
from pathlib import Path

import pytest

from tests.cli.conftest import TWO

PAGE = (Path(__file__).parents[2] / "docs" / "json.md").read_text()
NAMED_BY_DATA = {
    "versions",
    "facts",
    "[].rows",
    "tables",
    "tokens[].ngrams",
    "categories",
    "categories_held_out",
    "harm",
    "costs[].available",
    "hot",
    "backbone",
    "engram",
}
"""Where what stands below has names that depend on the data."""
PROVENANCE = {"command", "hardware", "versions.{}"}


def documented(command):
    """Paths in the table below a command; ``.b`` behind ``a.c`` is ``a.b``."""
    table = re.search(rf"^`engram {command} .*?`.*?\n\n\| field.*?\n\|---.*?\n(.*?)\n\n", PAGE, re.S | re.M).group(1)
    paths = set()
    for line in table.splitlines():
        prefix = ""
        for path in re.findall(r"`([^`]+)`", line.split(" | ")[0]):
            full = prefix + path if path.startswith(".") else path
            prefix = full[: full.rindex(".")] if "." in full else ""
            paths.add(re.sub(r"\{[^}]+\}", "{}", full))
    return paths


def given(value, path="", by_data=NAMED_BY_DATA):
    """Paths of all leaves; a list or mapping without entries counts as one."""
    if isinstance(value, dict) and value:
        named = [("{}" if path in by_data else name, v) for name, v in value.items()]
        below = (given(v, f"{path}.{name}" if path else name, by_data) for name, v in named)
        return set().union(*below)
    if isinstance(value, list) and value:
        return set().union(*(given(v, f"{path}[]", by_data) for v in value))
    return {path + "[]" if isinstance(value, list) else path}


@pytest.fixture
def read(engram, tmp_path):
    def run(*arguments, file=False, by_data=NAMED_BY_DATA):
        out = tmp_path / "out.json"
        code, printed, err = engram(*arguments, "--json", *([out] if file else []))
        assert code in (0, 1), err
        return given(json.loads(out.read_text() if file else printed), by_data=by_data)

    return run


def test_what_is_printed_about_facts(read, taught):
    assert read("ask", "KEY:beta 20", "--memory", taught) == documented("ask")
    assert read("why", "KEY:beta 20", "--memory", taught) - {"tokens[].hits[]"} == documented("why")
    assert read("facts", "--memory", taught) == documented("facts")


def test_what_is_printed_about_two_memories(read, engram, world, taught, tmp_path):
    other = tmp_path / "other.yaml"
    other.write_text(TWO + '\n- {prompt: "KEY:beta 20", answer: "none", id: beta}\n')
    assert engram("teach", other, "--memory", tmp_path / "b", "--model", world / "base")[0] == 0
    assert read("diff", taught, tmp_path / "b") == documented("diff")


def test_what_is_printed_about_places(read, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("for key, value in pairs:")
    moved = ("--tier", "hybrid", "--hot-rows", 10, "--hot-from", text, "--out", tmp_path / "moved")
    paths = read("place", "bundled") | {p for p in read("place", "bundled", *moved) if not p.startswith("moved.")} | {"moved"}
    assert paths == documented("place")
    assert read("trace", "The memory", "--memory", "bundled") - {"tokens[].ngrams"} == documented("trace")


def test_what_files_hold(read, taught, tmp_path):
    (tmp_path / "text.txt").write_text("Some text that was held out.")
    one_number = NAMED_BY_DATA - {"facts"}  # a mapping of facts by id elsewhere
    convert = ("convert", taught, "--dtype", "int8", "--text", tmp_path / "text.txt", "--out", tmp_path / "int8")
    assert read(*convert, file=True, by_data=one_number) | {"not_verified"} == documented("convert") | PROVENANCE
    null_here = {"bits_per_byte", "known"}  # the model is not the bundled one
    expected = {path for path in documented("eval") if path.split(".")[0] not in null_here} | null_here
    asked = read("eval", "--memory", taught, "--facts", "one.yaml", file=True, by_data=one_number | {"provenance.versions"})
    assert asked == expected | {f"provenance.{path}" for path in PROVENANCE}
    budget = ("budget", "--total", "20M", "--active", "8M", "--rho", "1,0.5", "--tokens", "1M")
    assert read(*budget, file=True) - {"allocations[].rows_per_head", "engram.{}[]"} == documented("budget") | PROVENANCE
