import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engram import ConfigError, EngramTrainer, EngramTrainingArguments
from engram.testing import tiny_memory, tiny_model
from engram.training.balance import BalanceCallback, LoadBalancer, find_routers, step_bias


@given(st.lists(st.integers(0, 1000), min_size=2, max_size=20), st.floats(0, 1))
def test_a_step_lifts_experts_below_the_mean_and_lowers_those_above(load, rate):
    before = torch.zeros(len(load))
    after = step_bias(before, torch.tensor(load, dtype=torch.float64), rate)
    mean = sum(load) / len(load)
    for count, moved in zip(load, after.tolist()):
        expected = 0.0 if count == mean else rate if count < mean else -rate
        assert moved == pytest.approx(expected, abs=1e-6) or count == pytest.approx(mean)


@pytest.mark.parametrize("architecture", ["deepseek_v3", "deepseek_v4"])
def test_counts_are_those_of_the_routers(architecture):
    model = tiny_model(architecture).train()
    balancer = LoadBalancer(model, rate=0.5)
    seen = {}
    handles = [
        router.register_forward_hook(lambda module, args, output, name=name: seen.__setitem__(name, output[2]))
        for name, router in find_routers(model).items()
    ]
    ids = torch.randint(2, 300, (2, 12))
    model(input_ids=ids, use_cache=False)
    worst = balancer.update()
    for handle in handles:
        handle.remove()
    assert seen
    ratios = []
    for name, chosen in seen.items():
        load = torch.tensor([(chosen == expert).sum() for expert in range(4)], dtype=torch.float32)
        assert torch.equal(balancer.routers[name].e_score_correction_bias, 0.5 * torch.sign(load.mean() - load))
        ratios.append(float(load.max() / load.mean()))
    assert float(worst) == pytest.approx(max(ratios))
    assert balancer.update() == 0.0  # nothing counted since


def test_evaluation_does_not_count_and_removal_ends_it():
    model = tiny_model("deepseek_v3")
    balancer = LoadBalancer(model, rate=1.0)
    ids = torch.randint(2, 300, (1, 8))
    model.eval()(input_ids=ids)
    with torch.no_grad():
        model.train()(input_ids=ids)
    assert balancer.update() == 0.0
    balancer.remove()
    model.train()(input_ids=ids)
    assert balancer.update() == 0.0


def test_balancing_evens_out_a_router_that_prefers_one_expert():
    """Hidden states that all point one way make a fresh router send every token to the same two experts."""
    torch.manual_seed(0)
    model = tiny_model("deepseek_v3", n_routed_experts=8)
    router = next(iter(find_routers(model).values())).train()
    balancer = LoadBalancer(router, rate=1e-3)
    states = torch.randn(1, 32) + 0.3 * torch.randn(256, 32)
    loads = []
    for _ in range(600):
        router(states)
        loads.append(balancer.update())
    assert loads[0] > 3
    assert max(loads[-20:]) < 1.6


def test_trainer_moves_biases_logs_the_load_and_resumes_exactly(tmp_path):
    def run(folder, steps, resume=None):
        model = tiny_model("deepseek_v3").train()
        args = EngramTrainingArguments(
            str(folder), max_steps=steps, per_device_train_batch_size=2, logging_steps=1, save_steps=2, report_to=[], use_cpu=True,
            train_backbone=True, disable_tqdm=True, lr_scheduler_type="constant", dataloader_pin_memory=False,
        )  # fmt: skip
        data = [{"input_ids": torch.arange(2 + i, 18 + i), "labels": torch.arange(2 + i, 18 + i)} for i in range(16)]
        trainer = EngramTrainer(model, args, train_dataset=data, callbacks=[BalanceCallback(model, 0.05)])
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = run(tmp_path / "a", 4)
    run(tmp_path / "b", 2)
    resumed = run(tmp_path / "b", 4, str(tmp_path / "b" / "checkpoint-2"))
    biases = [{n: r.e_score_correction_bias for n, r in find_routers(t.model).items()} for t in (whole, resumed)]
    assert any(bias.abs().sum() > 0 for bias in biases[0].values())
    assert all(torch.equal(biases[0][name], biases[1][name]) for name in biases[0])
    assert [e["expert_load_max"] for e in whole.state.log_history if "loss" in e][-1] >= 1


def test_models_without_such_routers_and_negative_rates_are_refused():
    with pytest.raises(ConfigError, match="no router"):
        LoadBalancer(tiny_model("llama"))
    with pytest.raises(ConfigError, match="rate"):
        LoadBalancer(tiny_model("deepseek_v3"), rate=-1.0)


@pytest.mark.parametrize("model_type", ["ernie4_5_moe", "minimax_m2", "hy_v3", "longcat_flash"])
def test_routers_of_other_makes_are_counted(model_type):
    model = tiny_model(model_type).train()
    balancer = LoadBalancer(model, rate=0.5)
    model(input_ids=torch.randint(2, 300, (2, 16)), use_cache=False)
    name, load = next(iter(balancer._loads.items()))
    router = balancer.routers[name]
    before = router.e_score_correction_bias.detach().clone()
    assert int(load.sum()) % 32 == 0
    assert len(load) == before.numel()
    balancer.update()
    assert torch.equal(router.e_score_correction_bias, step_bias(before, load.view_as(before).float(), 0.5))


def test_a_router_that_does_not_say_what_it_chose_is_refused():
    class Silent(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.e_score_correction_bias = torch.nn.Parameter(torch.zeros(4))

        def forward(self, x):
            return x, x

    router = Silent().train()
    LoadBalancer(router)
    with pytest.raises(ConfigError, match=r"router \(Silent\) that does not give the numbers"):
        router(torch.zeros(3))


def test_routers_of_a_frozen_model_stay_as_they_are(tmp_path):
    memory = tiny_memory(tiny_model("deepseek_v3"))
    args = EngramTrainingArguments(
        str(tmp_path), max_steps=1, report_to=[], use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False
    )
    data = [{"input_ids": torch.arange(2, 18), "labels": torch.arange(2, 18)}] * 8
    trainer = EngramTrainer(memory, args, train_dataset=data, callbacks=[BalanceCallback(memory)])
    with pytest.raises(ConfigError, match="got a frozen base model"):
        trainer.train()
