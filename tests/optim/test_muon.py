import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from engram import CheckpointError, ConfigError
from engram.checkpoint import load_tree, save_tree
from engram.optim import EngramAdamW, EngramMuon, build_param_groups, matrices_per_parameter
from engram.optim import muon as muon_module
from engram.optim.muon import orthogonalize
from engram.testing import assert_close, tiny_memory, tiny_model

STEPS = 4


def muon_group(params, **options):
    return {"params": list(params), "algorithm": "muon", "weight_decay": 0.1, **options}


def gradients(shape, count=STEPS, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for _ in range(count)]


def weight(*shape, seed=1):
    return nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(seed)))


def run(optimizer, p, grads):
    for grad in grads:
        p.grad = grad.clone()
        optimizer.step()
    return p.detach().clone()


def muon_by_hand(p, grads, lr, decay, momentum=0.95, nesterov=True, parts=1):
    """One matrix at a time, in float64, from the formulas of the docstrings."""
    value = p.detach().double().clone()
    blocks = [block for matrix in (value if value.dim() == 3 else [value]) for block in matrix.chunk(parts)]  # views
    averages = [torch.zeros_like(block) for block in blocks]
    for grad in grads:
        pieces = [piece.double() for matrix in (grad if grad.dim() == 3 else [grad]) for piece in matrix.chunk(parts)]
        for block, average, piece in zip(blocks, averages, pieces):
            average.mul_(momentum).add_((1 - momentum) * piece)
            x = (1 - momentum) * piece + momentum * average if nesterov else average.clone()
            x = x / x.norm()
            for _ in range(5):
                gram = x @ x.T
                x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
            block.mul_(1 - lr * decay).sub_(lr * 0.2 * math.sqrt(max(block.shape)) * x)
    return value.float()


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has no Muon yet")
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (33, 33), (2, 63)])
def test_a_matrix_steps_as_in_torch(shape, nesterov):
    ours, theirs = weight(*shape), weight(*shape)
    options = {"lr": 0.02, "weight_decay": 0.1, "nesterov": nesterov}
    mine = run(EngramMuon([muon_group([ours])], ns_dtype="bfloat16", **options), ours, gradients(shape))
    reference = run(torch.optim.Muon([theirs], adjust_lr_fn="match_rms_adamw", **options), theirs, gradients(shape))
    assert_close(mine, reference, 1e-3)
    assert (mine - weight(*shape)).abs().max() > 0.02  # it has moved far more than that


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize(
    ("shape", "parts"), [((5, 24, 16), 1), ((5, 24, 16), 2), ((3, 10, 32), 2), ((24, 16), 2), ((16, 24), 1)]
)
def test_every_matrix_of_a_stack_is_its_own(shape, parts, nesterov):
    p = weight(*shape)
    expected = muon_by_hand(p, gradients(shape), 0.02, 0.1, nesterov=nesterov, parts=parts)
    optimizer = EngramMuon([muon_group([p], parts=parts)], lr=0.02, nesterov=nesterov, ns_dtype="float32")
    assert_close(run(optimizer, p, gradients(shape)), expected, 1e-5)


@pytest.mark.parametrize(("native", "computed"), [(True, torch.bfloat16), (False, torch.float32)])
def test_bfloat16_is_left_alone_where_it_would_be_emulated(monkeypatch, native, computed):
    seen = []
    monkeypatch.setattr(
        muon_module, "orthogonalize", lambda m, steps, dtype: seen.append(dtype) or orthogonalize(m, steps, dtype)
    )
    monkeypatch.setattr(muon_module, "_native_bfloat16", lambda device: native)
    p = weight(8, 12)
    optimizer = EngramMuon([muon_group([p])], lr=0.02)
    run(optimizer, p, gradients((8, 12), 1))
    assert seen == [computed]
    saved = optimizer.state_dict()
    assert saved["param_groups"][0]["ns_dtype"] == "auto"  # not what one machine made of it
    saved["param_groups"][0]["ns_dtype"] = "bfloat16"  # as states were before there was a choice: they go on as they began
    optimizer.load_state_dict(saved)
    run(optimizer, p, gradients((8, 12), 1))
    assert seen == [computed, torch.bfloat16]


def test_every_accelerator_has_bfloat16_and_cpus_are_asked(monkeypatch):
    assert muon_module._native_bfloat16(torch.device("cuda", 0))
    for flags in ((False, False), (True, False), (False, True)):
        for name, flag in zip(muon_module._X86, flags):
            monkeypatch.setattr(torch.cpu, name, lambda flag=flag: flag, raising=False)
        monkeypatch.setattr(muon_module.platform, "machine", lambda: "x86_64")
        assert muon_module._native_bfloat16(torch.device("cpu")) == any(flags)
    monkeypatch.setattr(muon_module.platform, "machine", lambda: "aarch64")
    for flag in (True, False):
        monkeypatch.setattr(torch.ops, "mkldnn", SimpleNamespace(_is_mkldnn_bf16_supported=lambda flag=flag: flag))
        assert muon_module._native_bfloat16(torch.device("cpu")) == flag
    monkeypatch.setattr(torch.ops, "mkldnn", SimpleNamespace())
    assert not muon_module._native_bfloat16(torch.device("cpu"))


