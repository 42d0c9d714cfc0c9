"""Train a small new model together with a memory: tables at five times the learning rate, row-sparse Adam."""

import tempfile

from transformers import AutoConfig, AutoModelForCausalLM

from engram import EngramConfig, EngramTrainer, EngramTrainingArguments, get_engram_model, load_bundled
from engram.data.corpus import held_out_standard_library
from engram.data.packing import pack


def main(steps: int = 30) -> None:
    _, tokenizer = load_bundled()
    base = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(
            "llama",
            vocab_size=len(tokenizer),
            hidden_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=4,
            intermediate_size=128,
        )
    )
    config = EngramConfig(
        engram_vocab_size=5_000, n_embed_per_ngram=64, layer_ids=[1], pad_id=tokenizer.pad_token_id, table_init="normal"
    )
    memory = get_engram_model(base, config, tokenizer)
    blocks = pack(held_out_standard_library(), tokenizer, seq_len=64, blocks=8 * steps, seed=0)
    with tempfile.TemporaryDirectory() as folder:
        args = EngramTrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=8,
            learning_rate=3e-3,
            train_backbone=True,
            logging_steps=10,
            save_strategy="no",
            report_to=[],
            dataloader_pin_memory=False,
        )
        trainer = EngramTrainer(memory, args, train_dataset=blocks)
        trainer.train()
    memory.print_trainable_parameters()


if __name__ == "__main__":
    main()
