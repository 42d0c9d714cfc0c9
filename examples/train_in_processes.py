"""Train a memory by several processes, each with a part of every table:

torchrun --nproc-per-node 2 examples/train_in_processes.py

Alone (python examples/train_in_processes.py) one process has whole tables and the whole batch, and the losses are the same.
"""

import tempfile

import torch

from engram import EngramConfig, EngramTrainer, EngramTrainingArguments, TableConfig, get_engram_model, load_bundled
from engram.data.corpus import held_out_standard_library
from engram.data.packing import pack

BATCH = 8


def main(steps: int = 6) -> None:
    with tempfile.TemporaryDirectory() as folder:
        # The arguments come first: making them finds the other processes.
        args = EngramTrainingArguments(
            folder,
            max_steps=steps,
            learning_rate=1e-3,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=not torch.cuda.is_available(),
        )
        args.per_device_train_batch_size = BATCH // args.world_size
        model, tokenizer = load_bundled()
        config = EngramConfig(engram_vocab_size=20_000, n_embed_per_ngram=64, layer_ids=[1], pad_id=tokenizer.pad_token_id)
        torch.manual_seed(0)
        memory = get_engram_model(model, config, tokenizer, TableConfig(sharded=True))
        blocks = pack(held_out_standard_library(), tokenizer, seq_len=64, blocks=steps * BATCH, seed=0)
        trainer = EngramTrainer(memory, args, train_dataset=blocks)
        trainer.train()
        trainer.save_model(f"{folder}/memory")  # by all processes: the first writes, the others send their rows
        if trainer.is_world_process_zero():
            losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
            table = memory.engrams["1"].table
            print(f"{table.rows:,} rows, {table.nbytes:,} bytes of them in each of {args.world_size} processes")
            print("losses:", " ".join(f"{loss:.3f}" for loss in losses))


if __name__ == "__main__":
    main()
