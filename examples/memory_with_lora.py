"""LoRA for how a model speaks, a memory for what it knows: each is switched, saved and loaded on its own (needs the extra `lora`)."""

import tempfile

from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Trainer, TrainingArguments

from engram import Fact, MemoryEditor, load_bundled
from engram.data.corpus import held_out_standard_library
from engram.data.packing import pack
from engram.evaluation import ask

FACTS = [Fact(("DOOR:garden", "What is the code of the garden door?"), "4711", id="door")]


def main(steps: int = 10) -> None:
    model, tokenizer = load_bundled()
    adapted = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    blocks = pack(held_out_standard_library(), tokenizer, seq_len=64, blocks=4 * steps, seed=0)
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder,
            max_steps=steps,
            per_device_train_batch_size=4,
            learning_rate=1e-3,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            dataloader_pin_memory=False,
        )
        Trainer(adapted, args, train_dataset=blocks).train()

        # The memory goes to the model inside; facts are taught to model and LoRA as they are now.
        editor = MemoryEditor.create(adapted.get_base_model(), tokenizer)
        editor.teach(FACTS)
        memory, prompt = editor.memory, FACTS[0].prompts[0]
        print("both:", ask(memory, tokenizer, [prompt]))
        with adapted.disable_adapter():
            print("memory alone:", ask(memory, tokenizer, [prompt]))  # usually exact too: facts are taught with a margin
        with memory.disable_engram():
            print("LoRA alone:", ask(memory, tokenizer, [prompt]))

        adapted.save_pretrained(f"{folder}/lora")
        editor.save(f"{folder}/memory")
        again = PeftModel.from_pretrained(load_bundled()[0], f"{folder}/lora")
        loaded = MemoryEditor.load(again.get_base_model(), f"{folder}/memory", tokenizer)
        print("loaded again:", ask(loaded.memory, tokenizer, [prompt]))


if __name__ == "__main__":
    main()
