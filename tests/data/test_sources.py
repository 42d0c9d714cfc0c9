import json
import platform
from pathlib import Path

import numpy as np
import pytest

import engram
from engram import ConfigError, DataError
from engram.data.corpus import CorpusRecipe, DocumentStream, FolderSource, TextSource, build_corpus, split_of
from engram.data.html_text import html_to_text
from engram.data.near_duplicates import NearDuplicates, estimated_overlap, signature
from engram.data.recipe import KINDS, parse_corpus, read_corpus_recipe
from engram.data.sources import installed_versions
from engram.data.texts import load_documents

ROOT = Path(__file__).parents[2]
LINES = "A line of text that is long enough.\nAnother line of it.\n"


@pytest.fixture
def mixed(tmp_path):
    """A folder as users have them: code, tests, prose, pages, and what should not be read."""
    root = tmp_path / "project"
    for name, content in {
        "main.py": f'"""{LINES}"""\n',
        "tests/test_main.py": f"# {LINES}",
        "readme.md": f"# Read me\n{LINES}",
        "docs/c#/page.html": f"<html><head><title>no</title></head><body><h1>Title</h1><p>{LINES}</p></body></html>",
        "copy.md": f"# Read me\n{LINES}",
        "short.txt": "short",
        "wide.txt": "x" * 500,
        "large.txt": LINES * 100,
        "latin.txt": LINES.encode() + b"\xe9",
        ".git/config.txt": LINES,
        "node_modules/a.txt": LINES,
        "picture.png": b"\x89PNG",
    }.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    (root / "lost.txt").symlink_to("nowhere")
    return root


def test_a_folder_is_read_by_suffix_and_what_is_left_out_is_counted(mixed):
    recipe = CorpusRecipe(folders=(FolderSource("project", max_bytes=2000),), held_out_percent=0)
    stream = DocumentStream(recipe, mixed.parent)
    documents = list(stream)
    assert {doc.name: doc.kind for doc in documents} == {
        "project/copy.md": "prose",
        "project/docs/c%23/page.html": "prose",
        "project/main.py": "code",
        "project/tests/test_main.py": "test",
    }  # readme.md says the same as copy.md
    assert [doc.name for doc in documents] == sorted(doc.name for doc in documents)
    assert stream.duplicates == 1
    reasons = {
        "too short": "short.txt",
        "long lines": "wide.txt",
        "too large": "large.txt",
        "not UTF-8": "latin.txt",
        "not a file": "lost.txt",
        "of another suffix": "picture.png",
    }
    assert stream.skipped == dict.fromkeys(reasons, 1)
    assert stream.skipped_names == {reason: [f"project/{name}"] for reason, name in reasons.items()}
    assert documents == list(stream)
    assert stream.digest() == stream.read
    first = stream.read
    (mixed / "readme.md").write_text(LINES)
    assert stream.digest().sha256 != first.sha256
    only = FolderSource("project", suffixes=(".md",), kind="documentation")
    assert {doc.kind for doc in DocumentStream(CorpusRecipe(folders=(only,)), mixed.parent)} == {"documentation"}


def test_a_page_reads_like_text():
    page = "<head><style>p {}</style></head><p>One &amp; <b>two</b>\n three</p><script>x()</script><pre>a\n  b</pre><ul><li>i<li>j</ul>"
    assert html_to_text(page) == "One & two three\n\na\n  b\n\ni\nj"
    assert html_to_text("plain < text") == "plain < text"


@pytest.mark.parametrize(
    "page",
    [
        "<html><head><title>T</title><body><p>Hello <b>world</b></p></body></html>",
        "<!doctype html><head><meta charset=utf-8><title>T</title><p>Hello <b>world</b>",
        "<head>\n<title>T</title>\n<noscript><img></noscript>\n<style>p {}</style>\nHello world",
        "<!doctype html><title>T</title><p>Hello world",
        "<head><title>T<body>Hello world",
        "<head><noscript><style>p {}</style></head><div>Hello world</div>",
    ],
)
def test_a_head_may_be_left_open(page):
    assert html_to_text(page) == "Hello world"


