import pytest
import torch
from transformers.modeling_outputs import CausalLMOutput

from engram import ConfigError
from engram.evaluation import measure_copying
from engram.testing import tiny_memory, tiny_model


class Copies(torch.nn.Module):
    """Says what followed the token of now when it came before, and nothing in particular otherwise."""

    config = None  # text of any length

    def __init__(self, vocab=500, sure=20.0):
        super().__init__()
        self.embedding, self.sure = torch.nn.Embedding(vocab, 2), sure

    def get_input_embeddings(self):
        return self.embedding

    def forward(self, input_ids):
        logits = torch.zeros(*input_ids.shape, self.embedding.num_embeddings)
        for row, ids in enumerate(input_ids.tolist()):
            for now, token in enumerate(ids):
                if token in ids[:now]:
                    logits[row, now, ids[len(ids[:now]) - 1 - ids[:now][::-1].index(token) + 1]] = self.sure
        return CausalLMOutput(logits=logits)


def test_a_model_that_copies_gains_what_a_token_costs():
    gain = measure_copying(Copies(vocab=100_000), tokens=16, sequences=3)
    assert gain == pytest.approx(torch.tensor(100_000.0).log().item(), rel=0.01)


def test_a_model_that_does_not_look_back_gains_nothing():
    memory = tiny_memory(tiny_model())
    memory.train()
    memory.base_model.eval()
    assert abs(measure_copying(memory, tokens=12, sequences=9)) < 0.1
    assert memory.training
    assert memory.engrams.training
    assert not any(module.training for module in memory.base_model.modules())
    assert measure_copying(memory, tokens=12) == measure_copying(memory, tokens=12)


@pytest.mark.parametrize("options", [{"tokens": 1}, {"sequences": 0}])
def test_nothing_to_show_twice_is_refused(options):
    with pytest.raises(ConfigError, match="expected at least 2 in at least 1"):
        measure_copying(tiny_model(), **options)
