"""A memory on top of another: both are read, and each is switched, saved and taken off by itself."""

import copy
import json

import pytest
import torch
from transformers import DynamicCache

from engram import AttachError, CheckpointError, EngramModel, FingerprintError, MemoryEditor, get_engram_model
from engram.models import StaticDecoder
from engram.testing import assert_close, tiny_config, tiny_memory, tiny_model, tiny_tokenizer
from tests.editing.helpers import FACTS, same, tensors

OTHER = "The memory is addressed by the last tokens."
TAUGHT = "KEY:beta 20"


def model():
    return tiny_model(hidden_size=64, intermediate_size=96)


def trained(seed=0, **changes):
    """A memory whose rows change what the model says, with a convolution, in the last block too."""
    return tiny_memory(model(), seed=seed, max_ngram_size=4, **changes)


@pytest.fixture
def stack():
    beneath = trained()
    editor = MemoryEditor.create(beneath, tiny_tokenizer())
    assert not editor.teach(FACTS).not_exact
    return beneath, editor


@torch.no_grad()
def logits(memory, text, **options):
    return memory(**tiny_tokenizer()(text, return_tensors="pt"), **{"use_cache": False, **options}).logits


def test_an_empty_memory_on_top_changes_nothing():
    beneath = trained()
    before = logits(beneath, OTHER)
    above = get_engram_model(beneath, tiny_config(), tiny_tokenizer())
    assert torch.equal(logits(above, OTHER), before)
    assert above.beneath is beneath
    assert above.base_model is beneath.base_model
    assert not any(parameter.requires_grad for parameter in beneath.parameters())


def test_facts_are_taught_over_a_trained_memory_and_leave_it_as_it_is(stack):
    beneath, editor = stack
    with editor.memory.disable_engram():
        trained_alone, taught_text = logits(editor.memory, OTHER), logits(editor.memory, TAUGHT)
        with beneath.disable_engram():
            assert not torch.equal(logits(editor.memory, OTHER), trained_alone)
    assert all(editor.verify().values())
    assert torch.equal(logits(editor.memory, OTHER), trained_alone)  # bit for bit where nothing was taught
    assert not torch.equal(logits(editor.memory, TAUGHT), taught_text)
    editor.forget([fact.id for fact in editor.facts])
    assert torch.equal(logits(editor.memory, TAUGHT), taught_text)


@pytest.mark.parametrize("options", [{"num_beams": 3}, {}, {"prompt_lookup_num_tokens": 3}])
def test_decoding_with_a_cache_is_that_without(stack, options):
    _, editor = stack
    rows = tiny_tokenizer()([TAUGHT, OTHER], return_tensors="pt", padding=True, padding_side="left")
    rows = {name: x[-1:] if "prompt_lookup_num_tokens" in options else x for name, x in rows.items()}
    options = {"max_new_tokens": 8, "do_sample": False, **options}
    cached = editor.memory.generate(**rows, **options)
    if "prompt_lookup_num_tokens" in options:  # only with a cache
        options.pop("prompt_lookup_num_tokens")
    assert torch.equal(cached, editor.memory.generate(**rows, **{**options, "use_cache": False}))


def test_each_memory_has_a_state_of_its_own_on_the_cache(stack):
    beneath, editor = stack
    ids = tiny_tokenizer()(TAUGHT, return_tensors="pt")["input_ids"]
    whole = logits(editor.memory, TAUGHT)
    with torch.no_grad():
        cache = DynamicCache()
        parts = [editor.memory(input_ids=part, past_key_values=cache, use_cache=True).logits for part in ids.split(2, dim=1)]
        assert_close(torch.cat(parts, dim=1), whole)
        assert cache.engram_states.keys() == {beneath.owner_token, editor.memory.owner_token}
        twin = copy.deepcopy(cache)
        with editor.memory.disable_engram():  # the one beneath goes on, this one has not seen the position
            editor.memory(input_ids=ids[:, :1], past_key_values=cache, use_cache=True)
        assert cache.engram_states.keys() == {beneath.owner_token}
        with pytest.raises(AttachError, match="this memory has seen 0"):
            editor.memory(input_ids=ids[:, :1], past_key_values=cache, use_cache=True)
        editor.memory(input_ids=ids[:, :1], past_key_values=twin, use_cache=True)


def test_they_come_off_in_the_order_in_which_they_came(stack):
    beneath, editor = stack
    base = beneath.base_model
    with editor.memory.disable_engram():
        before = logits(editor.memory, TAUGHT)
    with pytest.raises(AttachError, match="attached on top of this one"):
        beneath.unload()
    with pytest.raises(AttachError, match="in place of the model"):
        get_engram_model(base, tiny_config(), tiny_tokenizer())
    with pytest.raises(AttachError, match="in place of the model"):
        get_engram_model(beneath, tiny_config(), tiny_tokenizer())  # something is on top of that one already
    assert editor.memory.unload() is beneath
    assert any(parameter.requires_grad for parameter in beneath.engrams.parameters())
    assert torch.equal(logits(beneath, TAUGHT), before)
    assert beneath.unload() is base
    with pytest.raises(AttachError, match="was unloaded"):
        get_engram_model(beneath, tiny_config(), tiny_tokenizer())
    tiny_memory(base).unload()


