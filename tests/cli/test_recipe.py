"""Recipes to start from: what `engram recipe` writes is read by the commands that it names, from wherever it lies."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from engram.config import EngramConfig, common_layers
from engram.data.sources import list_sources
from engram.experiments import read_point, read_sweep
from engram.experiments.starter import STARTER_KINDS, STARTERS, OwnText, memory_for, rows_in_words, starter_text
from engram.models import find_decoder
from engram.models.bundled import load_without_weights
from engram.testing import tiny_model, tiny_tokenizer
from engram.testing.tiny import TINY_CONFIGS
from tests.cli.test_cli import invoke
from tests.cli.test_own_text import sentence

ROOT = Path(__file__).parents[2]
SMALL = ("tokens=512", "batch_size=4", "data.seq_len=32", "bf16=false", "engram.engram_vocab_size=100")
SMALL_TEXT = ("data.corpus.held_out_percent=30", "data.held_out_tokens=4000")
SMALL_MODEL = ("data.vocab_size=300", "backbone.hidden_size=32", "backbone.intermediate_size=32")


def changes(*fields):
    return [option for change in fields for option in ("--set", change)]


@pytest.fixture
def here(monkeypatch, tmp_path):
    """The current folder, with a folder of notes and two files of stories."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes").mkdir()
    for number in range(40):
        (tmp_path / "notes" / f"note{number:02}.md").write_text(f"# Note {number}\n\n{sentence(number)}\n")
    (tmp_path / "more").mkdir()
    for number in range(2):
        (tmp_path / "more" / f"story{number}.txt").write_text(sentence(100 + number))
    return tmp_path


@pytest.fixture
def engram(monkeypatch, capsys):
    return lambda *arguments: invoke(monkeypatch, capsys, *arguments)


@pytest.fixture
def tiny(tmp_path):
    tiny_model().save_pretrained(tmp_path / "tiny")
    tiny_tokenizer().save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


def corpus_of(text):
    fields = yaml.safe_load(text)
    return fields.get("base", fields)["data"]["corpus"]


def files_of(recipe):
    """The files that a written recipe reads, by their own names."""
    read = read_point(recipe)
    return sorted(source.name for source in list_sources(read.data.corpus, recipe.parent))


def test_every_starter_is_a_recipe_by_itself_and_is_packed():
    read = {"train": read_point, "train_model": read_point, "sweep": read_sweep}
    assert {file.stem for file in STARTERS.iterdir()} == set(read)
    for name, reader in read.items():
        recipe = reader(STARTERS / f"{name}.yaml")
        data = recipe.data if name != "sweep" else recipe.recipe_of(next(recipe.combinations()), 0).data
        assert data.held_out_by == "file"  # measured on many files
        assert data.held_out_tokens >= 65536
        assert max(map(len, (STARTERS / f"{name}.yaml").read_text().splitlines())) <= 144
    packed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["engram"]
    assert "experiments/starters/*.yaml" in packed


def test_starters_say_how_much_their_rows_are():
    for name in ("train", "train_model"):
        memory = read_point(STARTERS / f"{name}.yaml").engram
        assert f"All rows together: {rows_in_words(memory)};" in (STARTERS / f"{name}.yaml").read_text()
    memory = EngramConfig(engram_vocab_size=[10_000, 1_000], n_embed_per_ngram=64, n_head_per_ngram=4, layer_ids=[1])
    assert rows_in_words(memory) == "44,000 of 16 numbers, 704,000 parameters, 3 MB"


def test_the_starter_for_the_bundled_model_is_what_is_filled_in_for_it():
    assert starter_text("train", model="bundled") == (STARTERS / "train_model.yaml").read_text()


def test_a_recipe_for_ones_own_text_runs(here, engram):
    code, out, err = engram("recipe", "train", "--texts", "notes", "--texts", "more/*.txt", "--out", "mine.yaml")
    assert (code, err) == (0, "")
    assert out.splitlines() == [
        "written: mine.yaml",
        "next:",
        "  engram corpus mine.yaml --out runs/corpus --vocab-size 2048",
        "  engram train mine.yaml --out runs/mine",
    ]
    assert corpus_of((here / "mine.yaml").read_text())["folders"] == ["notes"]
    assert corpus_of((here / "mine.yaml").read_text())["texts"] == ["more/*.txt"]
    code, out, err = engram("corpus", "mine.yaml", "--out", "runs/corpus", "--vocab-size", 300)
    assert code == 0, err
    code, out, err = engram("train", "mine.yaml", "--out", "runs/mine", *changes(*SMALL, *SMALL_TEXT, *SMALL_MODEL))
    assert code == 0, err
    assert "written: runs/mine/model, runs/mine/memory" in out


