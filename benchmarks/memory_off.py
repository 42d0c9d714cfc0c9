"""What a model loses when the memory it was trained with is switched off: facts, or the reading of its context (the paper's section on it).

Training goes on, of all weights, on blocks of three kinds in equal shares: facts that the model does not know (`facts.yaml`, every phrasing as
a line of its own), questions about what was noted earlier in a text (`long_context_mix`; names and numbers are drawn by chance, so that
nothing but reading answers them), and the standard library's part of its training text. Then the same prompts are asked with the memory on and
off: the facts, notes with names and numbers that training never used, and capitals, which the model knew before and which stand in none of
these blocks. Nobody says what goes where: weights alone can learn all of these facts (full fine-tuning in results/baselines.json).

Arms: the bundled model with the memory that it was pretrained with (three sequences in ten without it), which from here on is always read, as
in the paper, or is not by three sequences in ten (`memory_dropout`); and the bundled model with a new, empty memory, always read. Steps and
rate were settled with seed 1000 (`--seeds 1000`), which reports nothing; the rate and the optimiser are those of recipes/train_joint.yaml.
"""

import argparse
import functools
import tempfile
from pathlib import Path

import numpy as np
import torch
from common import add_workers, provenance, result_file, side_by_side, write_so_far
from joint_training import held_out_loss
from long_context import RECIPE
from torch.utils.data import Dataset
from transformers import TrainerCallback, set_seed

from engram import (
    EngramConfig,
    EngramModel,
    EngramTrainer,
    EngramTrainingArguments,
    TableConfig,
    get_engram_model,
    load_bundled,
    load_facts,
)
from engram.data.corpus import build_corpus, held_out_standard_library
from engram.data.facts import encode_fact
from engram.data.long_context import RecallTask
from engram.data.long_context_mix import long_context_mix
from engram.data.packing import PackedDataset, pack
from engram.evaluation import check_facts, measure_recall, score_by_category
from engram.models.bundled_files import BUNDLED_MEMORY

BUNDLED = Path(__file__).parents[1] / "src" / "engram" / "bundled"
RECIPES = Path(__file__).parents[1] / "recipes"
ARMS = {
    "pretrained together": {"start": "bundled", "memory_dropout": 0.0},
    "pretrained together, dropout": {"start": "bundled", "memory_dropout": 0.3},
    "new memory": {"start": "empty", "memory_dropout": 0.0},
}
FULL = {
    "steps": 300,
    "batch": 4,
    "length": 512,
    "rows": 25_000,
    "learning_rate": 2e-3,
    "warmup": 20,
    "measure_every": 50,
    "held_out": 64,
    "facts_every": 1,
    "looks_every": 4,
    "kinds": ("needle", "multi_key", "multi_query"),
    "lengths": (128, 256),
    "examples": 128,
    "looks": 32,
}
QUICK = {
    **FULL,
    "steps": 4,
    "batch": 2,
    "length": 192,
    "rows": 500,
    "warmup": 1,
    "measure_every": 2,
    "held_out": 2,
    "facts_every": 60,
    "looks_every": 2,
    "kinds": ("needle",),
    "lengths": (128,),
    "examples": 4,
    "looks": 2,
}


def fact_blocks(facts, tokenizer, length, blocks, seed):
    """Blocks of prompts with their answers, epoch after epoch in seeded orders; every token is learnt, as in any text."""
    rows = [row.ids for number, fact in enumerate(facts) for row in encode_fact(tokenizer, fact, number)]
    generator, stream = torch.Generator().manual_seed(seed), []
    while len(stream) < blocks * length:
        for place in torch.randperm(len(rows), generator=generator).tolist():
            stream += rows[place]
    return PackedDataset(np.array(stream[: blocks * length]), length)


class Recall(Dataset):
    """The recall blocks of a ``RecallMix`` alone."""

    def __init__(self, mix, blocks):
        self.mix, self.blocks = mix, blocks

    def __len__(self):
        return self.blocks

    def __getitem__(self, index):
        return self.mix.maker.block(index)


