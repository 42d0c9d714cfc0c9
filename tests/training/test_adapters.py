"""Adapters on the base model: trained with a memory, saved beside it, and part of a backbone that is trained."""

import json
import logging
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_model
from transformers import AutoModelForCausalLM

from engram import CheckpointError, ConfigError, EngramModel, Fact, MemoryEditor, get_engram_model
from engram.models import load_adapters, load_model
from engram.models.identity import adapter_parameters, base_identity, identity_mismatch
from engram.testing import tiny_config, tiny_memory, tiny_model, tiny_tokenizer
from engram.training import weight_files
from tests.training.test_trainer import Rows, losses, make

peft = pytest.importorskip("peft")
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning"),  # peft asks for it
]

SAVING = {"save_strategy": "steps", "save_steps": 3, "max_steps": 6}


def add_adapter(model, config):
    """By transformers itself; it asks for a newer peft than it needs for that."""
    with mock.patch("transformers.integrations.peft.check_peft_version"):
        model.add_adapter(config)


def adapted_memory(way="get_peft_model", **changes):
    """A memory whose base got an adapter after it."""
    memory = tiny_memory(speak=False)
    fields = {"r": 4, "target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.1, "task_type": "CAUSAL_LM"}
    config = peft.LoraConfig(**{**fields, **changes})
    torch.manual_seed(7)
    if way == "get_peft_model":
        peft.get_peft_model(memory.base_model, config)
    else:
        add_adapter(memory.base_model, config)
    return memory


def adapted_before():
    """A memory whose base had an adapter before it."""
    base = tiny_model()
    peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    return base


def state(memory):
    return {name: p.detach().clone() for name, p in memory.named_parameters()}


def resumed_equals_straight(tmp_path, make_memory, **options):
    """The memory of a run in one piece, after checking that one resumed half-way has its losses and weights."""
    straight = make(tmp_path / "straight", make_memory(), **SAVING, **options)
    straight.train()
    resumed = make(tmp_path / "resumed", make_memory(), **SAVING, **options)
    resumed.train(resume_from_checkpoint=f"{straight.args.output_dir}/checkpoint-3")
    assert losses(resumed) == losses(straight)
    after = state(resumed.memory)
    assert all(torch.equal(p, after[name]) for name, p in state(straight.memory).items())
    return straight


@pytest.mark.parametrize("way", ["get_peft_model", "add_adapter"])
@pytest.mark.parametrize("changes", [{}, {"modules_to_save": ["lm_head"]}], ids=["lora", "modules_to_save"])
def test_trainable_adapters_are_trained_with_the_memory_and_resume(tmp_path, way, changes):
    before = state(adapted_memory(way, **changes))
    trainer = resumed_equals_straight(tmp_path, lambda: adapted_memory(way, **changes))
    trained = {name for name, p in state(trainer.memory).items() if not torch.equal(p, before[name])}
    adapters = {name for name in before if "lora_" in name or "modules_to_save" in name}
    assert {name for name in trained if name.startswith("base_model.")} == adapters
    assert any(name.startswith("engrams.") for name in trained)
    saved = load_file(f"{trainer.args.output_dir}/checkpoint-6/engram_adapters.safetensors")
    assert {f"base_model.{name}" for name in saved} == adapters


def test_the_best_adapters_are_loaded_at_the_end(tmp_path):
    trainer = make(
        tmp_path,
        adapted_memory(),
        held_out=Rows(8),
        eval_strategy="steps",
        eval_steps=3,
        load_best_model_at_end=True,
        learning_rate=0.5,
        **SAVING,
    )
    trainer.train()
    best = load_file(f"{trainer.state.best_model_checkpoint}/engram_adapters.safetensors")
    present = dict(trainer.memory.base_model.named_parameters())
    assert all(torch.equal(present[name], values) for name, values in best.items())


@pytest.mark.parametrize("way", ["get_peft_model", "add_adapter"])
def test_a_trained_backbone_with_adapters_is_saved_whole(tmp_path, way):
    changes = {"modules_to_save": ["embed_tokens"]} if way == "get_peft_model" else {}
    trainer = resumed_equals_straight(tmp_path, lambda: adapted_memory(way, **changes), train_backbone=True)
    checkpoint = f"{trainer.args.output_dir}/checkpoint-6"
    base = AutoModelForCausalLM.from_pretrained(f"{checkpoint}/backbone")
    assert torch.equal(base.model.layers[0].self_attn.q_proj.weight, own_weight(trainer.backbone))
    assert loaded_with_peft(base, checkpoint, trainer.memory) == []


@pytest.mark.parametrize("way", ["get_peft_model", "add_adapter"])
def test_a_plain_model_with_adapters_is_saved_and_resumes(tmp_path, way):
    options = {"train_backbone": True, **SAVING}
    plain = lambda: adapted_memory(way).unload()  # noqa: E731
    straight, resumed = (make(tmp_path / name, plain(), **options) for name in ("straight", "resumed"))
    straight.train()
    checkpoint = f"{straight.args.output_dir}/checkpoint-3"
    resumed.train(resume_from_checkpoint=checkpoint)
    assert losses(resumed) == losses(straight)
    assert all(torch.equal(p, state(straight.model)[name]) for name, p in state(resumed.model).items())
    base = AutoModelForCausalLM.from_pretrained(checkpoint)
    again = peft.PeftModel.from_pretrained(base, f"{checkpoint}/adapters").get_base_model()
    refilled = make(tmp_path / "refilled", plain(), **options)
    refilled._load_from_checkpoint(checkpoint)
    ids = torch.arange(12)[None]
    assert torch.equal(again.eval()(ids).logits, refilled.model.eval()(ids).logits)


def own_weight(base):
    return base.model.layers[0].self_attn.q_proj.base_layer.weight


def loaded_with_peft(base, folder, memory):
    """Names of what differs between a memory and what the files of its checkpoint make of its trained base model."""
    adapted = peft.PeftModel.from_pretrained(base, f"{folder}/adapters").get_base_model()
    loaded = EngramModel.from_pretrained(adapted, folder, tiny_tokenizer())
    after = state(memory)
    return [name for name, p in state(loaded).items() if not torch.equal(p, after[name])]


def test_frozen_adapters_stay_so_while_the_base_model_is_trained(tmp_path):
    memory = adapted_memory()
    adapters = adapter_parameters(memory.base_model)
    for parameter in adapters.values():
        parameter.requires_grad_(False)
    before = state(memory)
    trainer = make(tmp_path, memory, train_backbone=True, **SAVING)
    trainer.train()
    changed = {name for name, p in state(memory).items() if not torch.equal(p, before[name])}
    assert "base_model.model.layers.0.self_attn.q_proj.base_layer.weight" in changed
    assert not {f"base_model.{name}" for name in adapters} & changed
    checkpoint = tmp_path / "run" / "checkpoint-6"
    assert not (checkpoint / "engram_adapters.safetensors").exists()
    assert loaded_with_peft(AutoModelForCausalLM.from_pretrained(checkpoint / "backbone"), checkpoint, memory) == []


def test_adapters_that_are_frozen_are_saved_beside_those_that_are_trained(tmp_path):
    """All that are at work; an idle one is not, whatever it is called."""
    memory, config = tiny_memory(speak=False), peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(memory.base_model, config)
    for name in ("second", "model"):
        adapted.add_adapter(name, config)
    adapted.base_model.set_adapter(["default", "second"])
    for name, parameter in adapter_parameters(memory.base_model).items():
        parameter.requires_grad_(".second." in name)
    trainer = make(tmp_path, memory, max_steps=1)
    trainer.train()
    trainer.save_model(tmp_path / "saved")
    assert sorted(p.name for p in (tmp_path / "saved" / "adapters").iterdir() if p.is_dir()) == ["second"]
    base = tiny_model()
    load_adapters(base, tmp_path / "saved")
    loaded = EngramModel.from_pretrained(base, tmp_path / "saved", tiny_tokenizer())
    ids = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, memory.eval()(input_ids=ids).logits)
    trained = load_file(tmp_path / "saved" / "engram_adapters.safetensors")
    assert trained
    assert all(".second." in name for name in trained)


