"""Where documents come from: files of the user's, and what every machine with Python has."""

from __future__ import annotations

import ast
import glob
import hashlib
import os
import platform
import re
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.metadata import distributions
from pathlib import Path, PurePosixPath

from engram.data.html_text import html_to_text
from engram.data.recipe import CorpusRecipe, FolderSource, TextSource
from engram.data.records import RECORD_SUFFIXES, holds_records, read_records
from engram.errors import DataError

__all__ = [
    "DOCUMENT_SEPARATOR",
    "Document",
    "Source",
    "UnfitSource",
    "bucket",
    "installed_versions",
    "list_sources",
    "split_documents",
    "standard_library_sources",
    "text_sources",
]

DOCUMENT_SEPARATOR = "<|doc|>"
"""A line that holds just this separates documents inside a text file."""

_MIN_CHARACTERS = 40
_MAX_MEAN_LINE = 120  # longer on average: a generated table, not code; prose may have a paragraph on each line
_LONG_WORD = re.compile(r"[!-~]{100,}")  # of ASCII alone: not all languages put spaces between words
_DOCUMENTATION_SUFFIXES = (".rst", ".txt", ".md", ".html")
_PROSE_SUFFIXES = (*_DOCUMENTATION_SUFFIXES, ".htm", ".tex", ".org", "")
_RECORDS = " by records"
_ANOTHER_KEY = ", or name another key by 'field' in the recipe"
_OURSELVES = "engram-memory"  # a corpus must not change with every line of our own description


@dataclass(frozen=True)
class Document:
    """One text with a stable name."""

    name: str
    text: str
    weight: int = 1
    kind: str = "prose"
    is_record: bool = False
    """Whether it is one line of a file of many: those are held out one by one and not by file."""


class UnfitSource(Exception):  # not an error: a reason to go on without it
    """A source has nothing for a corpus; the message is the reason it is counted under."""


@dataclass(frozen=True)
class Source:
    """One file, or another text, from which documents are made. All of it goes to one side of the split, unless it holds records."""

    name: str
    load: Callable[[], bytes]
    """Its bytes. Raises: DataError where the user named it; UnfitSource otherwise."""
    parse: Callable[[str], Iterator[Document]]
    """Documents of its text. Raises: as ``load``."""
    required_path: str | None = None
    """Set where the user named it: text that is not UTF-8 is an error then."""
    read_as: str = ""
    """What tells a way of reading from that of earlier versions: the same bytes are other documents then."""

    def documents(self, content: bytes) -> Iterator[Document]:
        """Documents in ``content``.

        Raises:
            DataError: the user named this file and it cannot be used.
            UnfitSource: nothing to use in it.
        """
        try:
            text = content.decode("utf-8")
        except UnicodeDecodeError as error:
            if self.required_path is None:
                raise UnfitSource("not UTF-8") from None
            raise DataError(f"corpus: {self.required_path} is not UTF-8 (byte {error.start}); save it as UTF-8.") from None
        yield from self.parse(text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n"))


def list_sources(recipe: CorpusRecipe, folder: Path) -> Iterator[Source]:
    """All sources of a recipe, always in the same order: texts, folders, the standard library, documentation.

    Raises:
        DataError: a named file or folder is missing.
    """
    for text in recipe.texts:
        yield from text_sources(text, folder)
    for source in recipe.folders:
        yield from _folder_sources(source, folder)
    if recipe.standard_library:
        yield from standard_library_sources(recipe)
    if recipe.documentation:
        yield from _documentation_sources(recipe)


def bucket(name: str) -> int:
    """A stable number 0..99 for a name."""
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()[:4], "big") % 100


def split_documents(text: str) -> list[str]:
    """Documents of a text: what stands between lines that hold just ``DOCUMENT_SEPARATOR``; empty ones are left out."""
    parts = re.split(rf"^{re.escape(DOCUMENT_SEPARATOR)}$", text, flags=re.MULTILINE)
    return [part.strip("\n") for part in parts if part.strip()]


def text_sources(source: TextSource, folder: Path) -> Iterator[Source]:
    """The files that one entry of a recipe's ``texts`` names, sorted.

    Raises:
        DataError: there are none.
    """
    files = _matching(source.path, folder)
    if not files:
        raise DataError(f"corpus: no file matches {source.path!r} in {folder}; check the recipe's 'texts'.")
    if source.field != TextSource.field and not any(map(holds_records, files)):
        raise DataError(
            f"corpus: got field {source.field!r} for {files[0]}, expected a file whose name ends in {' or '.join(RECORD_SUFFIXES)}, with an "
            "object on each line; rename it, or leave 'field' out."
        )
    for file in files:
        name, load = Path(file).name, partial(_load_named, file)
        if holds_records(name):
            parse = partial(_records, file, name, source.field, "prose", source.weight, True)
            yield Source(name, load, parse, required_path=file, read_as=_RECORDS)
        else:
            yield Source(name, load, partial(_split_text, file, name, source.weight), required_path=file)


