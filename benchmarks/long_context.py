"""Recall over long text of the bundled model trained on with and without a memory: same data, several seeds, at equal steps and loss.

Models of this size that start from nothing learn no recall in an hour (`--scratch`; docs/lab_notes.md), so both arms go on from weights
that know the language and how to look back a little. A memory that starts empty beside such a model gains nothing in these few steps: give
two runs of `engram train`, one with a memory and one without, on equal tokens (`--plain`, `--joint`; recipes/train_joint.yaml). Their loss on
ordinary text rises while they learn recall, from where it was to begin with, so a step of equal loss says nothing there and is left out. For
equal loss they must begin with it, as in the paper, where the model without a memory was trained for longer (`--equal-loss`). The bundled
model had no more to learn from the text there is (docs/lab_notes.md); benchmarks/copying.py makes smaller pairs, of the runs of
recipes/train_equal_loss_plain.yaml and _joint.yaml. Whether a model can copy when recall training begins is measured too, for it decides the
rest. Give several pairs, and each seed goes on from another: only then do seeds tell what pretraining with a memory does.
"""

import argparse
import functools
import tempfile
from dataclasses import asdict

import torch
from common import RESULTS, add_workers, provenance, result_file, side_by_side, spread, write_so_far
from joint_training import held_out_loss
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments, set_seed

from engram import EngramConfig, EngramModel, EngramTrainer, EngramTrainingArguments, TableConfig, get_engram_model
from engram.data.corpus import CorpusRecipe, build_corpus, held_out_standard_library
from engram.data.long_context_mix import long_context_mix
from engram.data.packing import pack
from engram.evaluation import ShareResult, measure_copying, measure_recall, recall_table
from engram.models.bundled import load_model, load_tokenizer
from engram.models.bundled_files import BUNDLED_MEMORY, BUNDLED_NAME
from engram.training.tokenizer import train_tokenizer

RECIPE = CorpusRecipe(standard_library=True, test_percent=0)
EQUAL = 0.01  # nats per token
QUOTED_SEEDS = 3  # in results/long_context.json, of one pair of runs
TOKENIZER_SHARE = 4  # every fourth document is enough for a small vocabulary
SCRATCH = {"vocab": 2048, "hidden": 64, "layers": 3, "heads": 2}
FULL = {
    "steps": 200,
    "batch": 4,
    "length": 512,
    "share": 0.5,
    "repeats": 0.5,
    "rows": 25_000,
    "learning_rate": 5e-4,
    "warmup": 20,
    "measure_every": 40,
    "held_out": 64,
    "kinds": ("needle", "multi_key", "multi_query", "multi_value", "tracking"),
    "examples": 64,
    "looks": 16,
    "bf16": True,
}
QUICK = {
    **FULL,
    "steps": 4,
    "batch": 2,
    "length": 192,
    "rows": 500,
    "warmup": 1,
    "measure_every": 2,
    "held_out": 4,
    "kinds": ("needle", "tracking"),
    "examples": 4,
    "looks": 2,
    "bf16": False,
}
NAMES = {
    "dense": "without memory",
    "engram_equal_loss": "with memory, equal loss",
    "engram_equal_steps": "with memory, equal steps",
    "engram_equal_start": "with memory, equal loss at the start",
}


def model_of(run):
    """Where the model of a run lies; the bundled one is its own."""
    return BUNDLED_NAME if run in (None, BUNDLED_NAME) else f"{run}/model"


def shared_tokenizer(runs):
    """The tokenizer of all these runs: text is tokenized and questions are made once, for all of them."""
    tokenizer = load_tokenizer(model_of(runs[0]))
    for run in runs[1:]:
        if load_tokenizer(model_of(run)).get_vocab() != tokenizer.get_vocab():
            raise SystemExit(f"{run}: has another tokenizer than {runs[0]}; expected runs that share one")
    return tokenizer


