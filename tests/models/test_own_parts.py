"""Memories with a layer or addresses of one's own: put in, trained, recorded, decoded, saved and loaded."""

import json

import pytest
import torch
from torch import nn

from engram import ConfigError, Engram, EngramAdamW, EngramModel, FingerprintError, NgramHashMapping, get_engram_model
from engram.checkpoint import DESCRIPTION_NAME
from engram.errors import CheckpointError
from engram.hashing import build_mapping
from engram.optim import build_param_groups
from engram.testing import assert_close, tiny_config, tiny_memory, tiny_model, tiny_tokenizer

IDS = torch.randint(2, 300, (2, 9), generator=torch.Generator().manual_seed(0))
MULTIPLIERS = {0: [3, 5, 7], 2: [11, 13, 17]}


class OwnGate(Engram):
    """A gate from the hidden state alone, with parameters of its own."""

    def __init__(self, *args):
        super().__init__(*args)
        self.ask = nn.Linear(self.config.hidden_size, 1)
        self.louder = nn.Parameter(torch.tensor(1.0))  # of no dimensions

    def gated_value(self, streams, rows):
        gate = self.louder * torch.sigmoid(self.ask(streams))
        return gate, gate * self.value_proj(rows).unsqueeze(2)


class OtherGate(Engram):
    """The stock layer by another name."""


class Shifted(NgramHashMapping):
    """Addresses one row further on."""

    def hash(self, input_ids, history=None, attention_mask=None):
        hashed = super().hash(input_ids, history, attention_mask)
        return {layer: (rows + 1) % torch.tensor(self.head_sizes(layer)) for layer, rows in hashed.items()}


def speaking(memory, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in memory.engrams.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return memory.eval()


def own_memory(layer_class=OwnGate):
    return speaking(get_engram_model(tiny_model(), tiny_config(), tiny_tokenizer(), layer_class=layer_class))


@torch.no_grad()
def logits(memory):
    return memory(input_ids=IDS).logits


def load(path, **options):
    return EngramModel.from_pretrained(tiny_model(), path, tokenizer=tiny_tokenizer(), **options)


def description(path):
    return json.loads((path / DESCRIPTION_NAME).read_text())


def test_an_own_layer_speaks_records_and_decodes():
    memory = own_memory()
    spoken = logits(memory)
    with memory.record() as traces:
        assert_close(logits(memory), spoken)
    assert traces[0]["gate"].shape == (2, 9, 1)
    with torch.no_grad():
        for layer in memory.engrams.values():
            nn.init.zeros_(layer.ask.weight)
            nn.init.constant_(layer.ask.bias, -100.0)
        with memory.disable_engram():
            base = logits(memory)
        assert_close(logits(memory), base)  # its gates are shut
    assert not torch.allclose(spoken, base, atol=1e-3)
    memory.unload()
    memory = own_memory()
    options = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "max_new_tokens": 8, "do_sample": False}
    for beams in (1, 3):
        cached = memory.generate(**options, num_beams=beams)
        assert torch.equal(cached, memory.generate(**options, num_beams=beams, use_cache=False))


def test_an_own_layer_is_trained():
    memory = own_memory().train()
    groups = build_param_groups(memory, memory, lr=1e-2)
    before = {name: p.clone() for name, p in memory.engrams.named_parameters()}
    optimizer, losses = EngramAdamW(groups), []
    for _ in range(8):
        loss = memory(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    still = {name for name, p in memory.engrams.named_parameters() if torch.equal(p, before[name])}
    # It does not ask these.
    assert still == {name for name in before if "key_projs" in name or "norm1" in name or "norm2" in name}


def test_an_own_layer_is_saved_under_its_name_and_loaded_by_its_class(tmp_path):
    memory = own_memory()
    memory.save_pretrained(tmp_path)
    assert description(tmp_path)["layer_classes"] == {"0": "OwnGate", "2": "OwnGate"}
    loaded = load(tmp_path, layer_class=OwnGate)
    assert torch.equal(logits(loaded), logits(memory))
    loaded.load_memory(tmp_path)
    loaded.unload()
    for wrong in (None, OtherGate):
        here = "Engram" if wrong is None else "OtherGate"
        message = rf"OwnGate in layer 0, OwnGate in layer 2\), got {here}\. .*layer_class="
        with pytest.raises(ConfigError, match=message):
            load(tmp_path, layer_class=wrong)
    other = tiny_memory()
    with pytest.raises(ConfigError, match="OwnGate in layer 0"):
        other.load_memory(tmp_path)
    fields = description(tmp_path)
    (tmp_path / DESCRIPTION_NAME).write_text(json.dumps({**fields, "layer_classes": ["OwnGate"]}))
    with pytest.raises(CheckpointError, match="layer_classes"):
        load(tmp_path)


def test_a_class_without_parameters_of_its_own_is_told_apart_too(tmp_path):
    own_memory(OtherGate).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"OtherGate in layer 0.*got Engram"):
        load(tmp_path)
    load(tmp_path, layer_class=OtherGate)


