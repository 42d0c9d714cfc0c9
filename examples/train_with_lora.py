"""LoRA and a memory trained together, saved, and both loaded again (needs the extra `lora`)."""

import tempfile

import torch
from peft import LoraConfig, PeftModel, get_peft_model

from engram import EngramConfig, EngramModel, EngramTrainer, EngramTrainingArguments, get_engram_model, load_bundled
from engram.data.corpus import held_out_standard_library
from engram.data.packing import pack


def main(steps: int = 10) -> None:
    model, tokenizer = load_bundled()
    adapted = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    config = EngramConfig(engram_vocab_size=20_000, n_embed_per_ngram=64, layer_ids=[1], pad_id=tokenizer.pad_token_id)
    memory = get_engram_model(adapted.get_base_model(), config, tokenizer)  # on the model inside, which has the adapters
    memory.print_trainable_parameters()
    with tempfile.TemporaryDirectory() as folder:
        args = EngramTrainingArguments(
            folder,
            max_steps=steps,
            per_device_train_batch_size=4,
            learning_rate=1e-3,
            backbone_lr=5e-4,  # of the adapters; tables have five times the base rate
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            dataloader_pin_memory=False,
        )
        blocks = pack(held_out_standard_library(), tokenizer, seq_len=64, blocks=4 * steps, seed=0)
        trainer = EngramTrainer(memory, args, train_dataset=blocks)
        trainer.train()
        trainer.save_model(f"{folder}/both")  # the memory, and the adapters in both/adapters

        ids = tokenizer("def lookup(self, ids):\n    return self", return_tensors="pt")["input_ids"]
        again = PeftModel.from_pretrained(load_bundled()[0], f"{folder}/both/adapters")
        loaded = EngramModel.from_pretrained(again.get_base_model(), f"{folder}/both", tokenizer)
        with torch.no_grad():
            same = torch.equal(loaded.eval()(input_ids=ids).logits, memory.eval()(input_ids=ids).logits)
        print("loaded again, same logits:", same)


if __name__ == "__main__":
    main()