def build(tokenizer, sizes, run):
    """The model to go on from: that of a run, the bundled one, or a fresh one."""
    if run or "hidden" not in sizes:
        return load_model(model_of(run))[0]
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=sizes["hidden"],
            num_hidden_layers=sizes["layers"],
            intermediate_size=8 * sizes["hidden"] // 3,
            num_attention_heads=sizes["heads"],
            num_key_value_heads=sizes["heads"],
            max_position_embeddings=sizes["length"],
            tie_word_embeddings=True,
        )
    )


class Watch(TrainerCallback):
    """Held-out loss and recall of a needle at intervals and, where a loss is aimed at, the weights that reach it first (else the last). A
    model that shall begin with some loss (``begins``) and does not is not trained."""

    def __init__(self, blocks, every, ask, target=None, begins=None):
        self.blocks, self.every, self.ask, self.target, self.begins = blocks, every, ask, target, begins
        self.before, self.copying, self.curve, self.reached, self.weights = None, None, [], None, None

    def on_train_begin(self, args, state, control, model=None, **_):
        self.before, self.copying = held_out_loss(model, self.blocks), measure_copying(model)
        model.train()
        if self.begins is not None and abs(self.before - self.begins) > EQUAL:
            raise SystemExit(
                f"--equal-loss: the models begin with {self.begins:.4f} and {self.before:.4f}, more than {EQUAL} apart"
            )

    def on_step_end(self, args, state, control, model=None, **_):
        if state.global_step % self.every and state.global_step < state.max_steps:
            return
        loss, needle = held_out_loss(model, self.blocks), self.ask(model).scores[0]
        model.train()
        self.curve.append({"step": state.global_step, "loss": loss, "needle": needle.share, "log_p": needle.log_probability})
        print("  " + ", ".join(f"{name} {value:.4g}" for name, value in self.curve[-1].items()), flush=True)
        if self.target is not None and (self.reached is None or self.reached["loss"] > self.target):
            self.reached = self.curve[-1]
            self.weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}


def arguments(folder, sizes, seed):
    return {
        "output_dir": folder,
        "max_steps": sizes["steps"],
        "per_device_train_batch_size": sizes["batch"],
        "learning_rate": sizes["learning_rate"],
        "warmup_steps": sizes["warmup"],
        # Constant, so that a checkpoint on the way stands where a shorter run would have ended: the one of equal loss is not at a
        # disadvantage for a learning rate that has not come down yet.
        "lr_scheduler_type": "constant_with_warmup",
        "weight_decay": 0.1,
        "adam_beta2": 0.95,
        "bf16": sizes["bf16"],
        "use_cpu": not torch.cuda.is_available(),
        "save_strategy": "no",
        "logging_steps": 100,
        "report_to": [],
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "seed": seed,
    }


def attached(model, tokenizer, sizes):
    """The memory that was trained with the model, or an empty one."""
    if sizes["joint"]:
        folder = BUNDLED_MEMORY if sizes["joint"] == BUNDLED_NAME else f"{sizes['joint']}/memory"
        return EngramModel.from_pretrained(model, folder, tokenizer, TableConfig(dtype="float32"))  # int8 rows are not trained
    config = EngramConfig(
        engram_vocab_size=sizes["rows"],
        n_embed_per_ngram=64,
        n_head_per_ngram=4,
        layer_ids=[1, 3] if model.config.num_hidden_layers > 3 else [1, 2],
        pad_id=tokenizer.pad_token_id,
    )
    return get_engram_model(model, config, tokenizer)


def paired(sizes, seed):
    """The sizes with the runs that one seed goes on from: its own pair of several, or the only one."""
    several = isinstance(sizes["plain"], (list, tuple))
    return {**sizes, **{arm: sizes[arm][seed] for arm in ("plain", "joint")}} if several else sizes


