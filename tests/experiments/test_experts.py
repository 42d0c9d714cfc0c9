"""Experts under autocast: which type they are multiplied in, and that nothing else changes."""

import pytest
import torch
from transformers.integrations import moe

from engram import ConfigError
from engram.experiments import BackboneConfig, build_backbone, experts

SIZES = {
    "vocab_size": 300,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "head_dim": 16,
    "kv_lora_rank": 16,
}
MOE = {"moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 64}
IDS = torch.arange(1, 33).view(2, 16)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return build_backbone(BackboneConfig("deepseek_v3", **SIZES, **MOE))


@pytest.fixture
def types(monkeypatch):
    """Types in which experts are multiplied."""
    seen = []
    multiply = moe._grouped_mm

    def noting(input, weight, offs):
        seen.append((input.dtype, weight.dtype))
        return multiply(input, weight, offs)

    monkeypatch.setattr(moe, "_grouped_mm", noting)
    return seen


def loss_of(model):
    loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
    model.zero_grad()
    loss.backward()
    return loss.detach()


def test_experts_are_multiplied_in_the_type_of_autocast(model, types, monkeypatch):
    plain = loss_of(model)
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if "experts.gate_up" in name}
    assert {*types} == {(torch.float32, torch.float32)}
    types.clear()
    monkeypatch.setattr(experts, "_DEVICES", ["cpu"])
    with torch.autocast("cpu", torch.bfloat16):
        cast = loss_of(model)
    assert {*types} == {(torch.bfloat16, torch.bfloat16)}
    torch.testing.assert_close(cast, plain, rtol=1e-2, atol=0)
    for name, expected in gradients.items():
        got = model.get_parameter(name).grad
        assert got.dtype == torch.float32
        assert torch.nn.functional.cosine_similarity(got.flatten(), expected.flatten(), dim=0) > 0.99


def test_without_autocast_and_on_a_cpu_they_are_transformers_own(model, types):
    ours = loss_of(model)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = loss_of(model)
    assert {weight for _, weight in types} == {torch.float32}
    model.config._experts_implementation = "grouped_mm"
    assert torch.equal(ours, loss_of(model))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(mixed, loss_of(model))


def test_a_model_without_experts_is_left_alone():
    model = build_backbone(BackboneConfig("llama", **SIZES, intermediate_size=64))
    before = model.config._experts_implementation
    experts.multiply_as_autocast(model)
    assert model.config._experts_implementation == before


def test_the_factor_of_experts_may_be_a_whole_number():
    assert BackboneConfig(architecture="deepseek_v3", routed_scaling_factor=2).to_transformers().routed_scaling_factor == 2.0


def test_an_architecture_that_transformers_lacks_is_refused(monkeypatch):
    monkeypatch.setattr("engram.experiments.backbone.CONFIG_MAPPING", {"llama": None})
    with pytest.raises(ConfigError, match=r"got 'deepseek_v3', which transformers [\d.]+\S* does not have yet; update it"):
        BackboneConfig("deepseek_v3", **SIZES, **MOE).to_transformers()