def test_matrices_of_one_shape_go_together_and_step_as_if_alone(monkeypatch):
    shapes = [(3, 8, 12), (8, 12), (12, 8), (8, 12)]

    def step_all():
        params = [weight(*shape, seed=n) for n, shape in enumerate(shapes)]
        for n, p in enumerate(params):
            p.grad = gradients(p.shape, 1, seed=n)[0]
        EngramMuon([muon_group(params)], lr=0.02).step()
        return params

    calls = []
    monkeypatch.setattr(muon_module, "orthogonalize", lambda m, *rest: calls.append(m.shape[0]) or orthogonalize(m, *rest))
    together = step_all()
    assert sorted(calls) == [1, 5]
    monkeypatch.setattr(muon_module, "_LARGEST_STACK", 100)
    alone = step_all()
    assert sorted(calls[2:]) == [1, 1, 1, 3]
    for a, b in zip(together, alone):
        assert_close(a, b, 1e-3)


@pytest.mark.parametrize(
    ("dtype", "shape"), [(torch.float32, (6, 16, 48)), (torch.bfloat16, (6, 48, 16)), (torch.float32, (2, 1, 9))]
)
def test_orthogonal_means_singular_values_near_one(dtype, shape):
    x = gradients(shape, 1)[0]
    before = x.clone()
    result = orthogonalize(x, dtype=dtype)
    assert result.dtype == dtype
    assert result.shape == x.shape
    assert torch.equal(x, before)
    values = torch.linalg.svdvals(result.float())
    assert values.min() > 0.6
    assert values.max() < 1.3


def test_zero_gradients_move_nothing_but_by_decay():
    p = weight(4, 8, 8)
    before = p.detach().clone()
    optimizer = EngramMuon([muon_group([p], weight_decay=0.0)], lr=0.1)
    assert torch.equal(run(optimizer, p, [torch.zeros(4, 8, 8)]), before)
    grad = gradients((4, 8, 8), 1)[0]
    grad[2] = 0  # an expert that no token went to
    after = run(EngramMuon([muon_group([p], weight_decay=0.0)], lr=0.1), p, [grad])
    changed = (after != before).flatten(1).any(1)
    assert changed.tolist() == [True, True, False, True]


@pytest.mark.parametrize("shape", [(64, 64), (16, 256), (256, 16)])
def test_an_update_is_as_large_as_adams(shape):
    p = weight(*shape)
    before = p.detach().clone()
    after = run(EngramMuon([muon_group([p], weight_decay=0.0)], lr=1.0), p, gradients(shape, 1))
    assert 0.15 < (after - before).square().mean().sqrt() < 0.25