def test_adapters_that_were_trained_are_saved_whatever_is_at_work_by_then(tmp_path):
    memory = tiny_memory(speak=False)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(memory.base_model, config)
    trainer = make(tmp_path, memory, max_steps=1)
    trainer.train()
    adapted.add_adapter("a/b", config)
    adapted.set_adapter("a/b")
    trainer.save_model(tmp_path / "idle")
    adapted.base_model.disable_adapter_layers()
    trainer.save_model(tmp_path / "off")
    for name in ("idle", "off"):
        assert (tmp_path / name / "adapters" / "adapter_model.safetensors").is_file()
    loaded = load_adapters(tiny_model(), tmp_path / "idle")
    assert list(loaded.peft_config) == ["default", "a/b"]
    assert list(load_adapters(tiny_model(), tmp_path / "off").peft_config) == ["default"]
    assert load_adapters(plain := tiny_model(), tmp_path) is plain


def test_somebody_elses_adapters_are_left_where_they_are(tmp_path):
    peft.get_peft_model(tiny_model(), peft.LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "s" / "adapters")
    make(tmp_path, tiny_model(), train_backbone=True, max_steps=1).save_model(tmp_path / "s")
    assert (tmp_path / "s" / "adapters" / "adapter_model.safetensors").is_file()
    assert (tmp_path / "s" / "model.safetensors").is_file()


