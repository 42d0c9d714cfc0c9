"""Losses made of gates."""

import pytest
import torch

from engram import Engram, get_engram_model
from engram.optim import build_optimizer
from engram.testing import assert_close, tiny_config, tiny_memory, tiny_model, tiny_tokenizer
from tests.versions import needs_checkpointing

IDS = torch.randint(2, 300, (3, 10), generator=torch.Generator().manual_seed(0))


def entropy(gate):
    return -(gate * gate.log() + (1 - gate) * (1 - gate).log()).mean()


def penalty_of(memory, **options):
    with memory.record(grad=True) as traces:
        loss = memory(input_ids=IDS, labels=IDS, use_cache=False, **options).loss
    return loss, sum(entropy(trace["gate"]) for trace in traces.values())


@pytest.mark.parametrize("checkpointing", [False, pytest.param(True, marks=needs_checkpointing)])
@pytest.mark.parametrize("padded", [False, True])
def test_a_penalty_on_gates_moves_what_makes_them(checkpointing, padded):
    memory = tiny_memory(tiny_model())
    memory.train()
    if checkpointing:
        memory.base_model.activation_checkpointing_enable()
    options = {"attention_mask": (torch.arange(10) >= torch.tensor([[0], [2], [5]])).long()} if padded else {}
    optimizer = build_optimizer(memory, 1e-2)
    found = []
    for _ in range(5):
        _, penalty = penalty_of(memory, **options)
        penalty.backward()
        layer = memory.engrams["2"]
        parts = [layer.key_projs[0].weight, layer.norm1[0].weight, layer.norm2[0].weight]
        assert all(part.grad is not None and part.grad.abs().sum() > 0 for part in parts)
        assert layer.multi_head_embedding.embedding.weight.grad._nnz() > 0
        optimizer.step()
        found.append(float(penalty.detach()))
    assert found == sorted(found, reverse=True)
    assert found[-1] < found[0]


@needs_checkpointing
def test_a_loss_and_a_penalty_come_back_together():
    """Both at once give the sum of what each gives alone, recomputed blocks included."""
    gradients = []
    for parts in ((0, 1), (0,), (1,)):
        memory = tiny_memory(tiny_model())
        memory.train()
        memory.base_model.activation_checkpointing_enable()
        terms = penalty_of(memory)
        sum(terms[part] for part in parts).backward()
        gradients.append(memory.engrams["2"].key_projs[0].weight.grad)
    assert_close(gradients[0], gradients[1] + gradients[2], 1e-5)


def test_gates_with_gradients_are_those_without():
    memory = tiny_memory(tiny_model())
    with memory.record() as plain:
        loss = memory(input_ids=IDS, labels=IDS, use_cache=False).loss
    with memory.record(grad=True) as kept:
        assert_close(memory(input_ids=IDS, labels=IDS, use_cache=False).loss, loss, 1e-6)
    for layer_id, trace in plain.items():
        assert trace.keys() == kept[layer_id].keys() == {"hash_ids", "gate", "value", "stream", "added"}
        for name in ("gate", "value", "stream", "added"):
            assert_close(kept[layer_id][name].detach(), trace[name], 1e-5)
            assert not trace[name].requires_grad
        assert all(kept[layer_id][name].requires_grad for name in ("gate", "value", "added"))


def test_an_inner_recording_leaves_the_outer_as_it_was():
    memory = tiny_memory(tiny_model())
    with memory.record(grad=True) as outer:
        with memory.record():
            memory(input_ids=IDS)
        memory(input_ids=IDS)
    assert outer[2]["gate"].requires_grad


def test_what_was_added_is_what_the_stream_gained():
    memory = tiny_memory(tiny_model())
    seen = []
    memory.base_model.model.layers[2].register_forward_pre_hook(lambda block, args: seen.append(args[0].detach()))
    with memory.record() as traces:
        memory(input_ids=IDS)
    trace = traces[2]
    assert_close(trace["stream"].squeeze(2) + trace["added"], seen[0], 1e-6)
    with memory.record() as traces, memory.routed(torch.tensor([True, False, True])):
        memory(input_ids=IDS)
    assert traces[2]["added"][0].abs().sum() > 0
    assert traces[2]["added"][1].abs().sum() == 0


def test_an_own_gate_has_gradients_too():
    class Halved(Engram):
        def gated_value(self, streams, rows):
            gate, value = super().gated_value(streams, rows)
            return gate / 2, value / 2

    memory = get_engram_model(tiny_model(), tiny_config(table_init="normal"), tiny_tokenizer(), layer_class=Halved)
    _, penalty = penalty_of(memory)
    penalty.backward()
    assert memory.engrams["2"].key_projs[0].weight.grad.abs().sum() > 0
