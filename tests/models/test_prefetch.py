"""A model whose rows are fetched when a pass starts computes what it would compute without, gradients included."""

import pytest
import torch

from engram import TableConfig, get_engram_model, native
from engram.models import lookahead
from engram.tables import RowPrefetcher
from engram.testing import assert_close, tiny_config, tiny_memory, tiny_model, tiny_tokenizer
from tests.versions import needs_checkpointing

IDS = torch.randint(2, 300, (2, 12), generator=torch.Generator().manual_seed(5))


@pytest.fixture
def started(monkeypatch):
    """Which tables were prefetched from."""
    tables, start = [], RowPrefetcher.start
    monkeypatch.setattr(RowPrefetcher, "start", lambda self, table, *rest: tables.append(table) or start(self, table, *rest))
    return tables


def placed(tier, path):
    config = TableConfig(tier=tier, path=str(path) if tier == "mmap" else None)
    memory = get_engram_model(tiny_model(), tiny_config(table_init="normal"), tiny_tokenizer(), config)
    for engram in memory.engrams.values():
        table = engram.table
        table.load_rows(0, torch.randn(table.rows, table.dim, generator=torch.Generator().manual_seed(3)))
    return memory.eval()


@pytest.mark.parametrize("tier", ["device", "host", "mmap"])
def test_logits_and_generation_are_the_same(tier, tmp_path, started):
    memory, outcomes = placed(tier, tmp_path), []
    for mode in (False, True, None):
        memory.prefetch_rows = mode
        started.clear()
        with torch.no_grad():
            outcomes.append(
                (memory(input_ids=IDS, use_cache=False).logits, memory.generate(IDS, max_new_tokens=6, do_sample=False))
            )
        assert bool(started) == (tier == "mmap" if mode is None else mode)
    for logits, tokens in outcomes[1:]:
        assert torch.equal(logits, outcomes[0][0])
        assert torch.equal(tokens, outcomes[0][1])
    memory.unload()
    with torch.no_grad():  # nothing is left running
        memory.base_model(input_ids=IDS)


@pytest.mark.parametrize("checkpointing", [False, pytest.param(True, marks=needs_checkpointing)])
def test_gradients_are_the_same(checkpointing, started):
    outcomes = []
    for mode in (False, True):
        memory = tiny_memory(tiny_model())
        memory.base_model.requires_grad_(True)
        memory.prefetch_rows = mode
        memory.train()
        if checkpointing:
            memory.activation_checkpointing_enable()
        started.clear()
        first = memory(input_ids=IDS, labels=IDS, use_cache=False).loss
        second = memory(input_ids=IDS.flip(1), labels=IDS.flip(1), use_cache=False).loss
        (first + 2 * second).backward()
        assert len(started) == (4 if mode and not checkpointing else 0)
        gradients = {name: p.grad for name, p in memory.named_parameters() if p.grad is not None}
        tables = [gradient for gradient in gradients.values() if gradient.is_sparse]
        assert len(tables) == 2
        outcomes.append({name: g.to_dense() if g.is_sparse else g for name, g in gradients.items()})
    assert outcomes[0].keys() == outcomes[1].keys()
    for name, gradient in outcomes[0].items():
        assert torch.equal(outcomes[1][name], gradient), name


def written_memory():
    memory = get_engram_model(
        tiny_model(), tiny_config(verify_rows=True, use_bias=False, layer_ids=(0, 1, 2)), tiny_tokenizer()
    )
    rng = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in memory.engrams.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=rng) * 0.5)
    for layer in (0, 1):  # nothing is written in the last
        home = memory.engrams[str(layer)].multi_head_embedding
        hash_ids, tags = memory.mapping.hash_with_tags(IDS)[layer]
        at = [0, 3, 7] if layer == 0 else [11]
        rows = home.row_ids(hash_ids)[0, at, :4].flatten()
        unique, where = torch.unique(rows, return_inverse=True)
        owners = torch.zeros(len(unique), dtype=torch.int32).scatter_(0, where, tags[0, at, :4].flatten())
        home.embedding.insert(unique, owners, torch.randn(len(unique), 4, generator=rng))
    return memory.eval()


def test_without_the_native_search_the_host_waits_once_for_all_layers(monkeypatch):
    """The path of a GPU: one count for all layers, no look at single slots, and the same logits."""
    memory, waits, counts = written_memory(), [], lookahead._counts
    route = torch.tensor([True, False])
    mask = torch.ones_like(IDS)
    mask[1, :4] = 0

    def outcomes():
        with torch.no_grad():
            plain = memory(input_ids=IDS, attention_mask=mask, use_cache=False).logits
            with memory.record() as traces, memory.routed(route):
                routed = memory(input_ids=IDS, attention_mask=mask, use_cache=False).logits
            return plain, routed, {layer: trace["gate"] for layer, trace in traces.items()}

    expected = outcomes()
    monkeypatch.setattr(native, "_core", None)
    monkeypatch.setattr(lookahead, "_counts", lambda *args: waits.append(counts(*args)) or counts(*args))
    got = outcomes()
    assert len(waits) == 2
    assert waits[0] == waits[1]
    assert waits[0][1] == 1
    assert waits[0][0] >= 3
    for one, other in zip(got[:2], expected[:2]):
        assert_close(one, other)
    for layer in expected[2]:
        assert_close(got[2][layer], expected[2][layer])


def test_where_nothing_is_found_nothing_is_computed(monkeypatch):
    memory = written_memory()
    monkeypatch.setattr(native, "_core", None)
    other = torch.full((2, 5), 301)
    with torch.no_grad(), memory.disable_engram():
        base = memory(input_ids=other, use_cache=False).logits
    with torch.no_grad():
        assert torch.equal(memory(input_ids=other, use_cache=False).logits, base)