def test_adapters_name_the_base_model_that_was_trained_with_them(tmp_path):
    """And are put on it as they are: PiSSA's start would be taken out of the weights once more."""
    memory = adapted_memory(init_lora_weights="pissa", lora_dropout=0.0)
    trainer = make(tmp_path, memory, train_backbone=True, max_steps=1)
    trainer.train()
    trainer.save_model(tmp_path / "saved")
    tiny_tokenizer().save_pretrained(tmp_path / "saved" / "adapters")
    base, _ = load_model(tmp_path / "saved" / "adapters")
    ids = torch.arange(12)[None]
    with torch.no_grad(), memory.disable_engram():
        assert torch.equal(base(ids).logits, memory.eval()(input_ids=ids).logits)


def test_merged_adapters_are_refused(tmp_path):
    memory = adapted_memory()
    adapted = memory.base_model.model.layers[0].self_attn.q_proj
    adapted.merge()
    with pytest.raises(ConfigError, match=r"adapters that are merged.*unmerge_adapter"):
        make(tmp_path, memory)
    adapted.unmerge()
    make(tmp_path, memory)


def test_an_earlier_versions_checkpoint_of_both_resumes(tmp_path):
    """Its backbone has the names that adapters give, and the adapters in it."""
    trainer = make(tmp_path, adapted_memory(), train_backbone=True, **SAVING)
    trainer.train()
    checkpoint, again = tmp_path / "run" / "checkpoint-3", adapted_memory()
    whole = make(tmp_path / "whole", again, train_backbone=True, **SAVING)
    whole._load_from_checkpoint(str(checkpoint))
    expected = state(again)
    (checkpoint / "engram_adapters.safetensors").unlink()
    save_model(again.base_model, checkpoint / "backbone" / "model.safetensors")
    resumed = make(tmp_path / "resumed", adapted_memory(), train_backbone=True, **SAVING)
    resumed._load_from_checkpoint(str(checkpoint))
    assert all(torch.equal(p, expected[name]) for name, p in state(resumed.memory).items())
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert losses(resumed) == losses(trainer)


def test_a_tokenizer_that_cannot_be_saved_is_left_out(tmp_path):
    class Bare:
        def __init__(self):
            self.inner = tiny_tokenizer()

        def __len__(self):
            return len(self.inner)

        def decode(self, *args, **kwargs):
            return self.inner.decode(*args, **kwargs)

        def convert_ids_to_tokens(self, ids):
            return self.inner.convert_ids_to_tokens(ids)

    trainer = make(tmp_path, get_engram_model(tiny_model(), tiny_config(), Bare()), train_backbone=True, max_steps=1)
    trainer.save_model(tmp_path / "saved")
    assert (tmp_path / "saved" / "backbone" / "model.safetensors").is_file()
    assert not (tmp_path / "saved" / "backbone" / "tokenizer.json").exists()


def test_parameters_that_adapters_move_about_are_the_same_weights():
    """Of fused experts peft registers single parameters anew in every pass, at the end of their module."""
    plain, adapted = tiny_model("mixtral"), tiny_model("mixtral")
    peft.get_peft_model(adapted, peft.LoraConfig(r=2, target_modules=[], target_parameters=["experts.gate_up_proj"]))
    with torch.no_grad():
        adapted(torch.arange(12)[None])
    saved, present = base_identity(plain), base_identity(adapted)
    assert saved["weights_sha256"] != present["weights_sha256"]
    assert identity_mismatch(saved, present) == []
    with torch.no_grad():
        plain.model.layers[0].self_attn.q_proj.weight[0, 0] += 1
    assert identity_mismatch(base_identity(plain), present) != []


