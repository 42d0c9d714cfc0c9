"""A memory and LoRA in one model: each is switched off, saved and loaded on its own."""

import pytest
import torch

from engram import MemoryEditor
from engram.models import load_model
from engram.models.identity import base_identity
from engram.testing import tiny_model, tiny_tokenizer
from tests.editing.helpers import FACTS

peft = pytest.importorskip("peft")
# peft itself asks for an attribute that transformers is about to rename.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")


def base():
    return tiny_model(hidden_size=64, intermediate_size=96)


def with_lora(model):
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    return peft.get_peft_model(model, config).eval()


@pytest.mark.parametrize("merged", [False, True])
def test_flags_of_adapters_that_came_after_the_memory_are_not_touched(merged):
    model = base()
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    memory = MemoryEditor.create(model, tiny_tokenizer()).memory
    adapted = with_lora(model)
    if merged:  # then the parameters are those of before again
        adapted.merge_and_unload()
        memory.unload()
        assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
        return
    memory.unload()
    assert all(p.requires_grad == ("lora_" in name) for name, p in adapted.named_parameters())


@torch.no_grad()
def test_a_folder_of_adapters_is_loaded_with_its_base(tmp_path):
    base().save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    adapted = with_lora(load_model(str(tmp_path / "base"))[0])
    adapted.save_pretrained(tmp_path / "lora")
    tiny_tokenizer().save_pretrained(tmp_path / "lora")
    assert not (tmp_path / "lora" / "config.json").exists()
    loaded, _ = load_model(str(tmp_path / "lora"))
    ids = torch.arange(12)[None]
    assert torch.equal(loaded(input_ids=ids).logits, adapted(input_ids=ids).logits)


@torch.no_grad()
def test_each_part_is_switched_and_saved_apart(tmp_path):
    torch.manual_seed(0)
    ids = tiny_tokenizer()("KEY:beta 20", return_tensors="pt")["input_ids"]
    plain = base()(input_ids=ids).logits
    adapted = with_lora(base())
    editor = MemoryEditor.create(adapted.base_model.model, tiny_tokenizer())
    memory = editor.memory
    lora_alone = memory(input_ids=ids, use_cache=False).logits
    assert not torch.allclose(lora_alone, plain, atol=1e-3)
    editor.teach(FACTS)
    assert all(editor.verify().values())
    both = memory(input_ids=ids, use_cache=False).logits
    with memory.disable_engram():
        assert torch.equal(memory(input_ids=ids, use_cache=False).logits, lora_alone)
        with adapted.disable_adapter():
            assert torch.equal(memory(input_ids=ids, use_cache=False).logits, plain)
    with adapted.disable_adapter():
        alone = memory(input_ids=ids, use_cache=False).logits
        assert not torch.equal(alone, both)
        assert not torch.equal(alone, plain)
    assert torch.equal(memory(input_ids=ids, use_cache=False).logits, both)

    adapted.save_pretrained(tmp_path / "lora")
    editor.save(tmp_path / "memory")
    again = peft.PeftModel.from_pretrained(base(), tmp_path / "lora").eval()
    assert torch.equal(again(input_ids=ids).logits, lora_alone)
    loaded = MemoryEditor.load(again.base_model.model, tmp_path / "memory", tiny_tokenizer())
    assert torch.equal(loaded.memory(input_ids=ids, use_cache=False).logits, both)
    loaded.memory.unload()
    only = MemoryEditor.load(base(), tmp_path / "memory", tiny_tokenizer())  # the memory without LoRA
    assert torch.equal(only.memory(input_ids=ids, use_cache=False).logits, alone)


@pytest.mark.parametrize(
    "config",
    [
        peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]),
        peft.LoraConfig(target_modules=["q_proj"], trainable_token_indices=[1, 5]),
        peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
        peft.VeraConfig(target_modules=["q_proj"]),
    ],
    ids=["modules_to_save", "trainable_tokens", "ia3", "vera"],
)
def test_a_memory_made_beside_any_adapter_fits_the_model_alone(config, tmp_path):
    identity = base_identity(base())
    model = base()
    peft.get_peft_model(model, config)
    assert base_identity(model) == identity
    editor = MemoryEditor.create(model, tiny_tokenizer())
    editor.save(tmp_path)
    MemoryEditor.load(base(), tmp_path, tiny_tokenizer())
