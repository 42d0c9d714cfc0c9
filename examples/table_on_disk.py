"""A memory whose rows are trained in files, saved, read where they lie, and moved: what one does with a table larger than memory, small."""

import tempfile
from pathlib import Path

from engram import (
    EngramConfig,
    EngramModel,
    EngramTrainer,
    EngramTrainingArguments,
    TableConfig,
    get_engram_model,
    load_bundled,
)
from engram.data.corpus import held_out_standard_library
from engram.data.packing import pack


def main(steps: int = 10, rows_per_head: int = 200_000) -> None:
    model, tokenizer = load_bundled()
    config = EngramConfig(
        engram_vocab_size=rows_per_head, n_embed_per_ngram=32, n_head_per_ngram=2, layer_ids=[2], pad_id=tokenizer.pad_token_id
    )
    blocks = pack(held_out_standard_library(), tokenizer, seq_len=64, blocks=4 * steps, seed=0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # With a path, rows live in files and are trained there; at most so many bytes of them are in memory at a time.
        placement = TableConfig(tier="mmap", dtype="bfloat16", path=str(folder / "rows"), resident_bytes=4 << 20)
        memory = get_engram_model(model, config, tokenizer, placement)
        args = EngramTrainingArguments(
            str(folder / "run"),
            max_steps=steps,
            per_device_train_batch_size=4,
            learning_rate=2e-3,
            table_row_state="rowwise_adagrad",  # one number per row that was ever touched
            table_stochastic_rounding=True,  # small steps count in bfloat16
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            dataloader_pin_memory=False,
        )
        EngramTrainer(memory, args, train_dataset=blocks).train()
        print("row files:", [(file.name, file.stat().st_size) for file in sorted((folder / "rows").glob("*.rows"))])
        memory.save_pretrained(folder / "memory")
        memory.unload()

        inputs = tokenizer("for key, value in", return_tensors="pt")
        logits = {}
        for tier in ("device", "host", "mmap"):  # of a saved memory, mmap maps the file that was saved
            memory = EngramModel.from_pretrained(model, folder / "memory", tokenizer, TableConfig(tier=tier, dtype="bfloat16"))
            logits[tier] = memory(**inputs, use_cache=False).logits
            memory.unload()
        print("same logits in every tier:", all(other.equal(logits["device"]) for other in logits.values()))


if __name__ == "__main__":
    main()