PARAGRAPH = "The river ran past the mill, and nobody in the village counted its stones any more. " * 4
CHINESE = "\u6cb3\u6d41\u8fc7\u78e8\u574a\uff0c\u6751\u91cc\u6ca1\u6709\u4eba\u518d\u6570\u77f3\u5934\u4e86\u3002" * 20


@pytest.mark.parametrize(
    ("name", "content", "is_kept"),
    [
        ("soft_wrapped.md", "# Title\n" + f"\n{PARAGRAPH}\n" * 6, True),
        ("article.html", f"<p>{PARAGRAPH}</p>" * 6, True),
        ("no_spaces.txt", CHINESE, True),
        ("a_link.md", f"{PARAGRAPH * 2} https://example.org/{'a' * 300}", True),
        ("picture.md", f"{PARAGRAPH} data:image/png;base64,{'a' * 3000}", False),
        ("numbers.txt", "1.25 3.5 0.75 2.5 " * 40, False),
        ("code.py", f"x = '{PARAGRAPH}'\n", False),
    ],
)
def test_prose_may_have_long_lines(tmp_path, name, content, is_kept):
    (tmp_path / name).write_text(content, encoding="utf-8")
    stream = DocumentStream(CorpusRecipe(folders=(FolderSource("."),)), tmp_path)
    assert [Path(doc.name).name for doc in stream] == [name] * is_kept
    assert stream.skipped == ({} if is_kept else {"long lines": 1})


def test_patterns_match_files_whatever_their_names_and_folders_are_called(tmp_path):
    folder = tmp_path / "draft [1] *?"
    (folder / "sub" / "deeper").mkdir(parents=True)
    for name in ("a.txt", "b[1].txt", "sub/c.txt", "sub/deeper/d.txt"):
        (folder / name).write_text(f"text of {name}")

    def matched(pattern):
        return [doc.name for doc in DocumentStream(CorpusRecipe(texts=(TextSource(pattern),)), folder)]

    assert matched("*.txt") == ["a.txt#0", "b[1].txt#0"]
    assert matched("b[1].txt") == ["b[1].txt#0"]  # as a pattern it means b1.txt
    assert matched("sub/**") == ["c.txt#0", "d.txt#0"]  # folders match too
    assert matched(str(folder / "a.txt")) == ["a.txt#0"]
    (folder / "broken.txt").symlink_to("nowhere")
    with pytest.raises(DataError, match=r"cannot read .*broken\.txt"):
        matched("*.txt")


def test_separators_are_lines_and_byte_order_marks_no_text(tmp_path):
    contents = {
        "a.txt": "a\n<|doc|>\n<|doc|>\nb\n<|doc|> no line\n",
        "b.txt": "\ufeff<|doc|>\nc\n\n<|doc|>",
        "c.txt": "\ufeffa",
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content.encode().replace(b"\n", b"\r\n"))
    stream = DocumentStream(CorpusRecipe(texts=(TextSource("*.txt"),)), tmp_path)
    documents = {"a.txt#0": "a", "a.txt#1": "b\n<|doc|> no line", "b.txt#0": "c"}
    assert {doc.name: doc.text for doc in stream} == documents
    assert stream.duplicates == 1
    assert load_documents(tmp_path / "a.txt") == {"a": ["a", "b\n<|doc|> no line"]}
    assert load_documents(tmp_path / "b.txt") == {"b": ["c"]}


def test_a_lone_carriage_return_ends_a_line(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"a\rb\r\r<|doc|>\rc\r")
    stream = DocumentStream(CorpusRecipe(texts=(TextSource("*.txt"),)), tmp_path)
    assert [doc.text for doc in stream] == ["a\nb", "c"]


def test_documentation_is_what_the_installation_says_about_itself():
    documents = list(DocumentStream(CorpusRecipe(documentation=True), ROOT))
    assert {doc.kind for doc in documents} == {"documentation"}
    names = {doc.name for doc in documents}
    assert {"topics/with", "distributions/numpy"} <= names
    assert "distributions/engram-memory" not in names
    assert not any("/test/" in name or "site-packages" in name for name in names)
    assert len(names) == len(documents)


