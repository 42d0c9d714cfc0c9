import pytest

from engram.data.corpus import CorpusRecipe, TextSource
from engram.data.recipe import parse_corpus
from engram.data.store import build_store
from engram.testing import tiny_tokenizer


@pytest.fixture(scope="session")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory):
    """Texts of many lengths over few letters, so that n-grams recur; a file by heart; a source file."""
    folder = tmp_path_factory.mktemp("texts")
    state = 1
    for number in range(30):
        letters = []
        for _ in range(3 + number * 7):
            state = state * 1103515245 + 12345 & 0x7FFFFFFF
            letters.append("abé\n"[state >> 16 & 3])
        (folder / f"t{number:02}.txt").write_text(f"{number}" + "".join(letters))
    (folder / "heart.txt").write_text("know <|endoftext|> this\n<|doc|>\nand that\n")
    (folder / "code").mkdir()
    for number in range(8):
        (folder / "code" / f"m{number}.py").write_text(f"def f{number}():\n    return 'a text that is long enough'\n" * 3)
    return folder


@pytest.fixture(scope="session")
def text_recipe():
    fields = {"texts": ["t*.txt", {"path": "heart.txt", "weight": 3}], "folders": ["code"], "held_out_percent": 40}
    return parse_corpus(fields, "recipe")


@pytest.fixture(scope="session")
def store(text_recipe, tokenizer, text_folder, tmp_path_factory):
    return build_store(text_recipe, tokenizer, text_folder, tmp_path_factory.mktemp("stores") / "store")


@pytest.fixture(scope="session")
def small_store(tokenizer, text_folder, tmp_path_factory):
    """Two short documents to train on: a block spans several epochs."""
    recipe = CorpusRecipe(texts=(TextSource("heart.txt", 2),))
    return build_store(recipe, tokenizer, text_folder, tmp_path_factory.mktemp("stores") / "small")