def test_one_layer_of_several_may_be_ones_own(tmp_path):
    memory = tiny_memory()
    stock = memory.engrams["2"]
    memory.engrams["2"] = OwnGate(stock.config, stock.mapping, 2)
    speaking(memory).save_pretrained(tmp_path)
    assert description(tmp_path)["layer_classes"] == {"2": "OwnGate"}
    loaded = load(tmp_path, layer_class={2: OwnGate})
    assert type(loaded.engrams["0"]) is Engram
    assert torch.equal(logits(loaded), logits(memory))
    with pytest.raises(ConfigError, match="OwnGate in layer 2"):
        load(tmp_path)
    with pytest.raises(ConfigError, match=r"ids among \[0, 2\]"):
        load(tmp_path, layer_class={1: OwnGate})


def test_stock_memories_are_saved_and_loaded_as_ever(saved):
    assert not {"layer_classes", "mapping_class", "multipliers"} & set(description(saved))
    memory = load(saved)
    assert {type(layer) for layer in memory.engrams.values()} == {Engram}
    load(saved, layer_class=OtherGate)  # a gate of one's own may start from what the stock one has learnt
    with pytest.raises(CheckpointError, match=r"missing: .*ask"):
        load(saved, layer_class=OwnGate)


def test_what_is_no_layer_is_refused_before_anything_is_touched():
    model = tiny_model()
    with pytest.raises(ConfigError, match=r"expected a subclass of engram\.Engram"):
        get_engram_model(model, tiny_config(), tiny_tokenizer(), layer_class=nn.Linear)
    assert all(p.requires_grad for p in model.parameters())
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_multipliers_of_ones_own_are_saved_with_the_memory(tmp_path):
    config = tiny_config(hash_spec="exact_given")
    mapping = build_mapping(config, tiny_tokenizer(), multipliers=MULTIPLIERS)
    memory = speaking(get_engram_model(tiny_model(), config, tiny_tokenizer(), mapping=mapping))
    assert torch.equal(memory.mapping.hash(IDS)[0], mapping.hash(IDS)[0])
    memory.save_pretrained(tmp_path)
    for options in ({}, {"mapping": build_mapping(config, tiny_tokenizer(), MULTIPLIERS)}):
        assert torch.equal(logits(load(tmp_path, **options)), logits(memory))
    other = build_mapping(config, tiny_tokenizer(), {**MULTIPLIERS, 2: [3, 3, 3]})
    with pytest.raises(FingerprintError, match="another tokenizer or hash mapping"):
        load(tmp_path, mapping=other)
    with pytest.raises(ConfigError, match=r"multipliers: got none.*mapping="):
        get_engram_model(tiny_model(), config, tiny_tokenizer())
    with pytest.raises(ConfigError, match=r"another configuration \(engram_vocab_size"):
        get_engram_model(tiny_model(), config.replace(engram_vocab_size=301), tiny_tokenizer(), mapping=mapping)


def test_a_mapping_class_of_ones_own_loads_again_where_it_is_given(tmp_path):
    stock = build_mapping(tiny_config(), tiny_tokenizer())
    mapping = Shifted(stock.config, stock.compressed_tokenizer)
    memory = speaking(get_engram_model(tiny_model(), tiny_config(), tiny_tokenizer(), mapping=mapping))
    memory.save_pretrained(tmp_path)
    assert not torch.allclose(logits(memory), logits(speaking(tiny_memory())), atol=1e-3)
    with pytest.raises(FingerprintError, match=r"mapping is a Shifted, got a NgramHashMapping: give it .*mapping="):
        load(tmp_path)
    again = Shifted(tiny_config(), stock.compressed_tokenizer)
    assert torch.equal(logits(load(tmp_path, mapping=again)), logits(memory))
