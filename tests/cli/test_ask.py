"""`engram ask` with more than one prompt."""

import io
import json

import pytest

PROMPTS = ("KEY:beta 20", "What is alpha 17?", "KEY:beta 20")
ANSWERS = ["7319", "blue window", "7319"]


@pytest.fixture
def piped(monkeypatch):
    """What a pipe brings as standard input."""
    return lambda content: monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content)))


def test_several_prompts_are_answered_in_order_by_one_model(engram, taught, monkeypatch):
    import engram.models as models

    loaded = []
    load = models.load_model
    monkeypatch.setattr("engram.models.load_model", lambda *arguments: (loaded.append(arguments), load(*arguments))[1])
    code, out, err = engram("ask", *PROMPTS, "--memory", taught)
    assert (code, out.splitlines(), err) == (0, ANSWERS, "")
    assert len(loaded) == 1
    code, out, _ = engram("ask", *PROMPTS, "--memory", taught, "--json")
    assert json.loads(out) == [{"prompt": prompt, "answer": answer} for prompt, answer in zip(PROMPTS, ANSWERS)]
    assert json.loads(engram("ask", PROMPTS[0], "--memory", taught, "--json")[1]) == [{"prompt": PROMPTS[0], "answer": "7319"}]
    off = engram("ask", *PROMPTS, "--memory", taught, "--off")[1].splitlines()
    alone = engram("ask", PROMPTS[0], "--memory", taught, "--off")[1].rstrip("\n")
    assert off[0] == off[2] == "\\n".join(alone.splitlines())


def test_prompts_come_from_standard_input(engram, taught, piped):
    piped("\ufeffKEY:beta 20\r\nWhat is alpha 17?".encode())
    assert engram("ask", "-", "--memory", taught)[:2] == (0, "7319\nblue window\n")
    piped(b"What is alpha 17?\n")
    assert engram("ask", "KEY:beta 20", "-", "--memory", taught)[:2] == (0, "7319\nblue window\n")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "got no prompt from standard input, expected one a line"),
        (b"KEY:beta 20\n\nKEY", "line 2 of standard input: got an empty text"),
        (b"\xff\xfe", "got bytes that are not UTF-8 from standard input"),
    ],
)
def test_standard_input_that_cannot_be_asked(engram, taught, piped, content, message):
    piped(content)
    code, out, err = engram("ask", "-", "--memory", taught)
    assert (code, out) == (2, "")
    assert message in err
    assert "Traceback" not in err


def test_a_prompt_near_the_end_of_the_context_takes_no_room_from_others(engram, taught, world):
    from engram.models import load_model

    model, tokenizer = load_model(str(world / "base"))
    context = model.config.max_position_embeddings
    long = "The memory is addressed. " * context
    ids = tokenizer(long)["input_ids"][: context - 4]
    long = tokenizer.decode(ids, skip_special_tokens=True)
    while len(tokenizer(long)["input_ids"]) > context - 1:
        long = long[:-1]
    code, out, err = engram("ask", "KEY:beta 20", long, "What is alpha 17?", "--memory", taught)
    assert code == 0, err
    lines = out.split("\n")
    assert (lines[0], lines[2]) == ("7319", "blue window")
    code, _, err = engram("ask", "KEY:beta 20", "word " * 5000, "--memory", taught)
    assert (code, "prompt 'word word" in err, "the model's context" in err) == (2, True, True)
