import pytest
import torch

from engram import ConfigError, DataError, EngramModel, Fact, TeachError, TeachSettings, load_bundled, teach_facts
from engram.evaluation import check_facts, measure_drift, score_by_category, trace_text
from engram.models import get_engram_model
from engram.testing import tiny_config, tiny_memory, tiny_model, tiny_tokenizer

FACTS = [
    Fact(("KEY:alpha 17", "What is alpha 17?"), "blue window", "colour"),
    Fact(("KEY:beta 20",), "7319", "number"),
    Fact(("KEY:alpha 18",), "a quiet green door", "colour"),
]


@pytest.fixture(scope="module")
def bundled():
    return load_bundled()


def fresh(bundled, **changes):
    model, tokenizer = bundled
    config = tiny_config(
        engram_vocab_size=[16, 16, 4000, 4000, 4000],
        max_ngram_size=6,
        n_embed_per_ngram=128,
        layer_ids=[2],
        use_conv=False,
        use_bias=False,
        **changes,
    )
    torch.manual_seed(0)
    return get_engram_model(model, config, tokenizer)


@pytest.fixture
def memory(bundled):
    memory = fresh(bundled)
    yield memory
    memory.unload()


def test_facts_go_in_exactly_and_nothing_else_is_written(bundled, memory, tmp_path):
    tokenizer = bundled[1]
    before = {name: p.clone() for name, p in memory.named_parameters()}
    assert not any(a.exact for a in check_facts(memory, tokenizer, FACTS))
    seen = []
    report = teach_facts(memory, tokenizer, FACTS, progress=lambda *step: seen.append(step))
    answers = check_facts(memory, tokenizer, FACTS)
    assert [a.said for a in answers] == ["blue window", "blue window", "7319", "a quiet green door"]
    assert report.not_exact == []
    assert (report.facts, report.prompts) == (3, 4)
    assert len(seen) == report.steps
    assert [(s.category, s.exact, s.prompts) for s in score_by_category(FACTS, answers)] == [("colour", 3, 3), ("number", 1, 1)]
    for name, parameter in memory.named_parameters():
        if "multi_head_embedding" in name:
            changed = (parameter != before[name]).any(1)
            assert 0 < int(changed.sum()) <= report.rows_written
            low = sum(memory.mapping.head_sizes(2)[:8])
            assert not changed[:low].any()  # orders 2 and 3 are left alone
        else:
            assert torch.equal(parameter, before[name]), name
    with memory.disable_engram():
        assert not any(a.exact for a in check_facts(memory, tokenizer, FACTS))
    silent = 0
    for text in [
        "import os\n",
        "Once upon a time there was a king.",
        "x = [i for i in range(10)]",
        "Water covers most of the earth.",
    ]:
        drift = measure_drift(memory, tokenizer, [text])
        if not any(layer.written for token in trace_text(memory, tokenizer, text).tokens for layer in token.layers):
            silent += 1  # no written row is read, not even by a collision: the base model's logits, bit for bit
            assert (drift.untouched, drift.mean_kl, drift.tokens_changed) == (1.0, 0.0, 0)
    assert silent >= 2
    trace = trace_text(memory, tokenizer, "KEY:beta 20 7319")
    assert any(layer.written for token in trace.tokens for layer in token.layers)
    assert not trace.tokens[1].layers[0].written
    memory.save_pretrained(tmp_path)
    memory.unload()
    again = EngramModel.from_pretrained(bundled[0], tmp_path, tokenizer)
    assert all(a.exact for a in check_facts(again, tokenizer, FACTS))
    again.unload()
    memory._hooks = None
    memory.unload = lambda: None


def test_an_interruption_leaves_the_memory_as_it_was(bundled, memory):
    before = {name: p.clone() for name, p in memory.named_parameters()}

    def stop(step, *_):
        if step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        teach_facts(memory, bundled[1], FACTS, progress=stop)
    assert all(torch.equal(p, before[name]) for name, p in memory.named_parameters())
    assert set(before) == {name for name, _ in memory.named_parameters()}


def test_what_cannot_be_learnt_is_reported():
    """One step is not enough: the report says which facts are not exact."""
    memory = tiny_memory(tiny_model(), speak=False, max_ngram_size=4)
    report = teach_facts(memory, tiny_tokenizer(), FACTS, TeachSettings(max_steps=1, lr=1e-4))
    assert report.not_exact == [0, 1, 2]


def test_bad_lessons_are_refused():
    memory, tokenizer = tiny_memory(speak=False, max_ngram_size=3), tiny_tokenizer()
    with pytest.raises(TeachError, match="got no facts"):
        teach_facts(memory, tokenizer, [])
    with pytest.raises(TeachError, match="orders end at 3"):
        teach_facts(memory, tokenizer, FACTS)
    settings = TeachSettings(min_order=2)
    with pytest.raises(DataError, match="different answers"):
        teach_facts(memory, tokenizer, [FACTS[0], Fact(("KEY:alpha 17",), "red")], settings)
    with pytest.raises(DataError, match="expected at most 256"):
        teach_facts(memory, tokenizer, [Fact(("a",), "b " * 300)], settings)
    for bad in ({"lr": 0}, {"min_order": 1}, {"max_steps": -1}):
        with pytest.raises(ConfigError, match=next(iter(bad))):
            TeachSettings(**bad)
