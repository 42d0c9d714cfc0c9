import dataclasses
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedConfig

from engram import ConfigError, EngramConfig, get_engram_model
from engram.experiments import (
    TOLERANCE,
    BackboneConfig,
    allocate,
    build_backbone,
    count_model,
    predict_counts,
    predict_flops,
)
from engram.experiments.budget import RHO_TOLERANCE
from engram.testing import tiny_model, tiny_tokenizer

TINY = {"vocab_size": 400, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "head_dim": 16}
SMALL = {**TINY, "kv_lora_rank": 16, "intermediate_size": 48, "moe_intermediate_size": 16, "n_routed_experts": 6}
READER = {"engram_vocab_size": 50, "n_embed_per_ngram": 8, "n_head_per_ngram": 2, "layer_ids": (0, 2), "pad_id": 1}


def backbone(architecture="deepseek_v3", **changes):
    return BackboneConfig(architecture=architecture, **{**SMALL, "hc_mult": 2, "max_position_embeddings": 64, **changes})


def engram(**changes):
    return EngramConfig(**{**READER, **changes})


def built(config, memory):
    model = build_backbone(config, tiny_tokenizer())
    return model if memory is None else get_engram_model(model, memory, tiny_tokenizer())


@pytest.mark.parametrize("architecture", ["llama", "deepseek_v3", "deepseek_v4"])
@pytest.mark.parametrize(
    "memory",
    [
        None,
        engram(),
        engram(use_bias=False, use_conv=False),
        engram(max_ngram_size=4),
        engram(fuse="add"),
        engram(fuse="concat", branch_gates=False),
        engram(branch_gates=False),
        engram(layer_orders={0: [2]}),
    ],
    ids=["none", "full", "bare", "4-grams", "add", "concat", "shared gates", "fewer orders"],
)
def test_predicted_counts_are_those_of_the_model_that_is_built(architecture, memory):
    model = built(backbone(architecture), memory)
    assert predict_counts(backbone(architecture), memory) == count_model(model)
    everything = count_model(model)
    tables = sum(p.numel() for n, p in model.named_parameters() if "multi_head_embedding" in n)
    assert everything.total + everything.embedding == sum(p.numel() for p in model.parameters())
    assert everything.rows == tables