def trained(memory, seed, tokenizer, train, sizes, watch):
    set_seed(seed)
    model = build(tokenizer, sizes, sizes["joint" if memory else "plain"])
    with tempfile.TemporaryDirectory() as folder:
        options = arguments(folder, sizes, seed)
        if memory:
            model = attached(model, tokenizer, sizes)
            arguments_ = EngramTrainingArguments(train_backbone=True, **options)
            EngramTrainer(model, arguments_, train_dataset=train, callbacks=[watch]).train()
        else:
            Trainer(model, TrainingArguments(**options), train_dataset=train, callbacks=[watch]).train()
    return model.eval()


def run(seed, tokenizer, documents, held_out, texts, sizes):
    """The models of one seed, as entries: three, or two that go on from runs."""
    sizes = paired(sizes, seed)
    total = round(sizes["steps"] * sizes["batch"] * (1 - sizes["share"])) + sizes["batch"]
    blocks = pack(documents, tokenizer, sizes["length"], total, seed)
    train = long_context_mix(
        blocks,
        tokenizer,
        [doc.text for doc in documents],
        share=sizes["share"],
        repeats=sizes["repeats"],
        seed=seed,
        kinds=sizes["kinds"],
    )
    ask = functools.partial(measure_recall, tokenizer=tokenizer, texts=texts)

    def look(model):
        return ask(model, kinds=("needle",), lengths=sizes["lengths"][:1], examples=sizes["looks"], seed=1000 + seed)

    def everything(model):
        return ask(model, kinds=sizes["kinds"], lengths=sizes["lengths"], examples=sizes["examples"], seed=seed)

    def entry(name, model, step, loss):
        print(
            f"seed {seed}, {NAMES[name]}: held-out loss {loss:.4f} at step {step}, {watch.before:.4f} at the start", flush=True
        )
        return {
            "seed": seed,
            "model": name,
            "step": step,
            "held_out_loss_before": watch.before,
            "copying_before": watch.copying,
            "held_out_loss": loss,
            "scores": everything(model).to_dict()["scores"],
        }

    watch = Watch(held_out, sizes["measure_every"], look)
    dense = trained(False, seed, tokenizer, train, sizes, watch)
    target = watch.curve[-1]["loss"]
    entries = [{**entry("dense", dense, sizes["steps"], target), "curve": watch.curve}]
    begins = watch.before if sizes["equal_loss"] else None
    watch = Watch(held_out, sizes["measure_every"], look, None if sizes["joint"] else target, begins)
    memory = trained(True, seed, tokenizer, train, sizes, watch)
    name = "engram_equal_start" if sizes["equal_loss"] else "engram_equal_steps"
    entries.append({**entry(name, memory, sizes["steps"], watch.curve[-1]["loss"]), "curve": watch.curve})
    if watch.reached is not None:
        memory.load_state_dict(watch.weights)
        entries.append(entry("engram_equal_loss", memory, watch.reached["step"], watch.reached["loss"]))
    return entries


