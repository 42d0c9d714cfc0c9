import ast
import contextlib
import importlib
import importlib.util
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import engram

ROOT = Path(__file__).parents[1]


def test_every_public_name_loads_and_is_listed():
    assert engram.__all__ == sorted(engram.__all__)
    for name in engram.__all__:
        assert getattr(engram, name) is not None
    assert dir(engram) == engram.__all__
    with pytest.raises(AttributeError, match="no attribute 'nope'"):
        engram.nope  # noqa: B018


@pytest.mark.parametrize("module", [m.name for m in pkgutil.walk_packages(engram.__path__, "engram.")])
def test_every_module_lists_what_it_has(module):
    if module.rpartition(".")[2].startswith("triton_"):  # the modules that need Triton, and are imported where it is only
        pytest.importorskip("triton", reason="Triton is not installed")
    loaded = importlib.import_module(module)
    names = getattr(loaded, "__all__", [])
    assert len(names) == len(set(names))
    for name in names:
        assert hasattr(loaded, name), f"{module}.__all__ names {name}"


FOREIGN = {"_buffers", "_context", "_indices", "_replace"}
"""Private names that others' classes have too: of torch, filelock and named tuples, where there are no public ones."""


def _names_listed(module):
    return getattr(importlib.import_module(module), "__all__", None)


def _private_names_set(tree):
    """What a file's own classes and functions call theirs."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and isinstance(node.value, ast.Name):
            names |= {node.attr} if node.value.id in ("self", "cls") else set()
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return {name for name in names if name.startswith("_") and not name.startswith("__")}


def test_modules_take_from_each_other_what_is_listed():
    wrong = []
    for file in (ROOT / "src" / "engram").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if (
                not isinstance(node, ast.ImportFrom)
                or not (node.module or "").startswith("engram")
                or node.module == "engram._version"
            ):
                continue
            if node.module.rpartition(".")[2].startswith("triton_"):
                continue
            listed = _names_listed(node.module)
            for name in (alias.name for alias in node.names):
                is_module = importlib.util.find_spec(node.module).submodule_search_locations and importlib.util.find_spec(
                    f"{node.module}.{name}"
                )
                if not is_module and name not in (listed or ()):
                    wrong.append(f"{file.relative_to(ROOT)}:{node.lineno}: {node.module}.{name}")
    assert not wrong, "not in __all__"


def test_modules_leave_private_names_of_each_other_alone():
    trees = {file: ast.parse(file.read_text()) for file in (ROOT / "src" / "engram").rglob("*.py")}
    own = {file: _private_names_set(tree) for file, tree in trees.items()}
    of_somebody = set().union(*own.values()) - FOREIGN - set(dir(torch.nn.Module))
    wrong = [
        f"{file.relative_to(ROOT)}:{node.lineno}: {node.attr}"
        for file, tree in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr in of_somebody - own[file] and _is_of_another(node.value)
    ]
    assert not wrong, "private to another module"


def _is_of_another(value):
    """Whether what has a name is neither the object itself nor what it inherits."""
    inherited = isinstance(value, ast.Call) and isinstance(value.func, ast.Name) and value.func.id == "super"
    return not inherited and not (isinstance(value, ast.Name) and value.id in ("self", "cls"))


def test_public_things_are_documented():
    for name in engram.__all__:
        if name != "__version__":
            assert getattr(engram, name).__doc__, name


def test_the_tree_names_no_machine():
    pattern = re.compile(r"/(?:work|root|home/\w+)/|index[-]url")
    for file in [
        *ROOT.glob("*.md"),
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / "src").rglob("*.py"),
        *(ROOT / "results").glob("*.json"),
    ]:
        assert not pattern.search(file.read_text()), file


def test_the_architecture_has_a_line_for_every_package():
    table = (ROOT / "docs" / "architecture.md").read_text()
    packages = {module.name for module in pkgutil.iter_modules(engram.__path__)} - {"__main__", "_version", "testing"}
    assert not [name for name in packages if table.count(f"\n| `{name}` | ") != 1]


def test_an_unpacked_archive_can_be_tested():
    maker = pytest.importorskip("setuptools.command.egg_info", reason="setuptools is not installed")
    packed = maker.FileList()
    for line in (ROOT / "MANIFEST.in").read_text().splitlines():
        if line and not line.startswith("#"):
            with contextlib.chdir(ROOT):
                packed.process_template_line(line)
    wanted = {"CHANGELOG.md", "CONTRIBUTING.md", "Makefile", "constraints.txt"}
    for folder in ("benchmarks", "corpus", "docs", "examples", "recipes", "results", "tests"):
        files = (file for file in (ROOT / folder).rglob("*") if file.is_file() and file.suffix != ".pyc")
        wanted |= {str(file.relative_to(ROOT)) for file in files}
    assert wanted - set(packed.files) == set()


def test_what_needs_no_model_loads_no_transformers():
    modules = "engram.editing.merge, engram.models.place, engram.models.bundled_files, engram.cli.main"
    code = f"import sys, {modules}; print('transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_the_reference_has_every_public_name(tmp_path):  # by itself: it sets names that otherwise load on first use
    pytest.importorskip("pdoc", reason="pdoc is not installed")
    code = f"import api, pathlib; api.write(['engram', 'engram.models.bundled_files'], pathlib.Path({str(tmp_path)!r}))"
    subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", code], cwd=ROOT / "docs", check=True)
    page = (tmp_path / "engram.html").read_text()
    assert not [name for name in engram.__all__ if f'id="{name}"' not in page]
    written = [file.read_text() for file in tmp_path.rglob("*") if file.is_file()]
    assert not [text for text in written if str(ROOT) in text]  # as the default of a parameter, or the value of a constant
