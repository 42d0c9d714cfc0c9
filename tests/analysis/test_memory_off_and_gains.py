import json
import math

import numpy as np
import pytest
import torch

from engram.analysis import gains, gates, memory_off, sample_texts, token_losses
from engram.analysis.losses import token_class
from engram.testing import tiny_memory, tiny_model, tiny_tokenizer
from tests.analysis.helpers import TEXTS, make_sample
from tests.editing.helpers import FACTS, make_editor

MODELS = ["llama", "deepseek_v3", "deepseek_v4"]


@pytest.mark.parametrize("model_type", MODELS)
def test_losses_are_the_models(model_type):
    memory, sample = tiny_memory(tiny_model(model_type)), make_sample()
    losses = token_losses(memory, sample)
    assert len(losses.on) == sample.tokens - len(sample.windows)
    for place in (0, len(sample.windows) - 1):
        ids, own = torch.tensor([sample.windows[place].ids]), losses.window == place
        with torch.no_grad():
            on = memory(input_ids=ids, labels=ids, use_cache=False).loss.item()
            with memory.disable_engram():
                off = memory(input_ids=ids, labels=ids, use_cache=False).loss.item()
        assert losses.on[own].mean() == pytest.approx(on, rel=1e-4)
        assert losses.off[own].mean() == pytest.approx(off, rel=1e-4)
        assert losses.target[own].tolist() == list(sample.windows[place].ids[1:])


def test_what_is_lost_by_kind():
    memory, sample = tiny_memory(), make_sample()
    losses = token_losses(memory, sample)
    result = memory_off(losses, sample, tiny_tokenizer())
    assert set(result["by_kind"]) == {"prose", "code"}
    for part in ("by_kind", "by_token"):
        assert sum(group["tokens"] for group in result[part].values()) == len(losses.on)
        mean = sum(g["tokens"] * g["lost"]["mean"] for g in result[part].values()) / len(losses.on)
        assert mean == pytest.approx((losses.off - losses.on).mean())
    everything, ceiling = result["all"], math.log(losses.vocab_size)
    assert everything["gain_kept"]["mean"] == pytest.approx((ceiling - losses.off.mean()) / (ceiling - losses.on.mean()))
    assert everything["lost"]["low"] < everything["lost"]["mean"] < everything["lost"]["high"]
    json.dumps(result, allow_nan=False)


def test_a_silent_memory_loses_and_gains_nothing():
    memory, sample = tiny_memory(speak=False), make_sample()
    losses = token_losses(memory, sample)
    result = memory_off(losses, sample, tiny_tokenizer())
    assert result["all"]["lost"] == {"mean": 0.0, "low": 0.0, "high": 0.0}
    assert result["all"]["gain_kept"]["mean"] == 1.0
    found = gains(memory, losses, sample, tiny_tokenizer())
    assert (found["gained"], found["lost"], found["top_gains"]) == (0, 0, [])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("12", "number"),
        (" The", "name"),
        (" the", "word"),
        ("GPU", "CAPITALS"),
        ("\n  ", "space"),
        ("):", "sign"),
        ("A", "name"),
    ],
)
def test_token_classes(text, expected):
    assert token_class(text) == expected


def read_with_its_context(memory, sample, losses):
    """Whether all tokens of the n-gram before a predicted token stand in the text itself, one prediction after another."""
    largest = max(memory.engram_config.orders)
    return np.array([sample.windows[w].is_beginning or p + 1 > largest for w, p in zip(losses.window, losses.position)])


