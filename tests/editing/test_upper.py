import pytest
import torch

from engram import EngramConfig, get_engram_model
from engram.editing.keys import KeyedPrompt
from engram.editing.upper import LOUDER, UpperModel, answer_logits, prompt_tensors
from engram.testing import assert_close, tiny_model, tiny_tokenizer
from tests.versions import MODEL_TYPES

PROMPTS = [
    KeyedPrompt("a", (0, 5, 6, 7), (8, 9, 0), 3),
    KeyedPrompt("b", (0, 15, 16, 17, 18, 19), (20, 0), 3),
    KeyedPrompt("c", (0, 25, 26), (27, 28, 29, 0), 3),
]


def write_rows(memory):
    """Random rows for every planned n-gram, so that the memory is heard."""
    from engram.editing.keys import plan_rows

    for layer, planned in plan_rows(memory.mapping, PROMPTS).items():
        table = memory.engrams[layer].table
        rows, where = planned.row_ids.flatten().unique(return_inverse=True)
        tags = torch.zeros(len(rows), dtype=torch.int32).scatter(0, where, planned.tags.flatten())
        table.insert(rows, tags, torch.randn(len(rows), table.dim))


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_the_shortcut_gives_the_whole_models_logits(model_type):
    torch.manual_seed(0)
    config = EngramConfig.for_teaching(layer_ids=(1, 2), pad_id=1, max_ngram_size=8)
    memory = get_engram_model(tiny_model(model_type), config, tiny_tokenizer())
    write_rows(memory)
    ids, mask, answer = prompt_tensors(memory, PROMPTS)
    with torch.no_grad():
        whole = memory(input_ids=ids, attention_mask=mask, use_cache=False).logits
        upper = UpperModel(memory, PROMPTS)
        members = torch.tensor([2, 0])
        got = upper.logits(members, members)
        assert_close(got, whole[members][answer[members]], 1e-5)
        assert_close(answer_logits(memory, ids, mask, answer), whole[answer], 1e-5)
        with memory.disable_engram():
            off = memory(input_ids=ids, attention_mask=mask, use_cache=False).logits
        assert not torch.allclose(whole[answer], off[answer], atol=1e-3)
        assert torch.equal(memory(input_ids=ids, attention_mask=mask, use_cache=False).logits, whole)  # the blocks are back
    targets, owner = upper.targets(members)
    assert targets.tolist() == [27, 28, 29, 0, 8, 9, 0]
    assert owner.tolist() == [0, 0, 0, 0, 1, 1, 1]


def test_streams_of_others_come_louder():
    memory = get_engram_model(tiny_model(), EngramConfig.for_teaching(layer_ids=(2,), pad_id=1), tiny_tokenizer())
    upper = UpperModel(memory, PROMPTS)
    seen = []
    handle = upper._first.register_forward_pre_hook(lambda _, args, kwargs: seen.append(args[0]), with_kwargs=True)
    upper.logits(torch.tensor([0, 1]), torch.tensor([0, 2]))
    handle.remove()
    assert torch.equal(seen[0], torch.stack([upper.stream[0], upper.stream[2] * LOUDER]))


def test_gradients_equal_those_of_the_whole_model():
    config = EngramConfig.for_teaching(layer_ids=(1,), pad_id=1, max_ngram_size=8)
    memory = get_engram_model(tiny_model(), config, tiny_tokenizer())
    write_rows(memory)
    table = memory.engrams["1"].table
    table.weight.requires_grad_()
    ids, mask, answer = prompt_tensors(memory, PROMPTS)
    memory(input_ids=ids, attention_mask=mask, use_cache=False).logits[answer].square().sum().backward()
    expected, table.weight.grad = table.weight.grad, None
    everyone = torch.arange(3)
    UpperModel(memory, PROMPTS).logits(everyone, everyone).square().sum().backward()
    assert_close(table.weight.grad, expected, 1e-4)


def test_forward_functions_of_single_blocks_are_put_back():
    memory = get_engram_model(tiny_model(), EngramConfig.for_teaching(layer_ids=(2,), pad_id=1), tiny_tokenizer())
    patched, plain = memory.base_model.model.layers[:2]
    calls, own = [], patched.forward
    patched.forward = given = lambda *args, **kwargs: calls.append(1) or own(*args, **kwargs)
    members = torch.arange(3)
    upper = UpperModel(memory, PROMPTS)
    calls.clear()
    upper.logits(members, members)
    assert not calls
    assert patched.__dict__["forward"] is given
    assert "forward" not in plain.__dict__