def test_what_is_read_of_the_installation_has_versions():
    assert installed_versions(CorpusRecipe(texts=(TextSource("a.txt"),))) == {}
    assert installed_versions(CorpusRecipe(standard_library=True)) == {"python": platform.python_version()}
    versions = installed_versions(CorpusRecipe(documentation=True))
    assert versions["numpy"] == np.__version__
    assert versions["python"] == platform.python_version()
    assert "engram-memory" not in versions


def test_near_duplicates_leave_the_first(tmp_path):
    rng = np.random.default_rng(0)
    words = [f"w{n}" for n in rng.integers(0, 5000, size=400)]

    def changed(share):
        return " ".join("new" if rng.random() < share else word for word in words)

    def overlap(one, other):
        grams = [{tuple(text.split()[i : i + 5]) for i in range(len(text.split()) - 4)} for text in (one, other)]
        return len(grams[0] & grams[1]) / len(grams[0] | grams[1])

    text = " ".join(words)
    for share in (0.0, 0.002, 0.01, 0.03, 0.1, 0.5):
        other = changed(share)
        assert abs(estimated_overlap(signature(text), signature(other)) - overlap(text, other)) < 0.13
        similar = NearDuplicates(0.8)
        assert similar.add_if_new(text)
        exact = overlap(text, other)
        assert exact < 0.7 or exact > 0.86, "too near the threshold to be sure"
        assert similar.add_if_new(other) == (exact < 0.8)
    for name, content in {"a": text, "b": text.upper().replace(" ", "  "), "c": "few words", "d": "few other", "e": ""}.items():
        (tmp_path / f"{name}.txt").write_text(f"{content}\n" if content else "few  words\n")
    one_by_one = tuple(TextSource(f"{name}.txt") for name in "abcde")
    stream = DocumentStream(CorpusRecipe(texts=one_by_one, near_duplicates=1.0), tmp_path)
    assert [doc.name for doc in stream] == ["a.txt#0", "c.txt#0", "d.txt#0"]
    assert (stream.duplicates, stream.near_duplicates) == (0, 2)
    by_heart = tuple(TextSource(f"{name}.txt", weight=2) for name in "abcde")
    assert len(list(DocumentStream(CorpusRecipe(texts=by_heart, near_duplicates=1.0), tmp_path))) == 5


def test_streaming_and_building_agree(mixed):
    recipe = CorpusRecipe(texts=(TextSource("project/*.md"),), folders=(FolderSource("project"),), held_out_percent=50)
    corpus = build_corpus(recipe, mixed.parent)
    documents = list(DocumentStream(recipe, mixed.parent))
    assert [doc for doc in documents if split_of(doc, recipe) == "train"] == corpus.train
    assert [doc for doc in documents if split_of(doc, recipe) == "held_out"] == corpus.held_out
    assert corpus.train
    assert corpus.held_out


# Those of sweeps and of single runs are read in tests/experiments: their corpus may stand in another recipe.
_WITH_CORPUS = [p for p in sorted((ROOT / "recipes").glob("*.yaml")) if not p.name.startswith(("sweep_", "train_"))]


@pytest.mark.parametrize("file", _WITH_CORPUS, ids=lambda p: p.name)
def test_every_recipe_has_a_corpus(file):
    recipe = read_corpus_recipe(file)
    assert parse_corpus(json.loads(json.dumps(recipe.to_dict())), "again") == recipe


@pytest.mark.parametrize("half", ["first", "second"])
def test_the_recipe_of_the_bundled_model_means_what_it_meant(half):
    training = json.loads((Path(engram.__file__).parent / "bundled" / "base_model" / "training.json").read_text())
    saved = training["went_on_from"]["recipe"]["corpus"] if half == "first" else training["recipe"]["data"]["corpus"]
    recipe = parse_corpus(saved, "training.json")
    assert recipe.to_dict() == {**recipe.to_dict(), **saved}
    assert set(recipe.to_dict()) == set(saved)


