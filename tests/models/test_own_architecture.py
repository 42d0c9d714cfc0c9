"""A decoder that is not transformers': what it must have is said at once, and nothing else is asked of it."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from engram import AttachError, EngramModel, get_engram_model, register_architecture
from engram.analysis.streams import Lens
from engram.analysis.subject import Subject
from engram.models import ARCHITECTURES, DecoderLayout
from engram.testing import tiny_config, tiny_memory, tiny_tokenizer

IDS = torch.randint(2, 300, (2, 9), generator=torch.Generator().manual_seed(0))
SIZES = {"hidden_size": 24, "vocab_size": 380, "num_hidden_layers": 3}


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.mix = nn.Linear(width, width)

    def forward(self, x):
        return x + torch.tanh(self.mix(x.cumsum(1) / torch.arange(1, x.shape[1] + 1).view(1, -1, 1)))


class Trunk(nn.Module):
    """Neither a config, nor a cache, nor outputs by name."""

    def __init__(self, vocabulary, width, blocks):
        super().__init__()
        self.emb = nn.Embedding(vocabulary, width)
        self.blks = nn.ModuleList(Block(width) for _ in range(blocks))

    def forward(self, input_ids, attention_mask=None):
        x = self.emb(input_ids)
        for block in self.blks:
            x = block(x)
        return x


def parts(model, config):
    torch.manual_seed(0)
    model.trunk = Trunk(config.vocab_size, config.hidden_size, config.num_hidden_layers)
    model.head = nn.Linear(config.hidden_size, config.vocab_size)


def speak(self, input_ids, attention_mask=None, labels=None):
    found = self.head(self.trunk(input_ids, attention_mask=attention_mask))
    loss = None if labels is None else nn.functional.cross_entropy(found[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    return SimpleNamespace(logits=found, loss=loss)


class MyConfig(PreTrainedConfig):
    model_type = "mydec"


class MyModel(PreTrainedModel):
    config_class = MyConfig

    def __init__(self, config):
        super().__init__(config)
        parts(self, config)

    forward = speak


class Complete(MyModel):
    def get_input_embeddings(self):
        return self.trunk.emb


class Bare(nn.Module):
    """Nothing of transformers at all."""

    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace(model_type="mydec", **SIZES)
        parts(self, self.config)

    forward = speak
    get_input_embeddings = Complete.get_input_embeddings


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setattr("engram.models.architectures.ARCHITECTURES", dict(ARCHITECTURES))
    register_architecture("mydec", DecoderLayout("trunk", "blks"))


@pytest.mark.parametrize("make", [lambda: Complete(MyConfig(**SIZES)), Bare], ids=["transformers", "torch"])
def test_attached_trained_looked_at_saved_and_loaded(make, tmp_path):
    model = make().eval()
    with torch.no_grad():
        base = model(IDS).logits
    memory = get_engram_model(model, tiny_config(), tiny_tokenizer())
    memory(input_ids=IDS, labels=IDS).loss.backward()
    assert memory.engrams["0"].table.weight.grad is not None
    memory.unload()
    memory = tiny_memory(model)
    with torch.no_grad():
        spoken = memory(IDS).logits
        assert not torch.allclose(spoken, base, atol=1e-3)
        assert torch.equal(memory(input_ids=IDS, use_cache=False).logits, spoken)  # as the library's own measures ask
        with pytest.raises(TypeError, match="use_cache"):
            memory(input_ids=IDS, use_cache=True)
        subject, mask = Subject("mine", memory), torch.ones_like(IDS)
        assert torch.equal(subject.logits(IDS, mask), spoken)
        with memory.record() as traces:
            subject.run(IDS, mask)
        assert set(traces) == {0, 2}
    memory.save_pretrained(tmp_path)
    again = EngramModel.from_pretrained(make(), tmp_path, tiny_tokenizer()).eval()
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, spoken)


@pytest.mark.parametrize("make", [lambda: Complete(MyConfig(**SIZES)), Bare], ids=["transformers", "torch"])
def test_the_lens_wants_to_know_the_head_and_nothing_else(make, monkeypatch):
    memory = tiny_memory(make().eval())
    with pytest.raises(AttachError, match=r"logit lens: got a \w+ without get_output_embeddings\(\) that gives its head"):
        Lens(Subject("mine", memory))
    monkeypatch.setattr(type(memory.base_model), "get_output_embeddings", lambda self: self.head, raising=False)
    lens = Lens(Subject("mine", memory))
    with torch.no_grad():
        torch.testing.assert_close(lens.logits(memory.base_model.trunk(IDS)[0]), memory.base_model(IDS).logits[0])


def refused(model, message):
    with pytest.raises(AttachError, match=message):
        get_engram_model(model, tiny_config(), tiny_tokenizer())


def test_what_is_missing_is_said_all_at_once():
    refused(
        MyModel(MyConfig(**SIZES)), r"^got a MyModel without get_input_embeddings\(\) with a weight; .*register_architecture"
    )
    refused(
        nn.Linear(2, 2), "without config.model_type, config.hidden_size, config.vocab_size, config.num_hidden_layers, get_input"
    )
    model = Bare()
    model.config = SimpleNamespace(model_type="mydec", hidden_size=24)
    refused(model, r"^got a Bare without config.vocab_size, config.num_hidden_layers; expected a transformers model")


def test_a_decoder_without_token_ids_is_refused():
    class Deaf(Trunk):
        def forward(self, tokens, attention_mask=None):
            return super().forward(tokens)

    model = Bare()
    model.trunk.__class__ = Deaf
    refused(model, "without an argument input_ids of trunk.forward")


def test_a_block_that_is_given_no_stream_says_so():
    class Named(Block):
        def forward(self, *, x):
            return super().forward(x)

    class Caller(Trunk):
        def forward(self, input_ids, attention_mask=None):
            return self.blks[0](x=self.emb(input_ids))

    model = Bare()
    model.trunk.__class__ = Caller
    model.trunk.blks[0].__class__ = Named
    memory = tiny_memory(model)
    with pytest.raises(
        AttachError, match=r"block 0 \(Named\) got x, expected the residual stream first, or by the name hidden_states"
    ):
        memory(IDS)
