"""Several texts in one row read as the same texts on their own, gradients included."""

import pytest
import torch
from transformers.generation.continuous_batching.cache import PagedAttentionCache

from engram import AttachError, Fact, get_engram_model
from engram.models.packing import Packing, find_packing
from engram.testing import assert_close, tiny_config, tiny_memory, tiny_model, tiny_tokenizer
from tests.editing.helpers import make_editor
from tests.versions import needs_checkpointing

LENGTHS = (7, 1, 12, 5)


def texts():
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(2, 300, (1, length), generator=generator) for length in LENGTHS]


def packed(parts):
    """Two rows of equal length, with positions that start again."""
    positions = [torch.arange(part.shape[1])[None] for part in parts]
    rows = [torch.cat(group, dim=1) for group in (parts, parts[::-1])]
    return torch.cat(rows), torch.cat([torch.cat(group, dim=1) for group in (positions, positions[::-1])])


def block_mask(positions):
    number = (positions.diff(dim=1, prepend=positions[:, :1] - 1) != 1).cumsum(1)
    length = positions.shape[1]
    return ((number[:, :, None] == number[:, None, :]) & torch.ones(length, length, dtype=torch.bool).tril())[:, None]


@pytest.mark.parametrize("by", ["position_ids", "mask", "masks"])
def test_packed_texts_read_as_texts_on_their_own(by):
    memory, parts = tiny_memory(tiny_model("qwen3" if by == "masks" else "llama")), texts()
    ids, positions = packed(parts)
    mask = block_mask(positions)
    masks = {"position_ids": {}, "mask": {"attention_mask": mask}, "masks": {"attention_mask": {"full_attention": mask}}}
    given = {"position_ids": positions, **masks[by]}

    def step(run):
        memory.zero_grad()
        memory.engrams.requires_grad_(True)
        logits = run()
        (logits * torch.linspace(-1, 1, logits.shape[-1])).sum().backward()
        grads = {n: p.grad.to_dense() for n, p in memory.engrams.named_parameters()}
        return logits.detach(), grads

    def alone():
        logits = [memory(input_ids=part, use_cache=False).logits for part in parts]
        return torch.cat([torch.cat(group, dim=1) for group in (logits, logits[::-1])])

    (got, grads), (expected, expected_grads) = step(lambda: memory(input_ids=ids, use_cache=False, **given).logits), step(alone)
    assert_close(got, expected, 1e-4)
    for name, grad in expected_grads.items():
        assert_close(grads[name], grad, 1e-3)


