"""Figures of the memory's layers in the log."""

import pytest
import torch
from torch.utils.data import Dataset

from engram import TableConfig, get_engram_model
from engram.testing import tiny_config, tiny_memory, tiny_model, tiny_tokenizer
from tests.training.test_trainer import Rows, losses, make
from tests.versions import needs_checkpointing, needs_torch_2_7

pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")
NAMES = ("gate_mean", "gate_std", "gate_closed", "added", "grad_norm_reader", "grad_norm_rows", "rows_touched")


def figures(trainer):
    """Of every log entry with a loss, the figures by layer and name."""
    return [
        {tuple(key.split("/")[1:]): value for key, value in entry.items() if key.startswith("memory/")}
        for entry in trainer.state.log_history
        if "loss" in entry
    ]


def run(tmp_path, name="run", memory=None, **changes):
    trainer = make(tmp_path / name, memory or tiny_memory(tiny_model()), **{"max_steps": 4, **changes})
    trainer.train()
    return trainer


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"gradient_accumulation_steps": 2},
        pytest.param({"activation_checkpointing": True}, marks=needs_checkpointing),
        {"memory_dropout": 0.5},
        {"train_backbone": True},
        {"max_grad_norm": 0},
        {"bf16": True},
    ],
)
def test_figures_change_no_loss_and_no_weight(tmp_path, changes):
    kept = [run(tmp_path, str(on), log_memory=on, **changes) for on in (True, False)]
    assert losses(kept[0]) == losses(kept[1])
    assert all(torch.equal(a, b) for a, b in zip(*(trainer.model.parameters() for trainer in kept)))
    assert not any(figures(kept[1]))
    assert all({*found} == {(layer, name) for layer in ("layer0", "layer2") for name in NAMES} for found in figures(kept[0]))