def _matching(pattern: str, folder: Path) -> list[str]:
    literal = str(folder / pattern)
    if os.path.isfile(literal):  # names may hold brackets and stars
        return [literal]
    found = sorted(str(folder / match) for match in glob.glob(pattern, root_dir=folder, recursive=True))
    return [path for path in found if os.path.isfile(path) or not os.path.exists(path)]  # reading a broken link is an error


def _load_named(file: str) -> bytes:
    try:
        return Path(file).read_bytes()
    except OSError as error:
        raise DataError(f"corpus: cannot read {file}: {error.strerror}.") from None


def _split_text(file: str, name: str, weight: int, text: str) -> Iterator[Document]:
    parts = split_documents(text)
    if not parts:
        raise DataError(f"corpus: {file} is empty.")
    for number, part in enumerate(parts):
        yield Document(f"{name}#{number}", part, weight)


def _records(file: str, name: str, field: str, kind: str, weight: int, is_required: bool, text: str) -> Iterator[Document]:
    """A document of every line; none of them is judged by its length or its lines, since somebody made it a record."""
    # '#' would be read as the end of a file's name; by its line a record is a file of its own.
    prefix, found = name.replace("#", "%23"), False
    for number, record in read_records(text, f"corpus: {file}", field, _ANOTHER_KEY):
        found = True
        yield Document(f"{prefix}:{number}", record, weight, kind, is_record=True)
    if not found:
        if is_required:
            raise DataError(f"corpus: {file} is empty.")
        raise UnfitSource("too short")


def _folder_sources(source: FolderSource, folder: Path) -> Iterator[Source]:
    root = Path(os.path.abspath(folder / source.path))
    if not root.is_dir():
        raise DataError(f"corpus: {root} is not a folder; check the recipe's 'folders'.")
    files, linked = _below(root, source.exclude)
    fitting = [file for file in files if file.name.endswith(source.suffixes)]
    if not fitting:
        raise DataError(f"corpus: no file in {root} ends in {', '.join(source.suffixes)}; check the recipe's 'folders'.")
    for file in fitting:
        relative = _relative(root, file)
        name, kind = f"{root.name}/{relative}", source.kind or _kind_of(PurePosixPath(relative))
        if holds_records(name):
            parse = partial(_records, str(file), name, source.field, source.kind or "prose", 1, False)
            yield Source(name, partial(_load_some, file), parse, read_as=_RECORDS)
        else:
            yield Source(name, partial(_load_some, file, source.max_bytes), partial(_whole_file, name, kind))
    for file in _one_of_each_suffix_first([file for file in files if not file.name.endswith(source.suffixes)]):
        yield Source(f"{root.name}/{_relative(root, file)}", partial(_unfit, "of another suffix"), _nothing)
    for link in linked:
        yield Source(f"{root.name}/{_relative(root, link)}", partial(_unfit, "a link to a folder"), _nothing)


def _relative(root: Path, file: Path) -> str:
    # '#' would be read as the end of a file's name (see ``split_of``); undecodable bytes of a name cannot be written.
    return file.relative_to(root).as_posix().replace("#", "%23").encode("utf-8", "replace").decode()


def _one_of_each_suffix_first(files: Iterable[Path]) -> list[Path]:
    """So that the first few names tell what kinds of files there are."""
    before: Counter[str] = Counter()
    ranked = []
    for file in files:
        ranked.append((before[file.suffix], file))
        before[file.suffix] += 1
    return [file for _, file in sorted(ranked, key=lambda entry: entry[0])]


def _unfit(reason: str) -> bytes:
    raise UnfitSource(reason)


def _nothing(text: str) -> Iterator[Document]:
    yield from ()


def _below(root: Path, exclude: tuple[str, ...]) -> tuple[list[Path], list[Path]]:
    """Files in all folders below, and links to folders, which are not followed: they may lead in circles."""

    def wanted(name: str) -> bool:
        return not name.startswith(".") and name not in exclude

    def place(file: Path) -> str:
        return file.relative_to(root).as_posix()

    found, links = [], []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if wanted(name)]
        links += [link for name in folders if (link := Path(folder, name)).is_symlink()]
        found += [Path(folder, name) for name in files if wanted(name)]
    return sorted(found, key=place), sorted(links, key=place)


def _load_some(file: Path, max_bytes: int | None = None) -> bytes:
    """A file that nobody named: left out where it cannot be read (broken links, pipes, no permission)."""
    try:
        if not file.is_file():
            raise UnfitSource("not a file")
        if max_bytes is not None and file.stat().st_size > max_bytes:
            raise UnfitSource("too large")
        return file.read_bytes()
    except OSError:
        raise UnfitSource("unreadable") from None