@torch.no_grad()
def test_padding_before_packed_texts_is_not_read():
    memory, (first, *_, last) = tiny_memory(), texts()
    ids = torch.cat([torch.full((1, 3), 9), first, last], dim=1)
    positions = torch.cat([torch.arange(length) for length in (3, 7, 5)])[None]
    mask = block_mask(positions)
    mask[:, :, :3] = False
    got = memory(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits[:, 3:]
    expected = torch.cat([memory(input_ids=part, use_cache=False).logits for part in (first, last)], dim=1)
    assert_close(got, expected, 1e-4)


@torch.no_grad()
@pytest.mark.parametrize("gap", [1, 3])
def test_texts_with_padding_between_them_are_apart_too(gap):
    memory, (first, *_, last) = tiny_memory(), texts()
    ids = torch.cat([first, torch.full((1, gap), 9), last], dim=1)
    positions = torch.cat([torch.arange(length) for length in (7, gap, 5)])[None]
    mask = block_mask(torch.cat([torch.arange(7), torch.zeros(gap, dtype=torch.int64), torch.arange(5)])[None])
    mask[:, :, 7 : 7 + gap] = False
    got = memory(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    assert_close(got[:, :7], memory(input_ids=first, use_cache=False).logits, 1e-4)
    assert_close(got[:, 7 + gap :], memory(input_ids=last, use_cache=False).logits, 1e-4)


def test_recordings_and_routes_are_by_row():
    memory, parts = tiny_memory(), texts()
    ids, positions = packed(parts)
    with torch.no_grad(), memory.record() as traces:
        memory(input_ids=ids, position_ids=positions, use_cache=False)
        packed_gates = {layer: trace["gate"].clone() for layer, trace in traces.items()}
    with torch.no_grad(), memory.record() as traces:
        memory(input_ids=parts[2], use_cache=False)
        for layer, trace in traces.items():
            assert packed_gates[layer].shape[:2] == ids.shape
            assert_close(packed_gates[layer][:1, 8:20], trace["gate"], 1e-4)
    with torch.no_grad(), memory.routed(torch.tensor([True, False])):
        routed = memory(input_ids=ids, position_ids=positions, use_cache=False).logits
    with torch.no_grad():
        both = memory(input_ids=ids, position_ids=positions, use_cache=False).logits
        with memory.disable_engram():
            off = memory(input_ids=ids, position_ids=positions, use_cache=False).logits
    assert_close(routed[0], both[0])
    assert_close(routed[1], off[1])


def test_a_taught_memory_finds_its_facts_in_packed_rows():
    editor = make_editor()
    editor.teach([Fact(("KEY:alpha 17",), "blue")])
    memory, tokenizer = editor.memory, editor.tokenizer
    parts = [torch.tensor([tokenizer(text)["input_ids"]]) for text in ("the text is", "KEY:alpha 17 blue", "alpha 17 blue")]
    positions = torch.cat([torch.arange(part.shape[1])[None] for part in parts], dim=1)
    with torch.no_grad():
        got = memory(input_ids=torch.cat(parts, dim=1), position_ids=positions, use_cache=False).logits
        expected = torch.cat([memory(input_ids=part, use_cache=False).logits for part in parts], dim=1)
    assert_close(got, expected, 1e-4)


def test_what_cannot_be_told_apart_is_refused():
    memory, (first, *_, last) = tiny_memory(), texts()
    cache = memory(input_ids=first, use_cache=True).past_key_values
    ids = torch.cat([last, last], dim=1)
    with pytest.raises(AttachError, match="packed into rows behind 7 cached positions"):
        memory(input_ids=ids, position_ids=torch.tensor([[7, 8, 9, 10, 11, 0, 1, 2, 3, 4]]), past_key_values=cache)
    packed_cache = memory(input_ids=ids, position_ids=torch.arange(5).repeat(2)[None], use_cache=True).past_key_values
    with pytest.raises(AttachError):
        memory(input_ids=last[:, :1], past_key_values=packed_cache)
    for name in ("generate_batch", "init_continuous_batching", "continuous_batching_context_manager"):
        with pytest.raises(AttachError, match="continuous batching"):
            getattr(memory, name)([[1, 2]])
    with pytest.raises(AttachError, match="paged cache"):
        memory(input_ids=ids, cache=object.__new__(PagedAttentionCache))


def test_rows_of_one_text_are_left_alone():
    ids, positions = torch.ones(2, 5, dtype=torch.int64), torch.arange(3, 8)[None]
    assert find_packing(positions, None, 0, ids, None) is None
    assert find_packing(None, None, 0, ids, None) is None
    assert find_packing(torch.arange(5).expand(3, 2, 5), None, 0, ids, None) is None  # of pictures and text
    padded = torch.tensor([[1, 1, 0, 1, 2], [0, 1, 2, 3, 4]])
    assert find_packing(padded, torch.ones(2, 5), 0, ids, torch.ones(2, 5)) is None  # with a mask positions do not count


def test_a_text_with_padding_inside_is_one_text():
    real = torch.tensor([[True, True, False, False, True, True], [False, False, True, True, True, True]])
    mask = (torch.ones(6, 6, dtype=torch.bool).tril() & real[:, :, None] & real[:, None, :])[:, None]
    assert find_packing(None, mask, 0, torch.ones(2, 6, dtype=torch.int64), real) is None


def test_apart_and_together_are_inverse():
    starts = torch.tensor([[False, False, True, False, True], [True, True, True, True, True]])
    packing, values = Packing(starts), torch.arange(20).view(2, 5, 2)
    assert packing.mask.sum(1).tolist() == [2, 2, 1, 1, 1, 1, 1, 1]
    assert torch.equal(packing.together(packing.apart(values)), values)
    assert packing.of_rows(torch.tensor([3, 4])).tolist() == [3, 3, 3, 4, 4, 4, 4, 4]


def test_generation_goes_by_the_configuration_that_was_set():
    memory = get_engram_model(tiny_model(), tiny_config(), tiny_tokenizer())
    config = type(memory.generation_config)(max_new_tokens=3, do_sample=False, pad_token_id=1, eos_token_id=None)
    memory.generation_config = config
    assert memory.base_model.generation_config is config
    assert memory.generate(input_ids=torch.ones(1, 4, dtype=torch.int64)).shape == (1, 7)


@needs_checkpointing
def test_a_recording_of_packed_texts_outlasts_a_recomputation():
    memory, (ids, positions) = tiny_memory(), packed(texts())
    memory.train().engrams.requires_grad_(True)
    memory.base_model.activation_checkpointing_enable()
    with memory.record() as traces:
        loss = memory(input_ids=ids, position_ids=positions, labels=ids, use_cache=False).loss
        before = {layer: trace["gate"].clone() for layer, trace in traces.items()}
        loss.backward()
    assert all(torch.equal(traces[layer]["gate"], gate) and gate.shape[:2] == ids.shape for layer, gate in before.items())