def test_adapters_alone_are_trained_over_a_frozen_memory(tmp_path):
    frozen = {"train_tables": False, "train_reader": False, "max_steps": 1}
    memory = adapted_memory()
    before = state(memory)
    make(tmp_path, memory, **frozen).train()
    changed = {name for name, p in state(memory).items() if not torch.equal(p, before[name])}
    assert changed
    assert all("lora_" in name for name in changed)
    with pytest.raises(ConfigError, match="nothing to train"):
        make(tmp_path, **frozen)


def test_adapters_that_were_there_before_the_memory_are_trained_too(tmp_path):
    base = adapted_before()
    flags = {name: p.requires_grad for name, p in base.named_parameters()}
    memory = get_engram_model(base, tiny_config(), tiny_tokenizer())
    trainable = {name for name, p in base.named_parameters() if p.requires_grad}
    assert trainable == {name for name in flags if "lora_" in name}
    before = state(memory)
    make(tmp_path, memory, max_steps=2).train()
    changed = {name for name, p in state(memory).items() if not torch.equal(p, before[name])}
    assert {name for name in changed if name.startswith("base_model.")} == {f"base_model.{name}" for name in trainable}
    memory.unload()
    assert {name: p.requires_grad for name, p in base.named_parameters()} == flags


def test_adapters_are_frozen_where_facts_are_taught():
    base = adapted_before()
    editor = MemoryEditor.create(base, tiny_tokenizer())
    assert not any(p.requires_grad for p in base.parameters())
    editor.memory.unload()
    assert any(p.requires_grad for p in base.parameters())


def test_frozen_adapters_stay_frozen_and_are_not_saved(tmp_path):
    memory = adapted_memory()
    memory.base_model.requires_grad_(False)
    before = state(memory)
    trainer = make(tmp_path, memory, **SAVING)
    trainer.train()
    after = state(memory)
    assert all(torch.equal(p, after[name]) for name, p in before.items() if name.startswith("base_model."))
    assert not list((tmp_path / "run").rglob("engram_adapters.safetensors"))


def test_a_checkpoint_of_other_adapters_is_refused(tmp_path):
    with_adapters = make(tmp_path / "with", adapted_memory(), **SAVING)
    with_adapters.train()
    without = make(tmp_path / "without", **SAVING)
    without.train()
    for memory, checkpoint, message in (
        (tiny_memory(speak=False), with_adapters, "other trainable adapters"),
        (adapted_memory(), without, "made without trainable adapters"),
        (adapted_memory(r=2), with_adapters, "other trainable adapters"),
    ):
        trainer = make(tmp_path / "refused", memory, **SAVING)
        with pytest.raises(CheckpointError, match=message):
            trainer.train(resume_from_checkpoint=f"{checkpoint.args.output_dir}/checkpoint-3")


def test_a_backbone_file_that_was_not_written_is_noticed(tmp_path, monkeypatch):
    trainer = make(tmp_path, train_backbone=True, **SAVING)
    monkeypatch.setattr(type(trainer.backbone), "save_pretrained", lambda *args, **kwargs: None)
    with pytest.raises(CheckpointError, match="was not written"):
        trainer.train()


def test_the_first_process_of_every_node_writes_whole_adapters(tmp_path, monkeypatch):
    monkeypatch.setattr(weight_files, "process_rank", lambda: 8)
    adapters = adapter_parameters(adapted_memory().base_model)
    weight_files.save_adapters(adapters, tmp_path / "adapters.safetensors")
    assert load_file(tmp_path / "adapters.safetensors").keys() == adapters.keys()


def test_adapters_have_a_rate_of_their_own(tmp_path):
    trainer = make(tmp_path, adapted_memory(), backbone_lr=1e-4, max_steps=1)
    rates = {group["name"]: group["lr"] for group in trainer.create_optimizer().param_groups}
    assert rates["backbone"] == 1e-4
    assert rates["reader"] == 1e-2
    with pytest.raises(ConfigError, match=r"backbone_lr: got 0.0001 .* no trainable adapters .* add adapters"):
        make(tmp_path, backbone_lr=1e-4)


