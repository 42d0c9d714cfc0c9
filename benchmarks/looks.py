"""Looks inside several trainings with a memory and without, seed by seed: one model of each kind (`engram look`) may be chance.

Takes runs of `engram train` of equal budget and text, one of either kind for each seed:

    for seed in 3 4 5 6 7 8; do
      engram train recipes/train_looks.yaml --seed $seed --out runs/looks/memory_$seed
      engram train recipes/train_looks_experts.yaml --seed $seed --out runs/looks/experts_$seed
    done
    python benchmarks/looks.py --joint runs/looks/memory_* --plain runs/looks/experts_*

On the text that the runs held out: (a) the logit lens after every block; (b) similarity of layers (CKA) with the soft alignment index: both
models of one seed, each beside the next seed's model without a memory. An index alone is pulled to the middle and says nothing,
and models of one seed begin with the same weights here and there; (c) gates where phrases end. Phrases are those that stand together in the
text that a run itself was trained on (`find_phrases`); nobody picks them.
"""

import argparse
import json
import tempfile
from itertools import groupby
from pathlib import Path

from common import provenance, result_file, write
from copying import tiny_runs
from transformers import AutoModelForCausalLM

from engram import EngramModel, TableConfig
from engram.analysis import Subject, cka, logit_lens, phrase_gates, sample_texts
from engram.data.phrases import find_phrases
from engram.data.texts import held_out_texts
from engram.experiments import PointRecipe
from engram.experiments.data import load_data
from engram.experiments.recipe import build_fields

FULL = {"tokens": 60_000, "length": 128, "count": 20, "documents": 10, "bits": 6.0}
QUICK = {"tokens": 2_000, "length": 64, "count": 4, "documents": 2, "bits": 1.0}


def recipe_of(run):
    return build_fields(PointRecipe, json.loads((run / "recipe.json").read_text())["recipe"], str(run / "recipe.json"))


def opened(run):
    """The model of a run, with its memory if it has one."""
    model = AutoModelForCausalLM.from_pretrained(run / "model").eval()
    if not (run / "memory").is_dir():
        return Subject(run.name, model)
    tokenizer = data_of(run).tokenizer
    return Subject(run.name, EngramModel.from_pretrained(model, run / "memory", tokenizer, TableConfig(dtype="float32")).eval())


def data_of(run):
    return load_data(recipe_of(run).data, run / "data")


def phrases_of(run, sizes):
    """Phrases of the very tokens that a run was trained on."""
    recipe, data = recipe_of(run), data_of(run)
    blocks, begin = data.train(recipe.steps * recipe.batch_size, recipe.seed), data.store.begin_id
    stream = (
        token for number in range(len(blocks)) for token in blocks[number]["input_ids"].tolist()
    )  # blocks are cut from it
    texts = dict.fromkeys(
        data.tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)
        for is_begin, ids in groupby(stream, key=lambda token: token == begin)
        if not is_begin
    )  # a document that was read several times is one
    return find_phrases(texts, sizes["count"], sizes["documents"], sizes["bits"])


def look(joint, plain, other, sizes):
    """One seed as an entry; ``other`` is the run without a memory of the next seed, which both are compared with; None if there is none."""
    data = data_of(joint)
    texts = held_out_texts(data.store, sizes["tokens"], sizes["length"])
    sample = sample_texts(data.tokenizer, texts, sizes["tokens"], sizes["length"])
    memory, without = opened(joint), opened(plain)
    off = Subject("memory off", memory.model, memory_on=False)
    lens = logit_lens({"memory": memory, "off": off, "without": without}, sample)
    if other is None:
        alike = {"memory": cka(memory, without, sample)}
    else:
        beside = opened(other)
        alike = {"memory": cka(memory, beside, sample), "without": cka(without, beside, sample)}
    phrases = phrases_of(joint, sizes)
    gates = phrase_gates(memory.model, sample, data.tokenizer, phrases)
    gates["phrases"] = dict(list(gates["phrases"].items())[:40])  # the most frequent; all of them are a long list
    del gates["not_found"]
    gates["examples"] = gates["examples"][:12]
    return {
        "seed": recipe_of(joint).seed,
        "text": sample.to_dict(),
        "looks_by_seed": {
            "layer_ids": list(memory.model.engram_config.layer_ids),
            "logit_lens": {name: [point["mean"] for point in curve] for name, curve in lens["subjects"].items()},
            "cka": {name: {key: found[key] for key in ("map", "top", "soft_alignment")} for name, found in alike.items()},
            "phrases": {"wanted": len(phrases), **gates},
        },
    }


def budget_of(run):
    recipe = recipe_of(run)
    budget = recipe.budget and (recipe.budget.total, recipe.budget.active)
    return budget, recipe.tokens, recipe.batch_size, recipe.learning_rate


def runs_told(*runs):
    """What the runs of either kind were, and what came out of the first."""
    told = {}
    for kind, run in zip(("memory", "without"), runs):
        result = json.loads((run / "result.json").read_text())
        told[kind] = {key: result[key] for key in ("recipe", "counts", "held_out") if key in result}
    return told


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two tiny runs: only to see that it runs; needs --out")
    parser.add_argument("--joint", type=Path, nargs="+", help="runs with a memory, one for each seed")
    parser.add_argument("--plain", type=Path, nargs="+", help="runs without one, of the same seeds and text")
    parser.add_argument("--out")
    args = parser.parse_args()
    out = result_file(parser, args, "looks.json", "quick")
    if not args.quick and not (args.joint and args.plain):
        parser.error("expected --joint and --plain, or --quick")
    sizes = QUICK if args.quick else FULL
    with tempfile.TemporaryDirectory() as folder:
        if args.quick:
            runs = tiny_runs(Path(folder), keep_model=True)
            joint, plain = runs["engram"], runs["dense"]
        else:
            joint, plain = (sorted(some, key=lambda run: recipe_of(run).seed) for some in (args.joint, args.plain))
        seeds = [recipe_of(run).seed for run in joint]
        if seeds != [recipe_of(run).seed for run in plain]:
            parser.error(f"--joint: runs of seeds {seeds}; expected --plain of the same")
        fingerprints = {data_of(run).store.fingerprint for run in (*joint, *plain)}
        if len(fingerprints) > 1:
            parser.error("the runs were trained on different text; expected one text")
        if not args.quick and len({budget_of(run) for run in (*joint, *plain)}) > 1:
            parser.error("the runs differ in budget, tokens or batch; expected runs that are equal in these")
        entries = []
        for number, pair in enumerate(zip(joint, plain)):
            other = plain[(number + 1) % len(plain)] if len(plain) > 1 else None
            entries.append(look(*pair, other, sizes))
            print(json.dumps(entries[-1]["looks_by_seed"]["phrases"]["layers"]), flush=True)
        told = {"sizes": sizes, "data": {"fingerprint": fingerprints.pop()}, "runs": runs_told(joint[0], plain[0])}
    write(out, {**provenance(seeds), **told, "entries": entries})


if __name__ == "__main__":
    main()