def test_figures_are_what_a_step_does(tmp_path):
    memory = tiny_memory(tiny_model())
    ids = Rows().ids
    memory.requires_grad_(False).engrams.requires_grad_(True)
    with torch.no_grad():  # so that some gates are closed
        memory.engrams["2"].norm1[0].weight.mul_(30)
    trainer = make(tmp_path, memory, max_steps=1, per_device_train_batch_size=len(ids), max_grad_norm=0.01)
    memory.train()
    with memory.record() as traces:
        memory(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    expected = {}
    for layer_id, trace in traces.items():
        engram, gate = memory.engrams[str(layer_id)], trace["gate"].double()
        table = engram.multi_head_embedding.embedding.weight
        rows = table.grad.coalesce()
        reader = [p.grad for p in engram.parameters() if p is not table]
        values = (
            gate.mean(),
            gate.std(correction=0),
            (gate < 0.1).double().mean(),
            trace["added"].norm() / trace["stream"].norm(),
            torch.cat([grad.flatten() for grad in reader]).norm(),
            rows.values().norm(),
            (rows.values() != 0).any(-1).sum(),
        )
        expected |= {(f"layer{layer_id}", name): float(value) for name, value in zip(NAMES, values)}
    memory.zero_grad()
    trainer.train()
    assert figures(trainer)[0] == pytest.approx(expected, rel=1e-3)
    assert expected["layer2", "gate_closed"] > 0
    read = memory.engrams["2"].multi_head_embedding.row_ids(
        memory.mapping.hash(ids)[2][:, :-1]
    )  # nothing follows the last token
    assert expected["layer2", "rows_touched"] == len(read.unique())


def test_the_gate_of_the_line_is_the_mean_of_the_layers(tmp_path):
    trainer = run(tmp_path, data=Padded(4), max_steps=2)
    for entry in (e for e in trainer.state.log_history if "loss" in e):
        layers = [value for name, value in entry.items() if name.endswith("/gate_mean")]
        assert entry["gate_mean"] == pytest.approx(sum(layers) / len(layers), abs=1e-4)
        assert len(layers) == 2


def test_accumulated_batches_are_told_as_one_big_batch(tmp_path):
    big = run(tmp_path, "big", per_device_train_batch_size=8, max_steps=1)
    small = run(tmp_path, "small", per_device_train_batch_size=2, gradient_accumulation_steps=4, max_steps=1)
    assert figures(small)[0] == pytest.approx(figures(big)[0], rel=1e-3)


class Padded(Dataset):
    """The same texts with or without padding before them."""

    def __init__(self, padding):
        self.ids, self.padding = Rows(16).ids, padding

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        ids = torch.cat([torch.ones(self.padding, dtype=torch.long), self.ids[i]])
        mask = torch.ones_like(ids)
        mask[: self.padding] = 0
        return {"input_ids": ids, "labels": ids.masked_fill(mask == 0, -100), "attention_mask": mask}


def test_padding_counts_for_nothing(tmp_path):
    found = [figures(run(tmp_path, str(padding), data=Padded(padding), max_steps=1))[0] for padding in (0, 5)]
    for name in ("gate_mean", "gate_std", "gate_closed", "added"):
        assert found[1]["layer2", name] == pytest.approx(found[0]["layer2", name], rel=1e-3)


def test_sequences_that_do_not_read_count_for_nothing(tmp_path):
    torch.manual_seed(0)
    trainer = make(tmp_path, tiny_memory(tiny_model()), max_steps=1, memory_dropout=0.5)
    routes = []
    inner = trainer._route
    trainer._route = lambda inputs: routes.append((inputs["input_ids"].clone(), inner(inputs))) or routes[-1][1]
    trainer.train()
    (ids, route), memory = routes[0], tiny_memory(tiny_model())
    assert 0 < route.sum() < len(route)
    with torch.no_grad(), memory.record() as traces:
        memory(input_ids=ids[route])
    assert figures(trainer)[0]["layer2", "gate_mean"] == pytest.approx(float(traces[2]["gate"].mean()), rel=1e-3)
    rows = (
        memory.engrams["2"].multi_head_embedding.row_ids(traces[2]["hash_ids"][:, :-1]).unique()
    )  # nothing follows the last token
    assert figures(trainer)[0]["layer2", "rows_touched"] == len(rows)


@pytest.mark.parametrize("place", [TableConfig(dtype="bfloat16"), TableConfig(tier="host")])
def test_rows_are_counted_wherever_they_are(tmp_path, place):
    counts = []
    for table in (TableConfig(), place):
        memory = get_engram_model(tiny_model(), tiny_config(table_init="normal"), tiny_tokenizer(), table)
        counts.append(figures(run(tmp_path, str(table.dtype) + table.tier, memory, max_steps=1))[0]["layer2", "rows_touched"])
    assert counts[0] == counts[1] > 0


def test_only_what_is_trained_has_gradients(tmp_path):
    found = figures(run(tmp_path, "reader", train_tables=False))[0]
    assert {name for _, name in found} == {*NAMES} - {"grad_norm_rows", "rows_touched"}
    found = figures(run(tmp_path, "rows", train_reader=False))[0]
    assert {name for _, name in found} == {*NAMES} - {"grad_norm_reader"}


def test_a_model_without_a_memory_has_no_figures(tmp_path):
    assert not any(figures(run(tmp_path, memory=tiny_model(), train_backbone=True)))


def test_steps_that_are_not_logged_are_not_looked_at(tmp_path):
    trainer = run(tmp_path, max_steps=5, logging_steps=2)
    assert [bool(found) for found in figures(trainer)] == [True, True]
    assert not trainer._telemetry.is_due


@pytest.mark.filterwarnings(
    "ignore:`torch.jit.script_method`:DeprecationWarning", "ignore:The .grad attribute:UserWarning"
)  # of torch's own
@needs_torch_2_7("it compiles no forward pass of newer models")
def test_compiled_steps_have_the_same_figures(tmp_path):
    compiled = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
    runs = [run(tmp_path, str(i), max_steps=2, **more) for i, more in enumerate(({}, compiled))]
    for eager, other in zip(*map(figures, runs)):
        assert other == pytest.approx(eager, rel=1e-2)