def pooled(entries):
    """The seeds' answers together, by model, kind and length; the log-probability keeps its spread over seeds. Beside them what copying noted
    numbers at random finds, and how many wrong answers are another noted number (None where that cannot be told)."""
    groups = {}
    for entry in entries:
        for score in entry["scores"]:
            if score["depth"] is None:
                groups.setdefault((entry["model"], score["kind"], score["length"]), []).append(score)
    return [
        {
            "model": model,
            "kind": kind,
            "length": length,
            **asdict(ShareResult.of(sum(s["exact"] for s in scores), sum(s["answers"] for s in scores))),
            "log_probability": spread([s["log_probability"] for s in scores]),
            "chance": scores[0]["chance"],
            "other_value": None if scores[0]["other_value"] is None else sum(s["other_value"] for s in scores),
        }
        for (model, kind, length), scores in groups.items()
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="tiny sizes: only to see that it runs; needs --out")
    parser.add_argument("--seeds", type=int, help="seeds 0 to one below this; as many as there are pairs, or 2")
    add_workers(parser, "seeds")
    parser.add_argument("--steps", type=int, default=FULL["steps"])
    parser.add_argument("--out", help=f"not needed with one pair of runs, {QUOTED_SEEDS} seeds and the usual settings")
    parser.add_argument("--scratch", action="store_true", help="models and a tokenizer that start from nothing")
    parser.add_argument(
        "--plain",
        nargs="+",
        help="run folder of `engram train` to go on from without a memory (the bundled model if not given); or one for each seed",
    )
    parser.add_argument(
        "--joint", nargs="+", help="the same with a memory, of equal tokens and text (the bundled model and an empty memory)"
    )
    parser.add_argument(
        "--equal-loss", action="store_true", help="those two begin with equal loss (of the one without, by more tokens)"
    )
    parser.add_argument("--float32", action="store_true", help="train in float32, on CPUs that emulate bfloat16")
    parser.add_argument("--learning-rate", type=float, default=FULL["learning_rate"])
    parser.add_argument(
        "--length", type=int, default=FULL["length"], help="tokens per training block, and of the longest questions"
    )
    parser.add_argument("--share", type=float, default=FULL["share"], help="share of recall blocks in training")
    args = parser.parse_args()
    chosen = {name: getattr(args, name) for name in ("steps", "length", "share", "learning_rate")}
    sizes = QUICK if args.quick else {**FULL, **chosen, "batch": max(1, FULL["batch"] * FULL["length"] // args.length)}
    if (args.plain is None) != (args.joint is None) or (args.plain and args.scratch):
        parser.error("expected --plain and --joint together, and without --scratch")
    if args.equal_loss and args.plain is None:
        parser.error("--equal-loss: expected --plain and --joint")
    pairs = len(args.plain or [None])
    if pairs != len(args.joint or [None]) or (pairs > 1 and args.seeds not in (None, pairs)):
        parser.error("expected as many --joint as --plain, and as many --seeds if there are several")
    out = result_file(parser, args, "long_context.json", "quick", "scratch", "equal_loss", "float32", *chosen)
    if args.out is None and (args.plain is None or pairs > 1 or args.seeds != QUOTED_SEEDS):
        parser.error(f"expected --out FILE: {out.name} holds one pair of runs (--plain, --joint) with --seeds {QUOTED_SEEDS}")
    sizes = {
        **sizes,
        **{arm: runs if pairs > 1 else runs and runs[0] for arm, runs in (("plain", args.plain), ("joint", args.joint))},
        "equal_loss": args.equal_loss,
        **(SCRATCH if args.scratch else {}),
    }
    sizes["bf16"] &= not args.float32
    sizes = {**sizes, "lengths": sorted({max(96, sizes["length"] // parts) for parts in (4, 2, 1)})}
    seeds = [0] if args.quick else list(range(args.seeds or (pairs if pairs > 1 else 2)))
    held_out_documents = held_out_standard_library(RECIPE)
    documents = held_out_documents if args.quick else build_corpus(RECIPE, RESULTS).train
    texts = [doc.text for doc in held_out_documents]
    if args.scratch:
        tokenizer = train_tokenizer((doc.text for doc in documents[::TOKENIZER_SHARE]), sizes["vocab"], 1 << 16)
    else:
        tokenizer = shared_tokenizer([*(args.joint or [None]), *(args.plain or [])])
    held_out = pack(held_out_documents, tokenizer, sizes["length"], sizes["held_out"], seed=0)
    entries = []
    one = functools.partial(run, tokenizer=tokenizer, documents=documents, held_out=held_out, texts=texts, sizes=sizes)
    for done, found in enumerate(side_by_side(one, seeds, args.workers), start=1):
        print(recall_table({NAMES[e["model"]]: e for e in sorted(found, key=lambda e: list(NAMES).index(e["model"]))}))
        entries += found
        result = {**provenance(seeds[:done]), "sizes": sizes, "pooled": pooled(entries), "entries": entries}
        write_so_far(out, result, complete=done == len(seeds))


if __name__ == "__main__":
    main()
