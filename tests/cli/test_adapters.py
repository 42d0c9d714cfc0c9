"""Commands on a memory that was trained beside adapters, or with its base model: what it was trained with is loaded with it."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from engram import CheckpointError, EngramTrainer, EngramTrainingArguments, get_engram_model
from engram.checkpoint import read_description
from engram.cli.loading import Running, open_memory
from engram.testing import tiny_config, tiny_tokenizer
from tests.training.test_trainer import Rows, fields_for

peft = pytest.importorskip("peft")
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning"),  # peft asks for it
]
IDS = torch.arange(5, 17)[None]


@pytest.fixture(scope="module")
def trained(world, tmp_path_factory):
    """Folders of memories by how they were trained, and what each answers."""
    folder, answers = tmp_path_factory.mktemp("trained"), {}
    for name, adapters, train_backbone in (
        ("adapters", ["default"], False),
        ("several", ["default", "other"], False),
        ("backbone", [], True),
        ("both", ["default"], True),
    ):
        base = AutoModelForCausalLM.from_pretrained(world / "base")
        if adapters:
            _adapt(base, adapters)
        memory = get_engram_model(base, tiny_config(table_init="normal"), tiny_tokenizer())
        fields = fields_for(folder / "runs", max_steps=3, train_backbone=train_backbone)
        trainer = EngramTrainer(memory, EngramTrainingArguments(**fields), train_dataset=Rows())
        trainer.train()
        trainer.save_model(str(folder / name))
        with torch.no_grad():
            answers[name] = memory.eval()(input_ids=IDS).logits
    return folder, answers


def _adapt(base, names):
    torch.manual_seed(7)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(base, config, names[0])
    for name in names[1:]:
        adapted.add_adapter(name, config)
    adapted.base_model.set_adapter(names)


@pytest.mark.parametrize("name", ["adapters", "several", "backbone", "both"])
def test_a_memory_is_read_with_what_it_was_trained_with(trained, name, caplog):
    folder, answers = trained
    memory, tokenizer = open_memory(folder / name, None, Running())
    with torch.no_grad():
        assert torch.equal(memory(input_ids=IDS).logits, answers[name])
    assert len(tokenizer) == len(tiny_tokenizer())
    assert not caplog.records
    assert not any(parameter.requires_grad for parameter in memory.base_model.parameters())


def test_facts_are_taught_on_top_of_it_and_asked(trained, engram, tmp_path):
    over = shutil.copytree(trained[0] / "both", tmp_path / "both")
    code, _, err = engram("teach", "one.yaml", "--memory", tmp_path / "facts", "--over", over)
    assert code == 0, err
    code, out, err = engram("ask", "KEY:beta 20", "--memory", tmp_path / "facts")
    assert (code, out, err) == (0, "7319\n", "")
    (tmp_path / "moved").mkdir()
    for name in ("both", "facts"):  # with the base model and the adapters in it
        (tmp_path / name).rename(tmp_path / "moved" / name)
    stack, _ = open_memory(tmp_path / "moved" / "facts", None, Running())
    with torch.no_grad(), stack.disable_engram():
        assert torch.equal(stack(input_ids=IDS).logits, trained[1]["both"])


def test_adapters_are_put_on_the_base_model_they_were_trained_with_alone(trained, world, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(world / "base")
    adapted = peft.PeftModel.from_pretrained(base, trained[0] / "adapters" / "adapters")
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    AutoTokenizer.from_pretrained(world / "base").save_pretrained(tmp_path / "merged")
    memory, _ = open_memory(trained[0] / "adapters", str(tmp_path / "merged"), Running(allow_other_base=True))
    assert "peft_config" not in vars(memory.base_model)
    with torch.no_grad():
        assert (memory(input_ids=IDS).logits - trained[1]["adapters"]).abs().max() < 1e-4


def test_adapters_of_another_run_are_not_put_on(trained, tmp_path):
    folder = shutil.copytree(trained[0] / "adapters", tmp_path / "m")
    memory, _ = open_memory(trained[0] / "backbone", None, Running())
    memory.save_pretrained(folder, overwrite=True)
    again, _ = open_memory(folder, None, Running())
    with torch.no_grad():
        assert torch.equal(again(input_ids=IDS).logits, trained[1]["backbone"])


def test_converted_rows_keep_the_adapters(trained, engram, tmp_path):
    code, _, err = engram("convert", trained[0] / "both", "--dtype", "float16", "--out", tmp_path / "half")
    assert code == 0, err
    named, _ = open_memory(trained[0] / "both", str(trained[0] / "both"), Running())  # the folder stands for the model in it
    assert named.base_model.name_or_path == str(trained[0] / "both" / "backbone")
    assert read_description(tmp_path / "half")["base_model"]["name_or_path"] == str(trained[0] / "both" / "backbone")
    memory, _ = open_memory(tmp_path / "half", None, Running())
    with torch.no_grad():
        away = (memory(input_ids=IDS).logits - trained[1]["both"]).abs().max()
    assert away < 1e-2


def test_adapters_that_model_names_come_first(trained, world, tmp_path):
    named = shutil.copytree(trained[0] / "adapters" / "adapters", tmp_path / "named")
    AutoTokenizer.from_pretrained(world / "base").save_pretrained(named)
    memory, _ = open_memory(trained[0] / "several", str(named), Running())  # which has two beside it
    assert list(memory.base_model.peft_config) == ["default"]


def test_adapters_that_cannot_be_loaded_are_said(trained, engram, tmp_path, monkeypatch):
    memory = shutil.copytree(trained[0] / "adapters", tmp_path / "m")
    weights = memory / "adapters" / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:100])
    code, out, err = engram("ask", "x", "--memory", memory)
    assert (code, out) == (1, "")
    assert f"the adapters in {memory / 'adapters'} cannot be put on the base model" in err
    assert "Traceback" not in err
    weights.write_bytes(whole)
    config = json.loads((memory / "adapters" / "adapter_config.json").read_text())
    (memory / "adapters" / "adapter_config.json").write_text(json.dumps({**config, "target_modules": ["nowhere"]}))
    with pytest.raises(CheckpointError, match="cannot be put on the base model"):
        open_memory(Path(memory), None, Running())
    monkeypatch.setitem(sys.modules, "peft", None)
    code, out, err = engram("ask", "x", "--memory", memory)
    assert (code, out) == (1, "")
    assert "pip install 'engram-memory[lora]'" in err