def test_a_saved_memory_wants_the_one_beneath_again(stack, tmp_path):
    beneath, editor = stack
    beneath.save_pretrained(tmp_path / "trained")
    editor.save(tmp_path / "facts")
    expected, rows = logits(editor.memory, TAUGHT), tensors(editor)

    def again(**changes):
        return EngramModel.from_pretrained(model(), tmp_path / "trained", tiny_tokenizer(), **changes)

    loaded = MemoryEditor.load(again(), tmp_path / "facts", tiny_tokenizer())
    assert torch.equal(logits(loaded.memory.eval(), TAUGHT), expected)
    assert same(tensors(loaded), rows)
    saved = json.loads((tmp_path / "facts" / "engram.json").read_text())["base_model"]["memory"]
    assert saved["folder"] == str(tmp_path / "trained")
    alone = model()
    with pytest.raises(
        FingerprintError, match=r"memory beneath: saved with one \(.*this model has none.*is attached to that one"
    ):
        MemoryEditor.load(alone, tmp_path / "facts", tiny_tokenizer())
    with pytest.raises(FingerprintError, match="it differs in reader_sha256, rows_sha256"):
        MemoryEditor.load(trained(seed=1), tmp_path / "facts", tiny_tokenizer())
    MemoryEditor.load(alone, tmp_path / "facts", tiny_tokenizer(), allow_other_base=True)
    lone = MemoryEditor.create(model(), tiny_tokenizer())
    lone.save(tmp_path / "lone")
    with pytest.raises(FingerprintError, match="saved with none, this model has one"):
        MemoryEditor.load(again(), tmp_path / "lone", tiny_tokenizer())
    with pytest.raises(FingerprintError, match="differ in base_model"):
        loaded.merge(tmp_path / "lone")


def test_a_memory_beneath_that_an_older_version_described_is_the_same(stack, tmp_path):
    beneath, editor = stack
    editor.save(tmp_path)
    editor.memory.unload()
    description = json.loads((tmp_path / "engram.json").read_text())
    del description["base_model"]["memory"]["engram_config"]["boundary_ids"]  # a field that it did not know
    (tmp_path / "engram.json").write_text(json.dumps(description))
    assert all(MemoryEditor.load(beneath, tmp_path, tiny_tokenizer()).verify().values())


@pytest.mark.parametrize("damage", ["a text", {"folder": 3}, {"memory": [1]}, {}, {"folder": "x", "engram_config": 1}])
def test_a_damaged_account_of_the_memory_beneath_is_one_clear_error(stack, tmp_path, damage):
    beneath, editor = stack
    editor.save(tmp_path)
    editor.memory.unload()
    description = json.loads((tmp_path / "engram.json").read_text())
    description["base_model"]["memory"] = damage
    (tmp_path / "engram.json").write_text(json.dumps(description))
    with pytest.raises((CheckpointError, FingerprintError), match="beneath"):
        MemoryEditor.load(beneath, tmp_path, tiny_tokenizer())


def test_facts_over_facts():
    lower = MemoryEditor.create(model(), tiny_tokenizer())
    lower.teach(FACTS[:1])
    upper = MemoryEditor.create(lower.memory, tiny_tokenizer(), seed=1)
    upper.teach(FACTS[1:])
    assert all(upper.verify().values())
    with upper.holdings.evaluating():
        assert all(lower.verify().values())


def test_embeddings_in_place_of_ids_address_both(stack):
    _, editor = stack
    ids = tiny_tokenizer()(TAUGHT, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        given = editor.memory.get_input_embeddings()(ids)
        got = editor.memory(inputs_embeds=given, engram_input_ids=ids, use_cache=False).logits
    assert torch.equal(got, logits(editor.memory, TAUGHT))


def test_a_copy_is_a_stack_of_its_own(stack):
    beneath, editor = stack
    expected = logits(editor.memory, TAUGHT)
    twin = copy.deepcopy(editor.memory)
    with torch.no_grad():
        for parameter in beneath.engrams.parameters():
            parameter.zero_()
    assert torch.equal(logits(twin, TAUGHT), expected)
    assert twin.unload().unload() is twin.base_model


def test_what_cannot_be_is_refused(stack):
    _, editor = stack
    with pytest.raises(AttachError, match="on top of another"):
        StaticDecoder(editor.memory, 32)
