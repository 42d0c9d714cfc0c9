"""Decoding on fixed buffers equals decoding on growing ones, and the buffers do not move."""

import pytest
import torch

from engram import AttachError, EngramError, TableConfig, TableError, get_engram_model, native
from engram.models import StaticDecoder
from engram.models.static_decoding import StaticTail
from engram.testing import assert_close, tiny_config, tiny_memory, tiny_model, tiny_tokenizer
from tests.editing.helpers import FACTS, make_editor

TEXTS = ["def lookup(self, ids): return self", "The memory", "CAPITAL:France is the capital of"]


def prompts(texts=TEXTS):
    rows = tiny_tokenizer()(texts, return_tensors="pt", padding=True)
    return rows["input_ids"], rows["attention_mask"]


@torch.no_grad()
def logits_of(memory, ids, mask):
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    return memory(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits[:, -1]


@pytest.mark.parametrize("prefetch", [None, True])
@pytest.mark.parametrize("changes", [{}, {"use_conv": False}, {"max_ngram_size": 5, "kernel_size": 2}])
def test_steps_equal_whole_passes_and_buffers_stay(changes, prefetch):
    memory = tiny_memory(**changes)
    memory.prefetch_rows = prefetch
    ids, mask = prompts()
    decoder = StaticDecoder(memory, max_length=64)
    assert_close(decoder.prefill(ids, mask), logits_of(memory, ids, mask))
    seen = set()
    for step in range(6):
        tokens = torch.randint(2, 300, (3,), generator=torch.Generator().manual_seed(step))
        ids, mask = torch.cat([ids, tokens[:, None]], 1), torch.cat([mask, torch.ones(3, 1, dtype=mask.dtype)], 1)
        assert_close(decoder.step(tokens), logits_of(memory, ids, mask))
        buffers = [decoder.tokens, decoder.logits, *decoder._moving(), *decoder.prefetcher._buffers.values()]
        seen.add(tuple(buffer.data_ptr() for buffer in buffers))
        assert bool(decoder.prefetcher._buffers) == bool(prefetch)
    assert len(seen) == 1


def test_a_second_prompt_starts_anew():
    memory = tiny_memory()
    decoder = StaticDecoder(memory, max_length=32)
    for texts in (TEXTS[:1], TEXTS[1:]):
        ids, mask = prompts(texts)
        assert_close(decoder.prefill(ids, mask), logits_of(memory, ids, mask))
        tokens = torch.full((len(texts),), 7)
        longer = torch.cat([ids, tokens[:, None]], 1), torch.cat([mask, torch.ones(len(texts), 1, dtype=mask.dtype)], 1)
        assert_close(decoder.step(tokens), logits_of(memory, *longer))
    with pytest.raises(AttachError, match="of which this memory has seen 0"):
        memory(input_ids=ids[:, :1], past_key_values=decoder.cache)


def test_what_is_put_back_after_a_capture_is_all_that_moved():
    """Steps taken to make a graph must leave no trace: the next step gives what it would have given."""
    memory, (ids, mask) = tiny_memory(), prompts()
    decoder = StaticDecoder(memory, max_length=64)
    decoder.prefill(ids, mask)
    before = [tensor.clone() for tensor in decoder._moving()]
    decoder.tokens.fill_(9)
    decoder._forward()
    for tensor, saved in zip(decoder._moving(), before):
        assert not torch.equal(tensor, saved)
        tensor.copy_(saved)
    tokens = torch.tensor([7, 8, 9])
    longer = torch.cat([ids, tokens[:, None]], 1), torch.cat([mask, torch.ones(3, 1, dtype=mask.dtype)], 1)
    assert_close(decoder.step(tokens), logits_of(memory, *longer))


@pytest.mark.parametrize("with_native", [True, False])
def test_verified_rows_on_fixed_buffers(monkeypatch, with_native):
    """Without the native core the search runs as on a GPU: no count is asked for, and positions that found nothing stay silent."""
    memory = get_engram_model(tiny_model(), tiny_config(verify_rows=True, longest_only=True, use_bias=False), tiny_tokenizer())
    ids, mask = prompts()
    with torch.no_grad():
        for parameter in memory.engrams.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)) * 0.5)
    for layer, engram in memory.engrams.items():
        hash_ids, tags = memory.mapping.hash_with_tags(ids)[int(layer)]
        rows = engram.multi_head_embedding.row_ids(hash_ids)[:, -3:].flatten()
        unique, first = torch.unique(rows, return_inverse=True)
        owners = torch.zeros(len(unique), dtype=torch.int32).scatter_(0, first, tags[:, -3:].flatten())
        engram.table.insert(unique, owners, torch.randn(len(unique), 4))
    memory.eval()
    if not with_native:
        monkeypatch.setattr(native, "_core", None)
    decoder = StaticDecoder(memory, max_length=64)
    assert_close(decoder.prefill(ids, mask), logits_of(memory, ids, mask))
    for token in (5, *ids[0, -4:].tolist()):
        tokens = torch.full((3,), token)
        ids, mask = torch.cat([ids, tokens[:, None]], 1), torch.cat([mask, torch.ones(3, 1, dtype=mask.dtype)], 1)
        assert_close(decoder.step(tokens), logits_of(memory, ids, mask))


