import dataclasses
import json
import re

import numpy as np
import pytest
import torch

from engram.analysis import Subject, gates, look, phrase_gates, sample_texts
from engram.data.phrases import find_phrases, read_phrases
from engram.errors import ConfigError, DataError
from engram.testing import tiny_memory, tiny_model, tiny_tokenizer
from tests.analysis.helpers import TEXTS, make_sample
from tests.editing.helpers import FACTS, make_editor

PHRASES = ["The Memory", "last  tokens", "self.table", "nowhere at all", " "]
TEXT = {"prose": [f"{TEXTS['prose'][0]} Tokens and memory. "], "code": [TEXTS["code"][0] + "\n"]}


def gates_of(memory, window):
    with torch.no_grad(), memory.record() as recorded:
        memory(input_ids=torch.tensor([window.ids]), use_cache=False)
    return {layer: recorded[layer]["gate"][0].mean(-1).double().numpy() for layer in memory.engram_config.layer_ids}


def places_by_hand(tokenizer, window):
    """Positions by spelling tokens out one after another, without offsets."""
    text, ends = "", {}
    for place, token in enumerate(window.ids[1:], start=1):
        text += tokenizer.decode([token])
        ends[len(text)] = place
    found = {"completes": [], "begins": [], "same_word": [], "other": []}
    inside = set()
    for match in re.finditer(r"\b(the\s+memory|last\s+tokens|self\.table)\b", text, re.IGNORECASE):
        inside |= set(range(match.start(), match.end()))
        if match.end() in ends and match.end() < len(text):
            found["completes"].append(ends[match.end()])
            first = ends.get(match.start() + len(re.match(r"[a-z]+", match.group(), re.IGNORECASE).group()))
            found["begins"] += [first] if first not in (None, ends[match.end()]) else []
    for word in re.finditer(r"\b[^\W\d_]{2,}\b", text):
        if not inside & set(range(word.start(), word.end())) and word.end() in ends and word.end() < len(text):
            is_last = word[0].lower() in ("memory", "tokens", "table", "all")
            found["same_word" if is_last else "other"].append(ends[word.end()])
    return found


@pytest.mark.parametrize("model_type", ["llama", "deepseek_v4"])
def test_gates_are_means_over_the_places(model_type):
    memory, tokenizer = tiny_memory(tiny_model(model_type)), tiny_tokenizer()
    sample = sample_texts(tokenizer, TEXT, 400, 200)
    result = phrase_gates(memory, sample, tokenizer, PHRASES)
    assert result["phrases"] == {"the memory": 3, "last tokens": 1, "self.table": 1}
    assert (result["occurrences"], result["documents"], result["windows_left_out"]) == (5, 2, 0)
    assert result["not_found"] == ["nowhere at all"]
    assert {example["phrase"] for example in result["examples"][:3]} == {"the memory", "last tokens", "self.table"}
    for layer in memory.engram_config.layer_ids:
        sums = {name: [] for name in ("completes", "begins", "same_word", "other")}
        for window in sample.windows:
            gate = gates_of(memory, window)[layer]
            for name, places in places_by_hand(tokenizer, window).items():
                sums[name] += gate[places].tolist()
        found = result["layers"][str(layer)]
        means = {name: np.mean(values) for name, values in sums.items()}
        for name, mean in means.items():
            assert found[name]["mean"] == pytest.approx(mean, rel=1e-4), name
        assert all(sums.values())
        for name in ("begins", "same_word", "other"):
            assert found[f"completes_less_{name}"]["mean"] == pytest.approx(means["completes"] - means[name], abs=1e-5)
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    example = next(e for e in result["examples"] if e["phrase"] == "last tokens")
    assert "".join(token["token"] for token in example["tokens"]).endswith("last tokens")


def test_gates_of_examples_are_those_of_the_gates_look():
    memory, tokenizer, sample = tiny_memory(), tiny_tokenizer(), make_sample()
    tokens = gates(memory, sample, tokenizer, shown=1)["texts"][0]["tokens"]
    example = phrase_gates(memory, sample, tokenizer, ["memory"])["examples"][0]
    shown = {entry["token"]: entry["layers"][0]["gate"][0] for entry in reversed(tokens)}  # where it stands first
    last = example["tokens"][-1]
    assert next(iter(last["gates"].values())) == pytest.approx(shown[last["token"]], abs=1e-3)


def test_text_cut_in_the_midst_of_a_word_is_left_out_and_told():
    memory, tokenizer = tiny_memory(), tiny_tokenizer()
    sample = sample_texts(tokenizer, {"prose": ["the memory of tokens."]}, 100, 200)
    (whole,) = sample.windows
    pieces = [
        *whole.ids[:1],
        *(i for part in ("the", " mem", "ory") for i in tokenizer(part, add_special_tokens=False)["input_ids"]),
    ]
    cut = dataclasses.replace(whole, ids=tuple(pieces), document=1)
    both = dataclasses.replace(sample, windows=(whole, cut))
    result = phrase_gates(memory, both, tokenizer, ["memory"])
    assert (result["windows_left_out"], result["occurrences"], result["documents"]) == (1, 1, 1)
    alone = phrase_gates(memory, sample, tokenizer, ["memory"])
    assert result["layers"] == alone["layers"]


