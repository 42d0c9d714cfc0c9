import pytest
import torch

from engram import ConfigError, MemoryEditor
from engram.editing import fit_reader_to_head
from tests.editing.helpers import FACTS, make_editor, same, tensors


def test_a_reader_fitted_to_the_head_teaches_and_is_saved(tmp_path):
    editor = make_editor(reader="trained", n_embed_per_ngram=48)
    fit_reader_to_head(editor.memory)
    engram = next(iter(editor.memory.engrams.values()))
    assert not any(p.requires_grad for p in engram.parameters())
    weight = engram.value_proj.weight
    block = weight[:, :48].double()
    assert torch.equal(weight[:, :48], weight[:, 48:96])  # every order speaks through the same directions
    assert torch.allclose(block.T @ block, torch.eye(48, dtype=torch.float64) * block.shape[0] / 48, atol=1e-5)
    head = editor.memory.get_output_embeddings().weight.double()
    spread = ((head - head.mean(0)) @ block).square().sum(0)
    assert bool((spread[:-1] >= spread[1:] - 1e-6).all())  # strongest first
    assert not editor.teach(FACTS).not_exact
    editor.save(tmp_path)
    before = tensors(editor)
    model = editor.memory.unload()
    again = MemoryEditor.load(model, tmp_path, editor.tokenizer)
    assert same(tensors(again), before)
    assert torch.equal(next(iter(again.memory.engrams.values())).value_proj.weight, weight)
    assert all(again.verify().values())
    with pytest.raises(ConfigError, match="holds rows"):
        fit_reader_to_head(again.memory)


def test_a_seeded_reader_is_not_refitted():
    with pytest.raises(ConfigError, match="got reader='seeded', expected 'trained'"):
        fit_reader_to_head(make_editor().memory)
    with pytest.raises(ConfigError, match="expected at most the head's"):
        fit_reader_to_head(make_editor(reader="trained", n_embed_per_ngram=4096).memory)
