"""Train a memory on a model that stays frozen in a plain PyTorch loop: no trainer, and nothing of the library that is not needed."""

import tempfile

import torch

from engram import EngramAdamW, EngramConfig, EngramModel, get_engram_model, load_bundled
from engram.data.corpus import held_out_standard_library
from engram.data.packing import pack
from engram.optim import build_param_groups, clip_grad_norm_

BATCH = 8


def make_optimizer(memory: EngramModel) -> EngramAdamW:
    return EngramAdamW(build_param_groups(memory, memory, lr=1e-3))  # tables at five times that


def train(memory: EngramModel, optimizer: EngramAdamW, batches) -> list[float]:
    memory.train()
    losses = []
    for batch in batches:
        loss = memory(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        clip_grad_norm_(memory.parameters(), 1.0)  # torch's own refuses the row-sparse gradients of tables
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def main(steps: int = 12) -> None:
    model, tokenizer = load_bundled()
    config = EngramConfig(
        engram_vocab_size=5_000, n_embed_per_ngram=64, layer_ids=[1], pad_id=tokenizer.pad_token_id, table_init="normal"
    )
    torch.manual_seed(0)
    memory = get_engram_model(model, config, tokenizer)
    blocks = pack(held_out_standard_library(), tokenizer, seq_len=64, blocks=BATCH, seed=0)
    batches = [torch.stack([block["input_ids"] for block in blocks])] * steps  # one batch again and again: see the loss fall
    optimizer = make_optimizer(memory)
    with tempfile.TemporaryDirectory() as folder:
        losses = train(memory, optimizer, batches[: steps // 2])
        memory.save_pretrained(f"{folder}/memory")
        torch.save(optimizer.state_dict(), f"{folder}/optimizer.pt")
        onwards = train(memory, optimizer, batches[steps // 2 :])
        print(f"loss {losses[0]:.3f}, in the end {onwards[-1]:.3f}, lower: {onwards[-1] < losses[0]}")

        memory.unload()
        memory = EngramModel.from_pretrained(model, f"{folder}/memory", tokenizer)
        optimizer = make_optimizer(memory)
        optimizer.load_state_dict(torch.load(f"{folder}/optimizer.pt"))
        print("the same losses from what was saved:", train(memory, optimizer, batches[steps // 2 :]) == onwards)


if __name__ == "__main__":
    main()
