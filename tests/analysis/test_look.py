import json

import pytest

from engram.analysis import ANALYSES, Subject, look
from engram.errors import ConfigError
from engram.plots import plot_look, render_look
from engram.plots.look import named_subjects
from engram.testing import tiny_memory, tiny_model, tiny_tokenizer
from tests.analysis.helpers import TEXTS
from tests.editing.helpers import FACTS, make_editor

ODD = {**TEXTS, "odd $x$ <b>": ["$a_1$ 漢字 <script>\x07", "{\\frac} text"]}


def look_at(subject, **options):
    return look(subject, tiny_tokenizer(), ODD, tokens=200, row_tokens=300, length=32, **options)


@pytest.mark.parametrize("model_type", ["llama", "deepseek_v4"])
def test_everything_about_a_memory(model_type, tmp_path):
    started = []
    subject = Subject("tiny", tiny_memory(tiny_model(model_type)))
    start = lambda name, total: started.append(name) or (lambda done: None)  # noqa: E731
    result = look_at(subject, start=start, phrases=["the memory"])
    assert [name for name in result if name in ANALYSES] == list(ANALYSES)
    assert started == ["gates", "phrases", "logit_lens", "cka", "losses"]
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert result["text"]["complete"]
    assert sum(kind["tokens"] for kind in result["text_hashed"]["kinds"].values()) == result["text_hashed"]["tokens"]
    pictures = plot_look(result, tmp_path)
    assert set(pictures) == set(ANALYSES)
    assert all(path.read_bytes().startswith(b"\x89PNG") for paths in pictures.values() for path in paths)
    page = render_look(result, pictures)
    assert page.count("data:image/png;base64,") == sum(map(len, pictures.values()))
    assert "odd $x$ &lt;b&gt;" in page
    for forbidden in ("<script", "http://", "https://", "odd $x$ <b>"):
        assert forbidden not in page


def test_a_plain_model_beside_another(tmp_path):
    other = Subject("deeper", tiny_model(num_hidden_layers=4, seed=1))
    result = look_at(Subject("plain", tiny_model()), against=(other, tiny_tokenizer()))
    assert set(result["skipped"]) == set(ANALYSES) - {"logit_lens", "cka"}
    assert (result["cka"]["a"], result["cka"]["b"]) == ("plain", "deeper")
    assert len(result["cka"]["map"][0]) == 4
    assert set(result["logit_lens"]["subjects"]) == {"model", "against"}
    assert result["has_memory"] == {"model": False, "against": False}
    for names, shown in ((("plain", "deeper"), ["plain", "deeper"]), (("run", "run"), ["run", "run (against)"])):
        named = named_subjects({**result, **dict(zip(("model", "against"), names))})["logit_lens"]
        assert (list(named["subjects"]), named["reference"]) == (shown, names[0])
    page = render_look(result, plot_look(result, tmp_path))
    assert f"<th class=n>{result['against']}</th>" in page  # by its name, not as "against"
    assert "Left out: it looks at a memory" in page


def test_a_taught_memory(tmp_path):
    editor = make_editor()
    editor.teach(FACTS)
    result = look(
        Subject("taught", editor.memory), editor.tokenizer, {"taught": ["KEY:beta 20 7319"], **TEXTS}, tokens=200, length=32
    )
    assert list(result["skipped"]) == ["phrases", "rows"]
    assert "<h2>Rows</h2><p class=quiet>Left out" in render_look(result, plot_look(result, tmp_path))
    silent = look(Subject("taught", editor.memory), editor.tokenizer, TEXTS, ["gates", "zipf", "gains"], tokens=100, length=32)
    assert silent["gains"]["ngrams"] == 0
    assert all(entry["accesses"] == 0 for entry in silent["zipf"]["layers"].values())
    render_look(silent, plot_look(silent, tmp_path))


@pytest.mark.parametrize(
    ("what", "message"),
    [(["gates"], "none was given"), (["nonsense"], "got nonsense, expected some of gates"), ([], "nothing to do")],
)
def test_what_cannot_be_done_is_said(what, message):
    with pytest.raises(ConfigError, match=message):
        look_at(Subject("plain", tiny_model()), what=what)


def test_models_of_other_tokens_are_not_compared():
    class Other:
        def get_vocab(self):
            return {"a": 0}

        def __len__(self):
            return 1

    with pytest.raises(ConfigError, match="another vocabulary"):
        look_at(Subject("plain", tiny_model()), against=(Subject("other", tiny_model()), Other()))