@pytest.mark.parametrize("way", ["get_peft_model", "add_adapter"])
@pytest.mark.parametrize("changes", [{}, {"modules_to_save": ["lm_head"]}], ids=["lora", "modules_to_save"])
def test_saved_adapters_are_read_by_peft(tmp_path, way, changes, caplog):
    trainer = make(tmp_path, adapted_memory(way, **changes), **SAVING)
    trainer.train()
    trainer.save_model(tmp_path / "final")
    ids = torch.arange(2, 14)[None]
    with torch.no_grad():
        wanted = trainer.memory.eval()(input_ids=ids).logits
    for folder in (tmp_path / "final", tmp_path / "run" / "checkpoint-6"):
        adapted = peft.PeftModel.from_pretrained(tiny_model(), folder / "adapters").eval()
        with caplog.at_level(logging.WARNING, "engram"):
            memory = EngramModel.from_pretrained(adapted.get_base_model(), folder, tiny_tokenizer()).eval()
        with torch.no_grad():
            assert torch.equal(memory(input_ids=ids).logits, wanted)
    assert not caplog.records


def test_adapters_of_an_earlier_run_do_not_stay(tmp_path):
    make(tmp_path, adapted_memory(), max_steps=1).save_model(tmp_path / "final")
    assert (tmp_path / "final" / "adapters" / "adapter_config.json").is_file()
    make(tmp_path, max_steps=1).save_model(tmp_path / "final")
    assert not (tmp_path / "final" / "adapters").exists()


def test_several_adapters_lie_in_folders_of_their_names(tmp_path):
    memory = tiny_memory(speak=False)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(memory.base_model, config, adapter_name="first")
    adapted.add_adapter("second", config)
    adapted.base_model.set_adapter(["first", "second"])
    make(tmp_path, memory, max_steps=1).save_model(tmp_path / "final")
    for name in ("first", "second"):
        peft.PeftModel.from_pretrained(tiny_model(), tmp_path / "final" / "adapters" / name)


def test_adapters_that_peft_cannot_take_out_are_told_of_and_resume(tmp_path, caplog, monkeypatch):
    def refuse(*args, **kwargs):
        raise KeyError("base_model.vera_A.default")

    monkeypatch.setattr(peft, "get_peft_model_state_dict", refuse)
    trainer = make(tmp_path, adapted_memory(), **SAVING)
    with caplog.at_level(logging.WARNING, "engram"):
        trainer.train()
    assert "is saved to resume from alone" in caplog.text
    again = make(tmp_path, adapted_memory(), **SAVING)
    again.train(resume_from_checkpoint=f"{trainer.args.output_dir}/checkpoint-3")


def test_a_memory_trained_beside_adapters_says_so_once(tmp_path, caplog):
    trainer = make(tmp_path, adapted_memory(), max_steps=1)
    trainer.train()
    trainer.save_model(tmp_path / "both")
    assert json.loads((tmp_path / "both" / "engram.json").read_text())["trained_beside"] == ["LORA"]
    with caplog.at_level(logging.WARNING, "engram"):
        memory = EngramModel.from_pretrained(tiny_model(), tmp_path / "both", tiny_tokenizer())
    (record,) = caplog.records
    assert "trained beside adapters (LORA), and the base model has none" in record.getMessage()
    assert str(tmp_path / "both" / "adapters") in record.getMessage()
    memory.save_pretrained(tmp_path / "again")  # and does not forget it
    assert json.loads((tmp_path / "again" / "engram.json").read_text())["trained_beside"] == ["LORA"]


@pytest.fixture
def both(tmp_path):
    """A memory and adapters that were trained together."""
    trainer = make(tmp_path, adapted_memory(), max_steps=1)
    trainer.train()
    trainer.save_model(tmp_path / "both")
    return tmp_path / "both"


def warnings_of(caplog, base, memory):
    caplog.clear()
    with caplog.at_level(logging.WARNING, "engram"):
        EngramModel.from_pretrained(base, memory, tiny_tokenizer()).unload()
    return caplog.text


OTHERS = {
    "weights": lambda base: next(iter(adapter_parameters(base).values())).data.mul_(1.5),
    "scaling": lambda base: [m.set_scale("default", 3.0) for m in base.modules() if hasattr(m, "adapter_layer_names")],
    "off": lambda base: [m.enable_adapters(False) for m in base.modules() if hasattr(m, "adapter_layer_names")],
    "one more": lambda base: add_another(base),
}