def test_gains_are_booked_on_the_ngram_before():
    memory, sample, tokenizer = tiny_memory(), make_sample(), tiny_tokenizer()
    losses = token_losses(memory, sample)
    result = gains(memory, losses, sample, tokenizer, listed=10_000)
    bits, whole = (losses.off - losses.on) / math.log(2), read_with_its_context(memory, sample, losses)
    listed = [*result["top_gains"], *result["top_losses"]]
    assert sum(e["bits"] for e in listed) == pytest.approx(bits[whole].sum(), abs=0.01 * len(listed))
    assert sum(e["count"] for e in listed) == result["tokens"] == whole.sum() == len(bits) - result["cut_off"]
    assert result["top_gains"][0]["bits"] == max(e["bits"] for e in listed)
    assert result["top_losses"][0]["bits"] == min(e["bits"] for e in listed)
    assert result["per_token"]["mean"] == pytest.approx(bits.mean())
    # One n-gram followed through by hand, over all places where it stands (its canonical ids: case and accents do not count).
    canonical, entry = memory.mapping.compressed_tokenizer.lookup_table, next(e for e in listed if e["count"] > 2)
    places = {}
    for i in np.flatnonzero(whole):
        ids, end = sample.windows[losses.window[i]].ids, losses.position[i] + 1
        key = tuple(int(canonical[j]) for j in ids[max(0, end - 3) : end])
        places.setdefault(key, []).append((tokenizer.decode(list(ids[max(0, end - 3) : end])), bits[i]))
    own = next(found for found in places.values() if found[0][0] == entry["ngram"])
    assert len(own) == entry["count"]
    assert sum(bit for _, bit in own) == pytest.approx(entry["bits"], abs=1e-3)


def test_ngrams_that_reach_over_the_cut_before_a_window_are_not_listed():
    memory, tokenizer = tiny_memory(), tiny_tokenizer()
    sample = sample_texts(tokenizer, {"prose": ["The memory is addressed by the last tokens of the text. " * 20]}, 400, 16)
    assert [window.is_beginning for window in sample.windows].count(True) == 1 < len(sample.windows) - 10
    result = gains(memory, token_losses(memory, sample), sample, tokenizer, listed=10_000)
    listed = [e for e in (*result["top_gains"], *result["top_losses"]) if e["ngram"].startswith(tokenizer.bos_token)]
    # The document's own beginning: the begin token alone, with one token behind it, and with two.
    assert sum(e["count"] for e in listed) == 3
    assert result["cut_off"] == sum(min(3, len(window.ids) - 1) for window in sample.windows[1:])


def test_gains_of_taught_facts_stand_behind_their_keys():
    editor = make_editor()
    editor.teach(FACTS)
    sample = sample_texts(editor.tokenizer, {"taught": ["KEY:beta 20 7319"], **TEXTS}, 400, 32)
    losses = token_losses(editor.memory, sample)
    result = gains(editor.memory, losses, sample, editor.tokenizer)
    assert 0 < result["tokens"] < len(losses.on)
    assert result["top_gains"][0]["bits"] > 1
    assert all("ta 20" in entry["ngram"] for entry in result["top_gains"])
    shown = gates(editor.memory, sample, editor.tokenizer)
    layer = next(iter(shown["kinds"]["code"]))
    assert shown["kinds"]["code"][layer]["read"] == 0
    assert shown["kinds"]["code"][layer]["mean"] is None
    assert shown["kinds"]["taught"][layer]["read"] > 0


@pytest.mark.parametrize("model_type", MODELS)
def test_gates_are_those_of_the_trace(model_type):
    from engram.evaluation import trace_text

    memory, sample, tokenizer = tiny_memory(tiny_model(model_type)), make_sample(), tiny_tokenizer()
    result = gates(memory, sample, tokenizer, shown=3)
    assert result["streams"] == (4 if model_type == "deepseek_v4" else 1)
    assert [text["kind"] for text in result["texts"]] == ["prose", "code", "prose"]
    trace = trace_text(memory, tokenizer, TEXTS["prose"][0])
    for token, expected in zip(result["texts"][0]["tokens"], trace.tokens[1:]):
        assert token["token"] == expected.token
        for layer, other in zip(token["layers"], expected.layers):
            np.testing.assert_allclose(layer["gate"], other.gate, atol=2e-4)
    for kind, layers in result["kinds"].items():
        for entry in layers.values():
            tokens = sample.to_dict()["kinds"][kind]
            assert entry["positions"] == entry["read"] == tokens["tokens"] - tokens["windows"]
            assert sum(entry["histogram"]) == entry["read"] * result["streams"]
            assert 0 <= entry["p5"] <= entry["median"] <= entry["p95"] <= 1