def test_a_memory_that_is_switched_off():
    memory, (ids, mask) = tiny_memory(), prompts()
    decoder = StaticDecoder(memory, max_length=64)
    longer = torch.cat([ids, ids[:, -1:]], 1), torch.cat([mask, mask[:, -1:]], 1)
    with memory.disable_engram():
        assert_close(decoder.prefill(ids, mask), logits_of(memory, ids, mask))
        assert_close(decoder.step(ids[:, -1]), logits_of(memory, *longer))


def test_host_rows_on_fixed_buffers():
    memory = get_engram_model(tiny_model(), tiny_config(table_init="normal"), tiny_tokenizer(), TableConfig(tier="host")).eval()
    memory.prefetch_rows = True
    ids, mask = prompts()
    decoder = StaticDecoder(memory, max_length=64)
    decoder.prefill(ids, mask)
    longer = torch.cat([ids, ids[:, -1:]], 1), torch.cat([mask, mask[:, -1:]], 1)
    assert_close(decoder.step(ids[:, -1]), logits_of(memory, *longer))


def test_a_model_on_several_devices_is_refused():
    memory = tiny_memory()
    memory.base_model.lm_head.to("meta")  # any second device
    with pytest.raises(AttachError, match="got a model on cpu, meta, expected one on a single device"):
        StaticDecoder(memory, 8)


def test_what_fixed_buffers_cannot_do_is_refused():
    with pytest.raises(AttachError, match="got layers of sliding_attention, expected full_attention only"):
        StaticDecoder(tiny_memory(tiny_model("mistral", sliding_window=16)), max_length=8)
    for model_type in ("gemma3_text", "gemma3", "gpt_neo", "mamba"):
        with pytest.raises(AttachError, match="expected full_attention only"):
            StaticDecoder(tiny_memory(tiny_model(model_type)), 64)
    with pytest.raises(AttachError, match="takes no mask for each position"):
        StaticDecoder(tiny_memory(tiny_model("bloom")), 64)
    tail = StaticTail(None, 3, torch.zeros(2, 1), 5)
    assert torch.equal(tail.last(2), torch.full((2, 2), 5.0))
    tail.append(torch.tensor([[1.0, 2], [3, 4]]))
    tail.map_batch(lambda x: x.flip(0))
    assert torch.equal(tail.buffer, torch.tensor([[5.0, 3, 4], [5, 1, 2]]))
    with pytest.raises(EngramError, match="cannot go back"):
        tail.trim(1)


def test_rows_that_pass_through_the_cpu_are_refused_before_a_capture(tmp_path):
    place = TableConfig(tier="mmap", path=str(tmp_path / "rows"))
    memory = get_engram_model(tiny_model(), tiny_config(), tiny_tokenizer(), place).eval()
    decoder = StaticDecoder(memory, max_length=32, capture=True)
    decoder.prefill(prompts(TEXTS[:1])[0])
    with pytest.raises(TableError, match="pass through the CPU, which a graph cannot repeat"):
        decoder.step(torch.tensor([5]))


def test_a_graph_is_known_to_be_old_when_rows_moved(monkeypatch):
    """A graph replays addresses; what is counted here is how often one would be made."""
    editor = make_editor()
    editor.teach(FACTS[:1])
    decoder, made = StaticDecoder(editor.memory, 32, capture=True), []

    class Graph:
        def replay(self):
            decoder._forward()

    monkeypatch.setattr(decoder, "_captured", lambda: made.append(1) or Graph())
    ids = editor.tokenizer("KEY:", return_tensors="pt")["input_ids"]
    tokens = decoder.prefill(ids).argmax(-1)
    decoder.step(tokens)
    decoder.step(tokens)
    assert len(made) == 1
    editor.teach(FACTS[1:2])
    decoder.step(tokens)
    decoder.step(tokens)
    assert len(made) == 2
