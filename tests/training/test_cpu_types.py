"""Whoever trains in a type that this CPU only emulates is told so."""

import logging

import pytest

from engram.testing import tiny_memory
from engram.training import EngramTrainer, EngramTrainingArguments, cpu_types


@pytest.fixture
def bfloat16_takes(monkeypatch):
    def pretend(times):
        cpu_types.bfloat16_slowdown.cache_clear()
        monkeypatch.setattr(cpu_types, "_seconds_of_product", lambda dtype: times if dtype.itemsize == 2 else 1.0)

    yield pretend
    cpu_types.bfloat16_slowdown.cache_clear()


def test_it_is_measured():
    assert cpu_types.bfloat16_slowdown() > 0.01


def test_a_slow_type_is_named_with_what_to_change(bfloat16_takes):
    bfloat16_takes(1.4)
    assert cpu_types.warning_of_slow_bfloat16("bf16: false") is None
    bfloat16_takes(47.0)
    assert "47 times as long" in cpu_types.warning_of_slow_bfloat16("bf16: false")
    assert "Set bf16: false" in cpu_types.warning_of_slow_bfloat16("bf16: false")


@pytest.mark.parametrize("bf16", [True, False])
def test_a_trainer_says_so(bfloat16_takes, tmp_path, caplog, bf16):
    bfloat16_takes(47.0)
    rows = [{"input_ids": list(range(2, 10)), "labels": list(range(2, 10))}] * 2
    options = {"use_cpu": True, "bf16": bf16, "max_steps": 1, "save_strategy": "no", "report_to": [], "disable_tqdm": True}
    args = EngramTrainingArguments(output_dir=str(tmp_path), dataloader_pin_memory=False, **options)
    with caplog.at_level(logging.WARNING, "engram"):
        EngramTrainer(tiny_memory(), args, train_dataset=rows).train()
    assert ("emulated on this CPU" in caplog.text) == bf16
