"""Memories of every variant on whole models: silent when new, decoded as prefilled, trained, saved, traced."""

import json

import pytest
import torch

from engram import EngramConfig, EngramModel, FingerprintError, MemoryEditor, get_engram_model
from engram.checkpoint import DESCRIPTION_NAME
from engram.editing import fit_reader_to_head
from engram.editing.why import explain
from engram.evaluation import trace_text
from engram.hashing import build_mapping
from engram.models import StaticDecoder
from engram.testing import assert_close, tiny_config, tiny_memory, tiny_model, tiny_tokenizer
from tests.editing.helpers import FACTS

FINGERPRINT = "2a10bae1f04f0db155ce4e010114581dc911c9a39c84f4b70fbf7498c20481d0"
"""Of ``tiny_config()`` before any variant existed."""
FINGERPRINT_RAW = "3fb4fbf1b3f1e61cb54325b5bb981882dc73ec05fd29d39077383fe23033da12"
"""The same with raw ids."""
NEW_FIELDS = ("fuse", "branch_gates", "layer_orders", "boundary_ids")

VARIANTS = {
    "add": {"fuse": "add"},
    "concat": {"fuse": "concat"},
    "shared gate": {"branch_gates": False},
    "orders by layer": {"layer_orders": {0: [3], 2: [2]}},
    "raw ids": {"hash_spec": "exact_v1"},
    "4-grams": {"max_ngram_size": 4},
    "boundaries": {"max_ngram_size": 4, "boundary_ids": list(range(2, 300, 5))},
    "all at once": {
        "fuse": "concat",
        "branch_gates": False,
        "layer_orders": {2: [3]},
        "use_conv": False,
        "hash_spec": "exact_v1",
    },
}
variants = pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
models = pytest.mark.parametrize("model_type", ["llama", "deepseek_v4"])  # one residual stream, four


def batch():
    rows = tiny_tokenizer()(["def lookup(self, ids): return", "The memory, the"], return_tensors="pt", padding=True)
    return {"input_ids": rows["input_ids"], "attention_mask": rows["attention_mask"]}


@torch.no_grad()
def chunked(memory, ids, sizes):
    cache, parts, start = None, [], 0
    for size in sizes:
        out = memory(input_ids=ids[:, start : start + size], past_key_values=cache, use_cache=True)
        cache, start = out.past_key_values, start + size
        parts.append(out.logits)
    return torch.cat(parts, dim=1)


@models
@variants
def test_silent_when_new_and_decoded_as_prefilled(model_type, changes):
    model, inputs = tiny_model(model_type), batch()
    with torch.no_grad():
        before = model(**inputs).logits
        memory = get_engram_model(model, tiny_config(**changes), tiny_tokenizer())
        assert torch.equal(memory(**inputs).logits, before)
        memory.unload()
        memory = tiny_memory(model, **changes)
        assert not torch.allclose(memory(**inputs).logits, before, atol=1e-3)
        ids = inputs["input_ids"][:1]
        length = ids.shape[1]
        whole = memory(input_ids=ids, use_cache=False).logits
        # sparse attention may round differently in chunks: the base model's own error is the yardstick
        ways = ([1] * length, [4, 1, length - 5])
        with memory.disable_engram():
            base = memory(input_ids=ids, use_cache=False).logits
            errors = [float((chunked(memory, ids, sizes) - base).abs().max()) for sizes in ways]
        for sizes, error in zip(ways, errors):
            assert_close(chunked(memory, ids, sizes), whole, max(1e-5, 20 * error))


@models
@variants
def test_saved_and_loaded_it_says_the_same(model_type, changes, tmp_path):
    memory, inputs = tiny_memory(tiny_model(model_type), **changes), batch()
    memory.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / DESCRIPTION_NAME).read_text())["engram_config"]
    assert EngramConfig.from_dict(saved) == memory.engram_config
    loaded = EngramModel.from_pretrained(tiny_model(model_type), tmp_path, tiny_tokenizer())
    assert loaded.engram_config == memory.engram_config
    assert set(loaded.engrams.state_dict()) == set(memory.engrams.state_dict())
    with torch.no_grad():
        assert_close(loaded(**inputs).logits, memory(**inputs).logits, 1e-6)