def found_in(text, phrases, **changes):
    tokenizer = tiny_tokenizer()
    sample = sample_texts(tokenizer, {"prose": [text]}, 400, 200)
    windows = tuple(dataclasses.replace(window, **changes) for window in sample.windows)
    return phrase_gates(tiny_memory(), dataclasses.replace(sample, windows=windows), tokenizer, phrases)["phrases"]


def test_phrases_may_overlap_and_words_at_the_edge_may_be_cut():
    chain = found_in("the standard library module is here.", ["standard library", "library module"])
    assert chain == {"library module": 1, "standard library": 1}
    assert found_in("event loop and event loop", ["event loop"]) == {"event loop": 1}  # more may follow the second
    # And stand before the first.
    assert found_in("event loop and event loop.", ["event loop"], is_beginning=False) == {"event loop": 1}
    assert found_in("an event loopy loop, event loop.", ["event loop"]) == {"event loop": 1}
    assert found_in("\u0130stanbul \u00dcniversitesi.", ["\u0130stanbul \u00dcniversitesi"])


def test_a_phrase_of_one_word_has_no_first_word_to_be_compared_with():
    memory, tokenizer = tiny_memory(), tiny_tokenizer()
    sample = sample_texts(tokenizer, TEXT, 400, 200)
    with_one = phrase_gates(memory, sample, tokenizer, ["last tokens", "addressed"])["layers"]
    alone = phrase_gates(memory, sample, tokenizer, ["last tokens"])["layers"]
    for layer, found in with_one.items():
        assert found["completes_less_begins"] == alone[layer]["completes_less_begins"]
        assert found["completes"] != alone[layer]["completes"]


def test_a_memory_that_reads_nothing_has_no_gates_and_tells_where_phrases_are():
    editor = make_editor()
    editor.teach(FACTS)
    sample = sample_texts(editor.tokenizer, TEXT, 400, 200)
    result = phrase_gates(editor.memory, sample, editor.tokenizer, PHRASES)
    assert (result["occurrences"], result["documents"]) == (5, 2)
    assert {entry["completes"]["mean"] for entry in result["layers"].values()} == {None}


def test_what_cannot_be_found_is_said():
    memory, tokenizer, sample = tiny_memory(), tiny_tokenizer(), make_sample()
    for none in ([], ["  ", ""]):
        with pytest.raises(ConfigError, match="got none"):
            phrase_gates(memory, sample, tokenizer, none)
    with pytest.raises(DataError, match="none of 2 occurs"):
        phrase_gates(memory, sample, tokenizer, ["no such", "mem"])
    look_result = look(Subject("tiny", memory), tokenizer, TEXTS, ["gates"], tokens=60, length=32)
    assert "phrases" not in look_result
    with pytest.raises(ConfigError, match="phrases cannot be done: no phrases were named"):
        look(Subject("tiny", memory), tokenizer, TEXTS, ["phrases"], tokens=60, length=32)


def test_phrases_stand_together_more_often_than_by_chance():
    fond = ["a regular expression", "the Regular expression matches; regular expressions do too"] * 10
    words = ["apple", "orange", "engine", "table", "river", "window", "garden", "letter"]
    texts = [*fond, *(f"the {one} of the {other} or the {one}" for one in words for other in words)]
    assert find_phrases(texts, count=20, documents=5, bits=3) == ["regular expression"]
    assert find_phrases(texts, count=20, documents=5, bits=1)[0] == "of the"  # the most frequent first
    assert find_phrases(["\n".join(fond)], count=20, documents=2, bits=3) == []  # all in one document
    assert find_phrases(["foo_bar baz, 3rd party"] * 30, count=1, documents=1, bits=0.1) == []  # pieces of other words
    assert find_phrases(["regular. expression"] * 30, count=1, documents=1, bits=0.1) == []
    with pytest.raises(ConfigError, match="got one text"):
        find_phrases("one text")
    with pytest.raises(ConfigError, match="bits: got 0"):
        find_phrases(texts, bits=0)


def test_phrases_are_read_from_a_file(tmp_path):
    file = tmp_path / "phrases.txt"
    file.write_text("\ufeffMilky Way\n\n  By the way \nMilky Way\n", encoding="utf-8")
    assert read_phrases(file) == ["Milky Way", "By the way"]
    file.write_text("\n \n")
    with pytest.raises(DataError, match="holds no phrase"):
        read_phrases(file)
    with pytest.raises(DataError, match="cannot read phrases"):
        read_phrases(tmp_path / "none.txt")