@pytest.mark.parametrize(
    ("model_type", "chosen"),
    [("ernie4_5_moe", {"moe_k": 2}), ("hunyuan_v1_moe", {"moe_topk": [1, 3, 2]}), ("mixtral", {"num_experts_per_tok": 1})],
)
def test_experts_are_counted_whatever_a_config_calls_them(model_type, chosen):
    model = tiny_model(model_type)
    stacks = {n: p for n, p in model.named_parameters() if p.dim() == 3}
    assert stacks
    [told] = chosen.values()
    layers = [int(name.split(".")[2]) for name in stacks]
    each = [told[layer] if isinstance(told, list) else told for layer in layers]
    for name, value in chosen.items():
        setattr(model.config, name, value)
    assert count_model(model).idle_experts == sum(p.numel() * (len(p) - k) // len(p) for p, k in zip(stacks.values(), each))
    for name in (*chosen, "num_experts_per_tok"):
        vars(model.config).pop(name, None)
    if getattr(model.config, "num_experts_per_tok", None) is None:
        with pytest.raises(ConfigError, match="expected experts_per_token"):
            count_model(model)
    assert count_model(model, 1).idle_experts == sum(p.numel() * (len(p) - 1) // len(p) for p in stacks.values())


def test_idle_experts_are_those_that_a_token_does_not_choose():
    few, many = (count_model(build_backbone(backbone(n_routed_experts=n))) for n in (2, 6))
    one_expert = 3 * 32 * 16
    assert few.idle_experts == 0
    assert many.idle_experts == 2 * 4 * one_expert  # two blocks, four experts that are not chosen
    assert many.active - few.active == 2 * 4 * 32  # four more rows in two routers


@pytest.mark.parametrize("architecture", ["llama", "deepseek_v3"])
@pytest.mark.parametrize("memory", [None, engram(use_conv=False)], ids=["none", "memory"])
def test_operations_are_those_that_torch_counts(architecture, memory):
    config = backbone(architecture, attn_implementation="eager")
    model = built(config, memory).eval()
    for module in model.modules():  # the plain loop over experts, which the counter can see into
        if isinstance(getattr(module, "config", None), PreTrainedConfig):
            module.config._experts_implementation = "eager"
    length, batch = 16, 2
    ids = torch.randint(2, 300, (batch, length))
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(input_ids=ids, use_cache=False)
    head = 2 * config.vocab_size * config.hidden_size
    got = counter.get_total_flops() / (batch * length) - head
    # The counter takes rotary angles for a product as well; they are next to nothing.
    assert got == pytest.approx(predict_flops(config, memory, length), rel=2e-3)


BUDGET = {"total": 300_000, "active": 60_000}
ROOMY = {"hidden_size": 32, "moe_intermediate_size": 8, "intermediate_size": 64, "num_hidden_layers": 3}


@pytest.mark.parametrize("rho", [0.0, 0.4, 0.6, 0.8, 0.9])
def test_every_rho_has_the_same_total_active_and_operations(rho):
    base = backbone(**ROOMY)
    pure = allocate(base, engram(), **BUDGET, rho=1.0)
    mixed = allocate(base, engram(), **BUDGET, rho=rho)
    assert pure.engram is None
    assert mixed.counts.rho == pytest.approx(rho, abs=0.01)
    for name, wanted in BUDGET.items():
        for allocation in (pure, mixed):
            assert getattr(allocation.counts, name) == pytest.approx(wanted, rel=TOLERANCE)
    flops = [predict_flops(a.backbone, a.engram, 64) for a in (pure, mixed)]
    assert flops[1] == pytest.approx(flops[0], rel=TOLERANCE)
    assert count_model(built(mixed.backbone, mixed.engram)) == mixed.counts


@pytest.mark.parametrize("orders", [{0: [2]}, {0: [2], 2: [2]}, {0: [4], 2: [4]}])
def test_tables_take_the_rest_whatever_orders_layers_read(orders):
    few = allocate(backbone(**ROOMY), engram(max_ngram_size=4, layer_orders=orders), **BUDGET, rho=0.8)
    assert few.counts.total == pytest.approx(BUDGET["total"], rel=TOLERANCE)
    assert few.counts.rho == pytest.approx(0.8, abs=0.01)


def test_heads_that_get_too_few_rows_are_counted():
    with pytest.raises(ConfigError, match="fewer than two rows for each of 8 heads"):
        allocate(backbone(**ROOMY), engram(max_ngram_size=4, layer_orders={0: [2]}), **BUDGET, rho=0.9999)


def test_rows_per_head_stay_what_they_were():
    found = [allocate(backbone(**ROOMY), engram(max_ngram_size=n), **BUDGET, rho=0.8).engram for n in (3, 4)]
    assert [memory.engram_vocab_size for memory in found] == [(1479, 1479), (960, 960, 960)]


@settings(max_examples=40, deadline=None)
@given(total=st.integers(1_000, 2_000_000), active=st.integers(500, 500_000), rho=st.floats(0.01, 1.0))
def test_a_budget_is_met_or_refused(total, active, rho):
    try:
        allocation = allocate(backbone(**ROOMY), engram(), total, active, rho)
    except ConfigError:
        return
    assert abs(allocation.counts.total - total) <= TOLERANCE * total
    assert abs(allocation.counts.active - active) <= TOLERANCE * active


@pytest.mark.parametrize(
    ("change", "budget", "words"),
    [
        ({}, {"active": 400_000}, "0 < active < total"),
        ({}, {"active": 9_000}, "dense feed-forward takes"),
        ({}, {"rho": -0.1}, "rho"),
        ({}, {"rho": 1.5}, "rho"),
        ({"moe_intermediate_size": 64}, {"total": 250_000, "rho": 1.0}, "One more expert"),
        ({}, {"rho": 0.999}, "left for tables"),
        ({"architecture": "llama"}, {}, "deepseek_v3"),
        ({"first_k_dense_replace": 0}, {}, "both kinds"),
    ],
)
def test_impossible_budgets_are_refused_in_words(change, budget, words):
    fields = {"total": 300_000, "active": 60_000, "rho": 0.8, **budget}
    with pytest.raises(ConfigError, match=words):
        allocate(backbone(**{**ROOMY, **change}), engram(), **fields)


@pytest.mark.parametrize(
    "change",
    [
        {"architecture": "gpt"},
        {"hidden_size": 0},
        {"num_hidden_layers": True},
        {"head_dim": 18},
        {"num_experts_per_tok": 9},
        {"first_k_dense_replace": 7},
        {"attn_implementation": "flash"},
    ],
)
def test_impossible_backbones_are_refused(change):
    with pytest.raises(ConfigError, match=next(iter(change))):
        backbone(**change)


def test_a_width_that_its_heads_do_not_divide_is_refused_where_transformers_does():
    changes = {"hidden_size": 32, "num_attention_heads": 3, "head_dim": 16}
    with pytest.raises(ConfigError, match="hidden_size: got 32, expected a multiple of num_attention_heads = 3"):
        backbone("llama", **changes)
    for architecture in ("deepseek_v3", "deepseek_v4"):
        assert build_backbone(backbone(architecture, **changes)).config.hidden_size == 32


def test_all_fields_of_a_backbone_reach_the_model():
    base = backbone("deepseek_v3")
    for field, architecture in itertools.product(dataclasses.fields(BackboneConfig), ["llama", "deepseek_v3", "deepseek_v4"]):
        if field.name in ("architecture", "attn_implementation"):
            continue
        assert base.replace(architecture=architecture).to_transformers().vocab_size == 400
    config = backbone("deepseek_v4").to_transformers()
    assert (config.hc_mult, config.n_routed_experts, config.sliding_window) == (2, 6, 64)


def test_a_share_that_whole_experts_cannot_have_is_refused():
    expert = 3 * ROOMY["hidden_size"] * ROOMY["moe_intermediate_size"] * 2  # in both blocks of experts
    budget = {"total": BUDGET["active"] + 3 * expert, "active": BUDGET["active"]}
    with pytest.raises(
        ConfigError, match=r"got rho 0.5, but the nearest model has 0.6\d\d, since experts come whole \(.* 2 blocks\)"
    ):
        allocate(backbone(**ROOMY), engram(), **budget, rho=0.5)
    assert allocate(backbone(**ROOMY), engram(), **budget, rho=2 / 3).counts.rho == pytest.approx(2 / 3, abs=RHO_TOLERANCE)