class InTurn(Dataset):
    """A block of each data set after one of the other (the trainer shuffles them)."""

    def __init__(self, *parts):
        self.parts = parts

    def __len__(self):
        return min(map(len, self.parts)) * len(self.parts)

    def __getitem__(self, index):
        return self.parts[index % len(self.parts)][index // len(self.parts)]


class Task:
    """What is learnt and asked, with the tokenizer that it is made for."""

    def __init__(self, tokenizer, sizes, quick):
        self.tokenizer, self.sizes = tokenizer, sizes
        self.facts = load_facts(BUNDLED / "facts.yaml")[:: sizes["facts_every"]]
        self.capitals = load_facts(BUNDLED / "capitals.yaml")[:: sizes["facts_every"]]
        held_out = held_out_standard_library(RECIPE)
        self.texts = [document.text for document in held_out]
        self.documents = held_out if quick else build_corpus(RECIPE, RECIPES).train
        self.held_out = pack(held_out, tokenizer, sizes["length"], sizes["held_out"], seed=0)

    @property
    def chance(self):
        """What copying noted numbers at random finds, by question."""
        kinds, lengths = self.sizes["kinds"], self.sizes["lengths"]
        return {f"{kind}, {length} tokens": RecallTask(kind).chance for kind in kinds for length in lengths}

    def blocks(self, seed):
        """Training blocks of one seed."""
        length, blocks = self.sizes["length"], -(-self.sizes["steps"] * self.sizes["batch"] // 3)
        text = pack(self.documents, self.tokenizer, length, blocks, seed)
        documents = [document.text for document in self.documents]
        mix = long_context_mix(text, self.tokenizer, documents, repeats=0.5, seed=seed, kinds=self.sizes["kinds"])
        return InTurn(fact_blocks(self.facts, self.tokenizer, length, blocks, seed), Recall(mix, blocks), text)

    def look(self, model, seed):
        """A part of the questions, while training goes on: shares of facts and of needles."""
        answers = check_facts(model, self.tokenizer, self.facts[:: self.sizes["looks_every"]])
        first = self.sizes["lengths"][:1]
        needle = measure_recall(model, self.tokenizer, self.texts, ("needle",), first, self.sizes["looks"], 1000 + seed)
        return {"facts": sum(answer.exact for answer in answers) / len(answers), "needle": needle.scores[0].share}

    def everything(self, model, seed):
        """All questions: exact answers and how many were asked."""
        facts = score_by_category(self.facts, check_facts(model, self.tokenizer, self.facts))
        capitals = check_facts(model, self.tokenizer, self.capitals)
        kinds, lengths, examples = (self.sizes[name] for name in ("kinds", "lengths", "examples"))
        reading = measure_recall(model, self.tokenizer, self.texts, kinds, lengths, examples, seed).scores
        return {
            "facts": {score.category: [score.exact, score.prompts] for score in facts},
            "reading": {
                f"{score.kind}, {score.length} tokens": [score.exact, score.answers] for score in reading if score.depth is None
            },
            "known before": {"capitals": [sum(answer.exact for answer in capitals), len(capitals)]},
            "held_out_loss": held_out_loss(model, self.held_out),
        }


class Watch(TrainerCallback):
    """Facts and needles with the memory on and off, at intervals."""

    def __init__(self, task, arm, seed):
        self.task, self.arm, self.seed, self.curve = task, arm, seed, []

    def on_step_end(self, args, state, control, model=None, **_):
        if state.global_step % self.task.sizes["measure_every"]:
            return
        model.eval()
        found = on_and_off(model, functools.partial(self.task.look, seed=self.seed))
        model.train()
        self.curve.append({"step": state.global_step, **found})
        print(f"  {self.arm}, seed {self.seed}: {self.curve[-1]}", flush=True)


def on_and_off(memory, ask):
    """What is found with the memory and without it."""
    found = {"on": ask(memory)}
    with memory.disable_engram():
        found["off"] = ask(memory)
    return found


def attached(arm, sizes):
    """The bundled model with its own memory, rows in float32 so that they can be trained, or with an empty one."""
    model, tokenizer = load_bundled()
    if ARMS[arm]["start"] == "bundled":
        return EngramModel.from_pretrained(model, BUNDLED_MEMORY, tokenizer, TableConfig(dtype="float32"))
    config = EngramConfig(
        engram_vocab_size=sizes["rows"],
        n_embed_per_ngram=64,
        n_head_per_ngram=4,
        layer_ids=[1, 3],
        pad_id=tokenizer.pad_token_id,
    )
    return get_engram_model(model, config, tokenizer)


def train(task, arm, seed, watch):
    sizes = task.sizes
    set_seed(seed)
    memory = attached(arm, sizes)
    with tempfile.TemporaryDirectory() as folder:
        arguments = EngramTrainingArguments(
            folder,
            train_backbone=True,
            backbone_optimizer="muon",
            memory_dropout=ARMS[arm]["memory_dropout"],
            max_steps=sizes["steps"],
            per_device_train_batch_size=sizes["batch"],
            learning_rate=sizes["learning_rate"],
            warmup_steps=sizes["warmup"],
            lr_scheduler_type="cosine",
            weight_decay=0.1,
            adam_beta2=0.95,
            use_cpu=not torch.cuda.is_available(),
            save_strategy="no",
            logging_steps=100,
            report_to=[],
            disable_tqdm=True,
            dataloader_pin_memory=False,
            seed=seed,
        )
        EngramTrainer(memory, arguments, train_dataset=task.blocks(seed), callbacks=[watch]).train()
    return memory.eval()


@functools.cache
def the_task(quick, steps):
    _, tokenizer = load_bundled()
    return Task(tokenizer, {**(QUICK if quick else FULL), **({} if quick else {"steps": steps})}, quick)


def run(part, quick, steps, keep):
    """One arm and seed as an entry."""
    arm, seed = part
    task = the_task(quick, steps)
    watch = Watch(task, arm, seed)
    memory = train(task, arm, seed, watch)
    found = on_and_off(memory, functools.partial(task.everything, seed=seed))
    if keep is not None:
        folder = Path(keep) / f"{arm.replace(',', '').replace(' ', '_')}_{seed}"
        memory.save_pretrained(folder / "memory")
        memory.unload().save_pretrained(folder / "model")
        task.tokenizer.save_pretrained(folder / "model")
    print(f"{arm}, seed {seed}: {found}", flush=True)
    return {"seed": seed, "arm": arm, **ARMS[arm], "memory_off": found, "curve": watch.curve}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="tiny sizes: only to see that it runs; needs --out")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=FULL["steps"], help="other than the usual ones need --out")
    parser.add_argument("--keep", help="folder to write the trained models and memories into, for `engram look`")
    add_workers(parser, "arms and seeds")
    parser.add_argument("--out")
    args = parser.parse_args()
    out = result_file(parser, args, "memory_off.json", "quick", "seeds", "steps")
    seeds = args.seeds[:1] if args.quick else args.seeds
    task = the_task(args.quick, args.steps)
    before = task.everything(load_bundled()[0], seeds[0])
    parts = [(arm, seed) for seed in seeds for arm in list(ARMS)[-1 if args.quick else 0 :]]
    entries = []
    one = functools.partial(run, quick=args.quick, steps=args.steps, keep=args.keep)
    for entry in side_by_side(one, parts, args.workers):
        entries.append(entry)
        result = {**provenance(seeds), "sizes": task.sizes, "chance": task.chance, "before": before, "entries": entries}
        write_so_far(out, result, complete=len(entries) == len(parts))


if __name__ == "__main__":
    main()
