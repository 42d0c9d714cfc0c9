import pytest

from engram.data.recipe import read_yaml
from engram.data.texts import load_texts
from engram.errors import ConfigError, DataError
from engram.models import EngramRouter
from engram.yaml_text import parse_yaml

UNREADABLE = {
    "no day": ("seed: 2024-99-99", "quotes around it"),
    "too many digits": ("seed: " + "9" * 5000, "quotes around it"),
    "too deep": ("a: " + "[" * 3000, "nested too deeply"),
    "another type than it says": ("a: !!bool maybe", "quotes around it"),
    "no date of its type": ("a: !!timestamp soon", "quotes around it"),
    "nothing of its type": ("a: !!int ''", "quotes around it"),
    "no end": ("a: [", "line 1"),
}


@pytest.mark.parametrize("text", UNREADABLE)
def test_what_cannot_be_read_is_the_error_of_whoever_reads(text):
    content, told = UNREADABLE[text]
    with pytest.raises(ConfigError, match=f"cannot read this: .*{told}"):
        parse_yaml(content, "this", ConfigError)


@pytest.mark.parametrize("text", UNREADABLE)
@pytest.mark.parametrize(
    ("read", "error"), [(read_yaml, DataError), (load_texts, DataError), (EngramRouter.from_yaml, ConfigError)]
)
def test_files_that_cannot_be_read_are_named(tmp_path, text, read, error):
    (tmp_path / "wrong.yaml").write_text(UNREADABLE[text][0])
    with pytest.raises(error, match=r"cannot read .*wrong\.yaml"):
        read(tmp_path / "wrong.yaml")


def test_numbers_are_those_of_yaml_1_2():
    texts = ("1E+2", "-2.5e3", ".5e-1", "e3", "1e", "12")
    assert [parse_yaml(text, "this", ConfigError) for text in texts] == [100.0, -2500.0, 0.05, "e3", "1e", 12]
