"""Rows carried to a new memory by the n-grams of a text."""

import pytest
import torch

from engram import ConfigError, MemoryEditor, TableConfig, get_engram_model
from engram.models import transfer_memory
from engram.testing import tiny_config, tiny_memory, tiny_model, tiny_tokenizer

TEXTS = [
    "def lookup(self, ids): return self.table[ids]",
    "The memory, the hash and the gate.",
    "for key, value in pairs: print(key)",
]


def logits(memory, text):
    with torch.no_grad():
        return memory(**tiny_tokenizer()(text, return_tensors="pt"), use_cache=False).logits


def carried(model, old, placement=None, layers=None, texts=TEXTS, **changes):
    old.unload()
    new = get_engram_model(model, tiny_config(**changes), tiny_tokenizer(), placement)
    return new.eval(), transfer_memory(old, new, tiny_tokenizer(), texts, layers)


@pytest.mark.parametrize(
    ("changes", "layers"),
    [
        ({"engram_vocab_size": 400_009}, None),
        ({"engram_vocab_size": 400_009, "seed": 7}, None),
        ({"engram_vocab_size": 400_009, "layer_ids": (0, 1, 2)}, {0: 0, 1: 2, 2: 2}),
    ],
)
def test_in_larger_tables_the_text_reads_what_it_read_before(changes, layers):
    model = tiny_model()
    old = tiny_memory(model)  # 300 rows a head: many n-grams share one; of 400,009 none do here
    kept = layers or {0: 0, 2: 2}
    expected = [logits(old, text) for text in TEXTS]
    read = [{layer: trace["value"] for layer, trace in recorded(old, text).items()} for text in TEXTS]
    new, report = carried(model, old, layers=layers, **changes)
    assert [layer.layer_id for layer in report] == list(kept)
    for layer in report:
        assert 0 < layer.written < layer.rows
        assert layer.look_ups > layer.written  # n-grams come twice
    for text, logits_before, values in zip(TEXTS, expected, read):
        if layers is None:
            assert torch.allclose(logits(new, text), logits_before, atol=1e-5)
        first = recorded(new, text)[0]["value"]
        assert torch.allclose(first, values[0], atol=1e-5)
    unseen = "zebra quiz"
    table = new.engrams["0"].multi_head_embedding
    ids = tiny_tokenizer()(unseen, return_tensors="pt")["input_ids"]
    assert not table(new.mapping.hash(ids)[0], torch.float32)[:, -3:].any()


def recorded(memory, text):
    with torch.no_grad(), memory.record() as traces:
        memory(**tiny_tokenizer()(text, return_tensors="pt"), use_cache=False)
    return dict(traces)


def test_rows_that_n_grams_share_hold_their_mean_over_texts_of_any_length(tmp_path):
    model = tiny_model()
    old = tiny_memory(model)
    placement = TableConfig(tier="mmap", path=str(tmp_path / "rows"))
    text = " ".join(TEXTS * 300)  # several windows
    new, report = carried(model, old, placement, texts=[text], engram_vocab_size=20)
    ids = tiny_tokenizer()(text, return_tensors="pt")["input_ids"]
    for layer in (0, 2):
        source, target = (m.engrams[str(layer)].multi_head_embedding for m in (old, new))
        before = source(old.mapping.hash(ids)[layer], torch.float32).view(-1, 4)
        rows = target.row_ids(new.mapping.hash(ids)[layer]).flatten()
        for row in rows.unique()[::5]:
            mean = before[rows == row].double().mean(0).float()
            assert torch.allclose(target.embedding.read(row, torch.float32), mean, atol=1e-5)
    assert report[0].look_ups == rows.numel()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rows_of_few_bits_are_rounded_once(dtype):
    model = tiny_model()
    old = tiny_memory(model)
    old.unload()
    tables = []
    for placement in (TableConfig(), TableConfig(dtype=dtype)):
        new = get_engram_model(model, tiny_config(engram_vocab_size=20), tiny_tokenizer(), placement)
        transfer_memory(old, new, tiny_tokenizer(), TEXTS * 40)
        new.unload()
        tables.append(new.engrams["0"].table.weight.detach())
    exact, rounded = tables
    assert exact.any()
    assert torch.equal(rounded, exact.to(rounded.dtype))


def test_what_does_not_fit_is_refused_before_anything_changes():
    model = tiny_model()
    old = tiny_memory(model)
    old.unload()
    for changes, layers, message in (
        ({"n_embed_per_ngram": 32}, None, "n_embed_per_ngram 16 and 32, expected the same"),
        (
            {"layer_ids": (0, 1)},
            None,
            r"expected for each layer of the new memory \(\[0, 1\]\) one of the old memory's \(\[0, 2\]\)",
        ),
        ({"layer_orders": {0: [3]}}, None, r"layer 0 reads orders \[3\], layer 0 of the old memory \[2, 3\]"),
    ):
        new = get_engram_model(model, tiny_config(**changes), tiny_tokenizer())
        before = {name: x.clone() for name, x in new.engrams.state_dict().items()}
        with pytest.raises(ConfigError, match=message):
            transfer_memory(old, new, tiny_tokenizer(), TEXTS, layers)
        assert all(torch.equal(x, before[name]) for name, x in new.engrams.state_dict().items())
        new.unload()
    few_bits = get_engram_model(model, tiny_config(), tiny_tokenizer(), TableConfig(dtype="int8"))
    with pytest.raises(ConfigError, match="expected tables that can be trained"):
        transfer_memory(old, few_bits, tiny_tokenizer(), TEXTS)
    few_bits.unload()
    taught = MemoryEditor.create(model, tiny_tokenizer())
    with pytest.raises(ConfigError, match="facts are taught anew"):
        transfer_memory(old, taught.memory, tiny_tokenizer(), TEXTS)
