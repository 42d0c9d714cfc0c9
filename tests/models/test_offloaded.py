"""Blocks whose weights are elsewhere until they run: on the meta device, with accelerate's hooks."""

from typing import ClassVar

import accelerate
import pytest
import torch

from engram import AttachError, MemoryEditor, get_engram_model
from engram.analysis import Subject
from engram.evaluation.copying import measure_copying
from engram.experiments.held_out import measure
from engram.models import LearnedRouter
from engram.testing import tiny_config, tiny_model, tiny_tokenizer
from tests.editing.helpers import FACTS


def offloaded(blocks, tmp_path):
    model = tiny_model(hidden_size=64, intermediate_size=96)
    places = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    places |= {f"model.layers.{i}": "disk" if i in blocks else "cpu" for i in range(3)}
    return accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=tmp_path)


@pytest.mark.parametrize("blocks", [{2}, {0}, {0, 1, 2}])
def test_facts_are_taught_above_and_at_offloaded_blocks(blocks, tmp_path):
    model = offloaded(blocks, tmp_path)
    assert all(p.is_meta == (i in blocks) for i, block in enumerate(model.model.layers) for p in block.parameters())
    editor = MemoryEditor.create(model, tiny_tokenizer())
    assert all(p.device.type == "cpu" for p in editor.memory.engrams.parameters())
    for _ in range(2):  # accelerate's forward functions are still there after a lesson
        editor.teach(FACTS)
        assert all(editor.verify().values())
    editor.teach(FACTS[:1])


def test_where_the_whole_model_is_offloaded_the_hooks_know(tmp_path):
    model = tiny_model()
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert model.get_input_embeddings().weight.is_meta
    memory = get_engram_model(model, tiny_config(), tiny_tokenizer())
    assert all(p.device.type == "cpu" for p in memory.engrams.parameters())
    assert memory.generate(input_ids=torch.tensor([[5, 6]]), max_new_tokens=2, do_sample=False).shape == (1, 4)


def test_facts_are_taught_to_a_model_that_is_offloaded_as_a_whole(tmp_path, caplog):
    model = tiny_model(hidden_size=64, intermediate_size=96)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    editor = MemoryEditor.create(model, tiny_tokenizer())
    editor.teach(FACTS)
    assert all(editor.verify().values())
    assert editor.why(FACTS[1].prompts[0]).facts
    editor.save(tmp_path)
    editor.memory.unload()
    MemoryEditor.load(model, tmp_path, tiny_tokenizer())
    assert not caplog.records  # nothing was known then either; and `ask` gives generate nothing that transformers warns of
    plain = MemoryEditor.create(tiny_model(hidden_size=64, intermediate_size=96), tiny_tokenizer())
    plain.save(tmp_path / "plain")
    other = tiny_model(hidden_size=64, intermediate_size=96, seed=5)
    accelerate.cpu_offload(other, execution_device=torch.device("cpu"))
    MemoryEditor.load(other, tmp_path / "plain", tiny_tokenizer())
    assert caplog.text.count("nobody can tell whether they are those") == 1


def test_measures_bring_ids_to_where_a_model_that_is_offloaded_computes():
    plain, model = tiny_model(), tiny_model()
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert model.get_input_embeddings().weight.is_meta
    assert measure_copying(model, 4, 2) == pytest.approx(measure_copying(plain, 4, 2))
    prompts = ["the memory", "the text", "of the last", "tokens"]
    routers = [LearnedRouter.fit(one, tiny_tokenizer(), prompts[:2], prompts[2:]) for one in (model, plain)]
    assert routers[0].scores(prompts) == pytest.approx(routers[1].scores(prompts))
    ids = torch.tensor([[5, 6, 7]])
    logits = [Subject("m", one).logits(ids, torch.ones_like(ids)) for one in (model, plain)]
    torch.testing.assert_close(*logits)
    losses = [measure(one, _Blocks())["loss"] for one in (model, plain)]
    assert losses[0] == pytest.approx(losses[1])


class _Blocks:
    """One block to predict."""

    bytes_by_kind: ClassVar = {"prose": 9}

    def __len__(self):
        return 1

    def __getitem__(self, place):
        return {"input_ids": torch.tensor([5, 6, 7]), "labels": torch.tensor([5, 6, 7])}

    def sum_by_kind(self, losses, indices):
        return {"prose": (float(losses[0].sum()), 2)}


def test_weights_that_are_nowhere_are_refused():
    model = tiny_model().to("meta")
    with pytest.raises(AttachError, match="block 0: got weights on the meta device, expected a device to compute on"):
        get_engram_model(model, tiny_config(), tiny_tokenizer())
    assert all(p.requires_grad for p in model.parameters())