def test_schedulers_and_groups_have_their_own_rates():
    slow, fast = weight(8, 8), weight(8, 8)
    optimizer = EngramMuon(
        [muon_group([slow], lr=0.01, weight_decay=0.0), muon_group([fast], lr=0.03, weight_decay=0.0)], ns_dtype="float32"
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    moved = []
    for _ in range(2):
        before = slow.detach().clone(), fast.detach().clone()
        slow.grad, fast.grad = torch.eye(8), torch.eye(8)
        optimizer.step()
        scheduler.step()
        moved.append([float((a.detach() - b).norm()) for a, b in zip((slow, fast), before)])
    assert moved[0][1] / moved[0][0] == pytest.approx(3, rel=1e-3)
    assert moved[1][0] / moved[0][0] == pytest.approx(0.5, rel=1e-3)


def mixed_optimizer(kind="deepseek_v3"):
    memory = tiny_memory(tiny_model(kind))
    memory.base_model.requires_grad_(True)
    groups = build_param_groups(memory, memory.engrams, 1e-2, weight_decay=0.1, backbone_optimizer="muon")
    return memory, EngramMuon(groups, lr=1e-2)


def train(memory, optimizer, steps, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        ids = torch.randint(2, 300, (2, 12), generator=generator)
        memory(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def test_tables_adam_and_muon_in_one_optimiser_resume_exactly(tmp_path):
    memory, optimizer = mixed_optimizer()
    train(memory, optimizer, 2)
    kinds = {frozenset(entry) for entry in optimizer.state.values()}
    assert kinds == {
        frozenset({"step", "row_moments"}),
        frozenset({"step", "exp_avg", "exp_avg_sq"}),
        frozenset({"step", "momentum_buffer"}),
    }
    save_tree(tmp_path / "optimizer", optimizer.state_dict())
    other, again = mixed_optimizer()
    other.load_state_dict(memory.state_dict())
    again.load_state_dict(load_tree(tmp_path / "optimizer"))
    for p, q in zip(optimizer.state, again.state):
        for name in ("momentum_buffer", "exp_avg"):
            if name in optimizer.state[p]:
                assert torch.equal(optimizer.state[p][name], again.state[q][name])
    train(memory, optimizer, 2, seed=1)
    train(other, again, 2, seed=1)
    for (name, p), q in zip(memory.named_parameters(), other.parameters()):
        assert torch.equal(p, q), name


def test_which_parameters_are_matrices_of_hidden_layers():
    memory, optimizer = mixed_optimizer()
    names = {id(p): name.removeprefix("base_model.model.") for name, p in memory.named_parameters()}
    groups = {g["name"]: {names[id(p)] for p in g["params"]} for g in optimizer.param_groups}
    assert set(groups) == {
        *("tables", "reader", "reader_no_decay", "reader_muon"),
        *("backbone", "backbone_no_decay", "backbone_muon", "backbone_muon_2"),
    }
    assert groups["backbone"] == {
        *("embed_tokens.weight", "base_model.lm_head.weight"),
        *("layers.1.mlp.gate.weight", "layers.2.mlp.gate.weight"),
    }
    assert groups["backbone_muon_2"] == {"layers.1.mlp.experts.gate_up_proj", "layers.2.mlp.experts.gate_up_proj"}
    assert {n for n in groups["backbone_muon"] if n.startswith("layers.1.")} == {
        *(f"layers.1.self_attn.{n}.weight" for n in ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")),
        *(f"layers.1.mlp.shared_experts.{n}.weight" for n in ("gate_proj", "up_proj", "down_proj")),
        "layers.1.mlp.experts.down_proj",
    }
    assert groups["reader_muon"] == {f"engrams.{k}.{n}.weight" for k in (0, 2) for n in ("value_proj", "key_projs.0")}
    assert groups["reader"] == {f"engrams.{k}.short_conv.conv.weight" for k in (0, 2)}
    assert sum(len(g) for g in groups.values()) == len(list(memory.parameters()))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "phi3", "mixtral", "qwen2_moe", "deepseek_v4"])
def test_embeddings_heads_routers_and_mixing_stay_with_adamw(kind):
    model = tiny_model(kind)
    parts = matrices_per_parameter(model)
    names = {name: parts.get(id(p)) for name, p in model.named_parameters() if p.dim() >= 2}
    kept = {name for name, count in names.items() if count is None}
    rest = (".gate.", "embed", "wte", "wpe", "lm_head", "_hc.", "hc_head", "position_bias", "shared_expert_gate")
    assert all(any(word in f".{name}" for word in rest) for name in kept)
    assert not any(any(word in f".{name}" for word in rest) for name in set(names) - kept)
    fused = {name for name, count in names.items() if count == 2}
    assert fused == {name for name in names if "gate_up_proj" in name or "o_a_proj" in name}


def test_a_tied_head_stays_with_adamw():
    model = tiny_model(tie_word_embeddings=True)
    assert id(model.lm_head.weight) not in matrices_per_parameter(model)


def test_muon_learns():
    memory, optimizer = mixed_optimizer()
    ids = torch.randint(2, 300, (4, 16), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        before = float(memory(input_ids=ids, labels=ids).loss)
    for _ in range(12):
        memory(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        assert float(memory(input_ids=ids, labels=ids).loss) < 0.8 * before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ns_dtype": "float16"}, "got ns_dtype='float16'"),
        ({"ns_steps": 0}, "got ns_steps=0"),
        ({"momentum": 1.0}, "got momentum=1.0"),
        ({"parts": 3}, r"got a parameter \[8, 8\]"),
        ({"algorithm": "lion"}, "got a group with algorithm='lion'"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        EngramMuon([muon_group([weight(8, 8)], **options)])
    optimizer = EngramMuon([weight(4, 4)])
    with pytest.raises(ConfigError, match=message):
        optimizer.add_param_group(muon_group([weight(8, 8)], **options))
    assert len(optimizer.param_groups) == 1


def test_what_is_no_matrix_is_refused():
    with pytest.raises(ConfigError, match=r"got a parameter \[8\]"):
        EngramMuon([muon_group([weight(8)])])
    with pytest.raises(ConfigError, match="use EngramMuon"):
        EngramAdamW([muon_group([weight(8, 8)])])
    table = nn.Embedding(8, 4, sparse=True)
    optimizer = EngramMuon([muon_group(table.parameters())])
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(ConfigError, match="sparse gradient in a Muon group"):
        optimizer.step()
    with pytest.raises(ConfigError, match="backbone_optimizer: got 'lion'"):
        build_param_groups(tiny_model(), None, 1e-3, backbone_optimizer="lion")


def test_a_state_of_the_other_algorithm_is_refused():
    p = weight(8, 8)
    muon, adamw = EngramMuon([muon_group([p])]), EngramAdamW([p])
    run(muon, p, gradients((8, 8), 1))
    run(adamw, p, gradients((8, 8), 1))
    with pytest.raises(CheckpointError, match="got algorithm 'muon' for group 0, expected 'adamw'"):
        adamw.load_state_dict(muon.state_dict())
    with pytest.raises(CheckpointError, match="got algorithm 'adamw' for group 0, expected 'muon'"):
        muon.load_state_dict(adamw.state_dict())
    EngramMuon([p]).load_state_dict(adamw.state_dict())  # without Muon groups it is the same optimiser