def add_another(base):
    with pytest.warns(UserWarning, match="multiple adapters"):
        peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["q_proj"]), base, adapter_name="more")
    for module in base.modules():
        if hasattr(module, "adapter_layer_names"):
            module.set_adapter(["default", "more"])


@pytest.mark.parametrize("change", OTHERS)
def test_other_adapters_than_those_beside_a_memory_are_told_of(both, caplog, change):
    base = load_adapters(tiny_model(), both)
    assert warnings_of(caplog, base, both) == ""
    with torch.no_grad():
        OTHERS[change](base)
    assert "others at work, or the same with other weights or another scaling" in warnings_of(caplog, base, both)


def test_adapters_are_the_same_by_another_name_and_in_another_type(both, caplog):
    renamed = peft.PeftModel.from_pretrained(tiny_model(), both / "adapters", adapter_name="renamed").get_base_model()
    assert warnings_of(caplog, renamed, both) == ""
    assert warnings_of(caplog, load_adapters(tiny_model(), both).bfloat16(), both) == ""


def test_a_memory_keeps_which_adapters_it_was_trained_beside(both, tmp_path, caplog):
    """Saved again without them, and with others that are not trained; with ones that are, it is a memory beside those."""
    bare = EngramModel.from_pretrained(tiny_model(), both, tiny_tokenizer())
    bare.save_pretrained(tmp_path / "bare")
    assert warnings_of(caplog, load_adapters(tiny_model(), both), tmp_path / "bare") == ""
    other = load_adapters(tiny_model(), both)
    OTHERS["scaling"](other)
    memory = EngramModel.from_pretrained(other, both, tiny_tokenizer())
    memory.save_pretrained(tmp_path / "beside_frozen")
    memory.unload()
    assert "another scaling" in warnings_of(caplog, other, tmp_path / "beside_frozen")
    for parameter in adapter_parameters(other).values():
        parameter.requires_grad_(True)
    memory = EngramModel.from_pretrained(other, both, tiny_tokenizer())
    memory.save_pretrained(tmp_path / "beside_trained")
    memory.unload()
    assert warnings_of(caplog, other, tmp_path / "beside_trained") == ""


def test_memories_that_do_not_say_which_adapters_load_without_a_word(both, caplog):
    file = both / "engram.json"
    description = json.loads(file.read_text())
    assert len(description.pop("adapters_sha256")) == 1
    file.write_text(json.dumps(description))
    assert warnings_of(caplog, adapted_before(), both) == ""


def test_resuming_with_another_scaling_is_refused(tmp_path):
    trainer = make(tmp_path / "first", adapted_memory(), **SAVING)
    trainer.train()
    again = make(tmp_path / "again", adapted_memory(lora_alpha=16), **SAVING)
    with pytest.raises(CheckpointError, match=r"count for more or less than then \(lora_alpha\)"):
        again.train(resume_from_checkpoint=f"{trainer.args.output_dir}/checkpoint-3")


def test_a_loop_of_ones_own_notes_trained_adapters_and_facts_note_none(tmp_path):
    adapted_memory().save_pretrained(tmp_path / "loop")
    assert json.loads((tmp_path / "loop" / "engram.json").read_text())["trained_beside"] == ["LORA"]
    tiny_memory().save_pretrained(tmp_path / "alone")
    assert "trained_beside" not in json.loads((tmp_path / "alone" / "engram.json").read_text())
    editor = MemoryEditor.create(adapted_before(), tiny_tokenizer())
    editor.teach([Fact(("ACRONYM:GPU",), "G", id="gpu")])
    editor.save(tmp_path / "facts")
    assert "trained_beside" not in json.loads((tmp_path / "facts" / "engram.json").read_text())


def test_counts_are_printed_by_kind(capsys):
    memory = adapted_memory()
    memory.engrams.requires_grad_(True)
    memory.print_trainable_parameters()
    kinds = memory.num_parameters_by_kind()
    adapters = sum(p.numel() for p in adapter_parameters(memory.base_model).values())
    tables, reader, base = (f"{n:,}" for n in (kinds["tables"], kinds["reader"], kinds["base"] - adapters))
    words = f"tables {tables} of {tables}, reader {reader} of {reader}, adapters {adapters:,} of {adapters:,}, base 0 of {base}"
    assert words in capsys.readouterr().out