def _kind_of(relative: PurePosixPath) -> str:
    if relative.suffix.lower() in _PROSE_SUFFIXES:
        return "prose"
    return "test" if {"test", "tests"} & set(relative.parts) or re.match(r"test_|.*_test\.", relative.name) else "code"


def _whole_file(name: str, kind: str, text: str) -> Iterator[Document]:
    is_page = name.lower().endswith((".html", ".htm"))
    if is_page:
        text = html_to_text(text)
    _check(text, is_prose=is_page or kind in ("prose", "documentation"))
    yield Document(name, text, kind=kind)


def _check(text: str, is_prose: bool) -> None:
    if len(text) < _MIN_CHARACTERS:
        raise UnfitSource("too short")
    if len(text) / (text.count("\n") + 1) > _MAX_MEAN_LINE and not (is_prose and _reads_as_words(text)):
        raise UnfitSource("long lines")


def _reads_as_words(text: str) -> bool:
    """Whether at least half of a text is letters of words, in any language; data of a file or a table of numbers is not."""
    return 2 * sum(map(str.isalpha, _LONG_WORD.sub("", text))) >= len(text)


def standard_library_sources(recipe: CorpusRecipe, wanted: Callable[[str], bool] = lambda name: True) -> Iterator[Source]:
    """Source files of the running Python's standard library in which ``wanted`` sees a fitting name, and `pydoc` topics."""
    for file, parts in _standard_library_files(recipe, (".py",)):
        name = "stdlib/" + "/".join(parts)
        if not wanted(name):
            continue
        is_test = any(part in ("test", "tests") for part in parts)
        if is_test and bucket("test share " + name) >= recipe.test_percent:
            continue
        yield Source(name, partial(_load_some, file), partial(_python_file, name, is_test))
    yield from (source for source in _topic_sources() if wanted(source.name))


def _standard_library_files(recipe: CorpusRecipe, suffixes: tuple[str, ...]) -> Iterator[tuple[Path, tuple[str, ...]]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for file in sorted(file for file in root.rglob("*") if file.suffix in suffixes):
        parts = file.relative_to(root).parts
        if not any(part in recipe.exclude_parts for part in parts):
            yield file, parts


def _python_file(name: str, is_test: bool, text: str) -> Iterator[Document]:
    _check(text, is_prose=False)
    yield Document(name, text, kind="test" if is_test else "code")
    if not is_test:
        yield from _docstrings(name, text)


def _docstrings(name: str, source: str) -> Iterator[Document]:
    """Module and class docstrings as prose of their own."""
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return
    for number, node in enumerate(ast.walk(tree)):
        if isinstance(node, (ast.Module, ast.ClassDef)):
            text = ast.get_docstring(node)
            if text and len(text) >= 4 * _MIN_CHARACTERS:
                yield Document(f"{name}#doc{number}", text, kind="documentation")


def _topic_sources() -> Iterator[Source]:
    from pydoc_data.topics import topics

    for topic, text in sorted(topics.items()):
        yield Source(f"topics/{topic}", text.encode, partial(_as_it_is, f"topics/{topic}"))


def _as_it_is(name: str, text: str) -> Iterator[Document]:
    yield Document(name, text, kind="documentation")


def _documentation_sources(recipe: CorpusRecipe) -> Iterator[Source]:
    if not recipe.standard_library:
        yield from _topic_sources()
    for file, parts in _standard_library_files(recipe, _DOCUMENTATION_SUFFIXES):
        if not {"test", "tests"} & set(parts):  # data of tests, some of it broken on purpose
            name = "stdlib/" + "/".join(parts)
            yield Source(name, partial(_load_some, file), partial(_whole_file, name, "documentation"))
    for name, (_, text) in sorted(_described().items()):
        name = f"distributions/{name}"
        yield Source(name, text.encode, partial(_whole_file, name, "documentation"))


def installed_versions(recipe: CorpusRecipe) -> dict[str, str]:
    """Versions of what a recipe reads from the Python installation, by name: what has to be installed to read the same text again."""
    versions: dict[str, str] = {}
    if recipe.standard_library or recipe.documentation:
        versions["python"] = platform.python_version()
    if recipe.documentation:
        versions |= {name: version for name, (version, _) in sorted(_described().items())}
    return versions


def _described() -> dict[str, tuple[str, str]]:
    """Version of installed distributions and what they say about themselves, by canonical name (PEP 503); the first on the path counts."""
    found: dict[str, tuple[str, str]] = {}
    for distribution in distributions():
        fields = distribution.metadata.json if distribution.metadata else {}
        name = re.sub(r"[-_.]+", "-", str(fields.get("name", ""))).lower()
        text = fields.get("description")
        if name and name != _OURSELVES and isinstance(text, str):
            found.setdefault(name, (distribution.version, text.encode("utf-8", "replace").decode()))
    return found
