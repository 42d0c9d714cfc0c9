"""A memory and LoRA in one model: each is switched off, saved and loaded on its own."""

import pytest
import torch

from engram import MemoryEditor
from engram.testing import tiny_model, tiny_tokenizer
from tests.editing.helpers import FACTS

peft = pytest.importorskip("peft")


def base():
    return tiny_model(hidden_size=64, intermediate_size=96)


def with_lora(model):
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    return peft.get_peft_model(model, config).eval()


# peft itself asks for an attribute that transformers is about to rename.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
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