def test_a_recipe_for_a_model_that_lies_here_runs(here, engram, tiny):
    code, out, err = engram("recipe", "train", "--texts", "notes", "--model", "tiny", "--out", "mine.yaml")
    assert code == 0, err
    corpus = "engram corpus mine.yaml --out runs/corpus --tokenizer tiny"
    assert corpus in out
    point = read_point("mine.yaml")
    assert (point.model, point.train_backbone) == (str(tiny), False)
    assert point.engram.layer_ids == (1,)  # of three blocks
    assert (point.engram.n_embed_per_ngram, point.engram.n_head_per_ngram) == (8, 4)  # 32 wide
    assert point.data.seq_len == 256
    assert engram(*corpus.split()[1:])[0] == 0
    code, out, err = engram("train", "mine.yaml", "--out", "runs/mine", *changes(*SMALL, *SMALL_TEXT))
    assert code == 0, err
    assert "before" in out


def test_a_recipe_for_the_bundled_model(here, engram):
    code, out, err = engram("recipe", "train", "--model", "bundled", "--texts", "notes")
    assert (code, err) == (0, "")
    (here / "mine.yaml").write_text(out)
    point = read_point("mine.yaml")
    assert (point.model, point.engram.layer_ids, point.engram.n_embed_per_ngram) == ("bundled", (1, 3), 64)


def test_a_sweep_is_planned(here, engram):
    code, out, err = engram("recipe", "sweep", "--texts", "notes", "--out", "own.yaml")
    assert (code, err) == (0, "")
    commands = [line.strip() for line in out.splitlines() if line.startswith("  ")]
    assert commands[-1] == "engram sweep own.yaml --out runs/own --json runs/own.json"
    assert commands[-2] == "engram sweep own.yaml --out runs/own --plan"
    code, out, err = engram(*commands[-2].split()[1:])
    assert code == 0, err
    assert "12 points" in out


@pytest.mark.parametrize("kind", STARTER_KINDS)
def test_standard_output_is_the_recipe_and_nothing_else(here, engram, kind):
    code, out, err = engram("recipe", kind, "--texts", "more/story0.txt")
    assert (code, err) == (0, "")
    assert corpus_of(out)["texts"] == ["more/story0.txt"]
    assert "folders" not in corpus_of(out)
    code, out, err = engram("recipe", kind)
    assert (code, out, err) == (0, (STARTERS / f"{kind}.yaml").read_text(), "")
    assert "folders: [my_texts]  # change this" in out


def test_a_recipe_without_texts_says_what_to_change(here, engram):
    code, out, _ = engram("recipe", "train", "--out", "mine.yaml")
    assert code == 0
    assert "first change 'folders' in it" in out
    code, _, err = engram("corpus", "mine.yaml", "--out", "runs/corpus")
    assert code == 2
    assert "my_texts is not a folder; check the recipe's 'folders'" in err


@pytest.mark.parametrize("out", ["deep/er/mine.yaml", "odd[1]/mine.yaml", "notes/mine.yaml"])
@pytest.mark.parametrize("written", ["relative", "whole"])
def test_paths_are_relative_to_the_recipes_folder(here, engram, out, written):
    names = ["notes", "more/*.txt"] if written == "relative" else [here / "notes", here / "more/*.txt"]
    options = [option for name in names for option in ("--texts", name)]
    assert engram("recipe", "train", *options, "--out", out)[0] == 0
    corpus = corpus_of((here / out).read_text())
    assert not any(path.startswith("/") for path in [*corpus["folders"], *corpus["texts"]])
    assert files_of(here / out)[-2:] == ["story0.txt", "story1.txt"]


def test_a_pattern_is_read_where_the_current_folder_has_a_name_like_one(here, engram, monkeypatch):
    (here / "odd[1]").mkdir()
    (here / "odd[1]" / "mine").mkdir()
    for folder in ("odd[1]", "odd[1]/mine"):
        (here / folder / "a.txt").write_text(sentence(1))
    monkeypatch.chdir(here / "odd[1]")
    assert engram("recipe", "train", "--texts", "mine/*.txt", "--texts", "*.txt", "--out", "../recipe.yaml")[0] == 0
    assert files_of(here / "recipe.yaml") == ["a.txt", "a.txt"]
    assert engram("recipe", "train", "--texts", "mine/*.txt", "--out", "recipe.yaml")[0] == 0
    assert corpus_of(Path("recipe.yaml").read_text())["texts"] == ["mine/*.txt"]


def test_a_recipe_in_a_folder_behind_a_link_names_whole_paths(here, engram):
    (here / "far" / "away").mkdir(parents=True)
    (here / "link").symlink_to("far/away")
    assert engram("recipe", "train", "--texts", "notes", "--texts", "more/*.txt", "--out", "link/mine.yaml")[0] == 0
    for place in ("link", "far/away"):
        assert len(files_of(here / place / "mine.yaml")) == 42