@models
@variants
def test_every_parameter_is_trained(model_type, changes):
    memory, inputs = tiny_memory(tiny_model(model_type), **changes), batch()
    memory.train()
    memory(**inputs, labels=inputs["input_ids"], use_cache=False).loss.backward()
    for name, parameter in memory.engrams.named_parameters():
        assert parameter.grad is not None, name
        gradient = parameter.grad.to_dense() if parameter.grad.is_sparse else parameter.grad
        assert torch.count_nonzero(gradient), name


@variants
def test_decoded_on_fixed_buffers(changes):
    memory, inputs = tiny_memory(**changes), batch()
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    decoder = StaticDecoder(memory, max_length=64)
    decoder.prefill(ids, mask)
    for step in range(4):
        tokens = torch.randint(2, 300, (2,), generator=torch.Generator().manual_seed(step))
        ids, mask = torch.cat([ids, tokens[:, None]], 1), torch.cat([mask, mask.new_ones((2, 1))], 1)
        with torch.no_grad():
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            expected = memory(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits[:, -1]
        assert_close(decoder.step(tokens), expected)


@models
@variants
def test_traced(model_type, changes):
    memory = tiny_memory(tiny_model(model_type), **changes)
    trace = trace_text(memory, tiny_tokenizer(), "def lookup(self, ids)")
    config = memory.engram_config
    last = trace.tokens[-1]
    orders = sorted({n for layer in config.layer_ids for n in config.orders_of(layer)})
    assert list(last.ngrams) == orders[: len(last.ngrams)]
    assert last.ngrams or config.boundary_ids
    for t, token in enumerate(trace.tokens):  # as many tokens as n-grams reach back, and none behind a boundary
        reach = next((k for k in range(t + 1) if trace.tokens[t - k].token_id in config.boundary_ids), t + 1)
        assert list(token.ngrams) == [n for n in orders if n <= reach]
    for layer in last.layers:
        assert len(layer.rows) == config.num_heads_of(layer.layer_id)
        assert len(layer.gate) == config.hc_mult
        assert config.fuse == "gate" or set(layer.gate) == {1.0}


def test_what_was_saved_before_there_were_variants(tmp_path):
    memory, inputs = tiny_memory(), batch()
    memory.save_pretrained(tmp_path)
    fields = json.loads((tmp_path / DESCRIPTION_NAME).read_text())
    assert fields["fingerprint"] == FINGERPRINT == build_mapping(tiny_config(), tiny_tokenizer()).fingerprint
    assert build_mapping(tiny_config(hash_spec="exact_v1"), tiny_tokenizer()).fingerprint == FINGERPRINT_RAW
    for name in NEW_FIELDS:
        del fields["engram_config"][name]
    (tmp_path / DESCRIPTION_NAME).write_text(json.dumps(fields))
    loaded = EngramModel.from_pretrained(tiny_model(), tmp_path, tiny_tokenizer())
    assert loaded.engram_config == memory.engram_config
    assert loaded.mapping.fingerprint == FINGERPRINT
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, memory(**inputs).logits)
    fields["engram_config"]["layer_orders"] = {"0": [2]}
    (tmp_path / DESCRIPTION_NAME).write_text(json.dumps(fields))
    with pytest.raises(FingerprintError, match="another tokenizer or hash mapping"):
        EngramModel.from_pretrained(tiny_model(), tmp_path, tiny_tokenizer())


def test_facts_can_be_taught_without_a_gate_and_explained():
    model = tiny_model(hidden_size=64, intermediate_size=96)
    config = EngramConfig.for_teaching(fuse="add", layer_ids=(2,), pad_id=1)
    editor = MemoryEditor(get_engram_model(model, config, tiny_tokenizer()), tiny_tokenizer())
    editor.teach(FACTS[:2])
    assert all(editor.verify().values())
    explanation = explain(editor, "KEY:alpha 17")
    assert explanation.answer == "blue window"
    gates = [hit.gate for token in explanation.tokens for hit in token.hits]
    assert gates
    assert all(gate == [1.0] for gate in gates)


def test_a_fitted_reader_needs_no_gate():
    config = EngramConfig.for_teaching(fuse="add", layer_ids=(2,), pad_id=1, reader="trained", n_embed_per_ngram=16)
    memory = get_engram_model(tiny_model(), config, tiny_tokenizer())
    fit_reader_to_head(memory)
    assert not any(p.requires_grad for p in memory.engrams["2"].value_proj.parameters())