def test_the_corpus_of_the_experiments_has_all_tests_and_documentation():
    recipe = read_corpus_recipe(ROOT / "recipes" / "corpus_python.yaml")
    assert (recipe.standard_library, recipe.test_percent, recipe.documentation) == (True, 100, True)
    assert "site-packages" in recipe.exclude_parts


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"folders": ["a"], "texts": "b"}, "texts: got 'b'"),
        ({"folders": [{"suffixes": [".md"]}]}, "path"),
        ({"folders": [{"path": "a", "suffixes": ".md"}]}, "suffixes: got '.md'"),
        ({"folders": [{"path": "a", "suffixes": []}]}, "suffixes: got none"),
        ({"folders": [{"path": "a", "max_bytes": 0}]}, "max_bytes: got 0"),
        ({"folders": [{"path": "a", "kind": "poem"}]}, "kind: got 'poem', expected one of " + KINDS[0]),
        ({"texts": [{"path": "a", "weight": 0}]}, "weight: got 0"),
        ({"texts": [{"path": "a.jsonl", "field": 3}]}, "TextSource.field: got 3"),
        ({"folders": [{"path": "a", "suffixes": [".jsonl"], "field": ""}]}, "FolderSource.field: got ''"),
        (
            {"folders": [{"path": "a", "field": "content"}]},
            "FolderSource.field: got 'content', expected none unless suffixes name .jsonl",
        ),
        ({"standard_library": True, "near_duplicates": 1.5}, "near_duplicates: got 1.5"),
        ({"standard_library": True, "near_duplicates": True}, "near_duplicates"),
        ({"documentation": "yes"}, "documentation: got 'yes'"),
        ({"standard_library": True, "exclude_parts": "a"}, "exclude_parts"),
        ({1: 2}, "unknown key"),
    ],
)
def test_bad_fields(fields, message):
    with pytest.raises(ConfigError, match=message):
        parse_corpus(fields, "recipe")


def test_files_of_another_suffix_are_named_one_of_each_first(tmp_path):
    for name in ("a.png", "b.png", "c.png", "d.png", "e.png", "f.png", "z.jsonl", "text.txt"):
        (tmp_path / name).write_text(LINES)
    stream = DocumentStream(CorpusRecipe(folders=(FolderSource("."),)), tmp_path)
    assert len(list(stream)) == 1
    assert stream.skipped == {"of another suffix": 7}
    named = [Path(name).name for name in stream.skipped_names["of another suffix"]]
    assert named == ["a.png", "z.jsonl", "b.png", "c.png", "d.png"]


def test_the_corpus_of_a_run_and_of_a_sweep_is_found_in_its_recipe(tmp_path):
    corpus = {"texts": ["a.txt"]}
    expected = parse_corpus(corpus, "here")
    (tmp_path / "other.yaml").write_text(json.dumps({"corpus": corpus}))
    for fields in (
        {"data": {"corpus": corpus}},
        {"base": {"data": {"corpus": corpus}}},
        {"base": {"data": {"corpus": "other.yaml"}}},
    ):
        (tmp_path / "recipe.yaml").write_text(json.dumps(fields))
        assert read_corpus_recipe(tmp_path / "recipe.yaml") == expected
    for fields in ({}, {"data": {"corpus": "../other.yaml"}}, {"data": [1]}):
        (tmp_path / "recipe.yaml").write_text(json.dumps(fields))
        with pytest.raises(ConfigError, match="expected a mapping with a 'corpus' mapping"):
            read_corpus_recipe(tmp_path / "recipe.yaml")


def test_missing_folders(tmp_path):
    with pytest.raises(DataError, match="is not a folder"):
        list(DocumentStream(CorpusRecipe(folders=(FolderSource("none"),)), tmp_path))
    with pytest.raises(DataError, match=r"ends in \.txt"):
        list(DocumentStream(CorpusRecipe(folders=(FolderSource(".", suffixes=(".txt",)),)), tmp_path))