@pytest.mark.parametrize(
    "name",
    [
        "two words",
        "a: b #c",
        'it\'s {my} [text], "no" *&!|>%@`',
        "1e3",
        "yes",
        "-",
        "Füße 😀",
        "tab\tand\nline",
        "back\\slash",
        "x" * 200,
    ],
)
@pytest.mark.parametrize("out", [None, "deep/mine.yaml"])
def test_odd_names_are_read_back(here, engram, name, out):
    (here / "in" / name).mkdir(parents=True)
    for file in (here / "in" / name / "a.md", here / f"{name}.txt"):
        file.write_text(sentence(1))
    code, printed, err = engram(
        "recipe", "train", "--texts", f"in/{name}", "--texts", f"{name}.txt", *([] if out is None else ["--out", out])
    )
    assert code == 0, err
    if out is None:
        out = "printed.yaml"
        (here / out).write_text(printed)
    assert len(files_of(here / out)) == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nonsense"], "kind: got 'nonsense', expected one of train, sweep."),
        (
            ["train", "--texts", "nowhere"],
            "texts: got 'nowhere', and there is nothing of that name; expected a folder, a file or",
        ),
        (["train", "--texts", "notes/*.html"], "texts: got 'notes/*.html', and there is nothing of that name"),
        (["train", "--texts", ""], "texts: got '', and there is nothing of that name"),
        (["train", "--texts", "empty"], "got folder 'empty' without a file that ends in .txt, .md"),
        (["train", "--texts", "notes", "--texts", "nowhere"], "got 'nowhere'"),
        (["train", "--texts", "caf\udce9.txt"], "got the name 'caf\\udce9.txt', expected one in UTF-8"),
        (["sweep", "--model", "bundled"], "model: got 'bundled' for a sweep"),
    ],
)
def test_what_cannot_be_written_is_one_error_and_no_file(here, engram, arguments, words):
    (here / "empty").mkdir()
    (here / "caf\udce9.txt").write_text(sentence(1))
    code, out, err = engram("recipe", *arguments, "--out", "mine.yaml")
    assert (code, out) == (2, "")
    assert words in err
    assert err.count("\n") == 1
    assert not (here / "mine.yaml").exists()


@pytest.mark.parametrize("model", ["./nowhere", "notes"])
def test_a_model_that_cannot_be_read_is_one_error(here, engram, model):
    code, out, err = engram("recipe", "train", "--model", model)
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert f"cannot load model '{model}'" in err


def test_a_model_that_takes_no_memory_is_one_error(here, engram):
    (here / "t5").mkdir()
    (here / "t5" / "config.json").write_text('{"model_type": "t5"}')
    code, out, err = engram("recipe", "train", "--model", "t5")
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert "cannot load model 't5'" in err


@pytest.mark.parametrize("place", ["a file", "a folder", "a link to nowhere"])
def test_nothing_is_overwritten(here, engram, place):
    out = here / "mine.yaml"
    {"a file": lambda: out.write_text("mine"), "a folder": out.mkdir, "a link to nowhere": lambda: out.symlink_to("gone")}[
        place
    ]()
    code, printed, err = engram("recipe", "train", "--out", "mine.yaml")
    assert (code, printed) == (2, "")
    assert "got mine.yaml, which exists; expected a new file" in " ".join(err.split())
    assert place != "a file" or out.read_text() == "mine"
    assert not (here / "gone").exists()


def test_a_place_that_cannot_be_written_is_one_error(here, engram):
    code, _, err = engram("recipe", "train", "--out", "more/story0.txt/mine.yaml")
    assert code == 2
    assert "cannot write more/story0.txt/mine.yaml" in err


def test_memories_suit_their_models():
    sizes = [(32, 3), (64, 1), (288, 6), (768, 12), (2560, 30), (8192, 80)]
    found = [memory_for(*size) for size in sizes]
    assert [memory.n_embed_per_ngram for memory in found] == [8, 16, 64, 128, 512, 512]
    assert [memory.n_head_per_ngram for memory in found] == [4, 4, 4, 4, 8, 8]
    assert [memory.layer_ids for memory in found] == [(1,), (0,), (1, 3), (1, 6), (1, 15), (1, 40)]
    assert memory_for(8, 2).n_embed_per_ngram == 4
    assert common_layers(30) == EngramConfig().layer_ids  # the paper's


def test_a_model_without_weights_looks_like_the_model(tmp_path):
    for name in ("llama", "gpt2", "longcat_flash", "deepseek_v4", "gemma3"):
        assert name in TINY_CONFIGS
        model = tiny_model(name)
        model.config.save_pretrained(tmp_path / name)
        asked, loaded = (find_decoder(each) for each in (model, load_without_weights(str(tmp_path / name))))
        assert (asked.hidden_size, len(asked.blocks)) == (loaded.hidden_size, len(loaded.blocks))


def test_texts_may_be_folders_or_files_alone():
    assert corpus_of(starter_text("sweep", OwnText(texts=["a.txt"])))["texts"] == ["a.txt"]
    assert starter_text("sweep", OwnText()) == starter_text("sweep")


def test_docs_begin_with_the_command():
    for page in ("guides", "experiments"):
        assert re.search(r"```sh\nengram recipe (train|sweep) --texts", (ROOT / "docs" / f"{page}.md").read_text())
    assert "engram recipe" in (ROOT / "README.md").read_text()


def test_help_loads_nothing_heavy():
    code = "import sys, engram.cli.recipe; sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'yaml')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
