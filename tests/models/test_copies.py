"""A copy of a model with a memory is a model with a memory of its own."""

import copy

import torch
from torch.optim.swa_utils import AveragedModel

from engram import MemoryEditor
from engram.testing import tiny_memory, tiny_tokenizer
from tests.editing.helpers import FACTS, logits, make_editor, same, tensors

IDS = torch.arange(2, 14).view(2, 6)


@torch.no_grad()
def test_a_trained_memory_is_copied():
    memory = tiny_memory()
    before = memory(input_ids=IDS).logits
    assert torch.equal(AveragedModel(memory)(input_ids=IDS).logits, before)
    other = copy.deepcopy(memory)
    assert torch.equal(other(input_ids=IDS).logits, before)
    options = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(other.generate(input_ids=IDS, **options), memory.generate(input_ids=IDS, **options))
    for parameter in other.engrams.parameters():
        parameter.mul_(2)
    assert torch.equal(memory(input_ids=IDS).logits, before)
    assert not torch.equal(other(input_ids=IDS).logits, before)
    plain = other.unload()
    assert all(p.requires_grad for p in plain.parameters())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in plain.modules())
    assert torch.equal(memory(input_ids=IDS).logits, before)


def test_facts_taught_to_a_copy_stay_there():
    editor = make_editor()
    editor.teach(FACTS[:2])
    other = MemoryEditor(copy.deepcopy(editor.memory), tiny_tokenizer())
    assert torch.equal(logits(other, "KEY:beta 20"), logits(editor, "KEY:beta 20"))
    before, said = tensors(editor), logits(editor, "KEY:alpha 18")
    other.teach(FACTS[2:])
    other.forget(["alpha"])
    assert same(tensors(editor), before)
    assert torch.equal(logits(editor, "KEY:alpha 18"), said)
    assert not torch.equal(logits(other, "KEY:alpha 18"), said)
    assert [list(each.verify().items()) for each in (editor, other)] == [
        [("alpha", True), ("beta", True)],
        [("beta", True), ("door", True)],
    ]
