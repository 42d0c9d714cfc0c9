"""When models learn to copy from their context while they are trained, with and without a memory; and pairs of them of equal loss.

Takes runs of `engram train` that kept their checkpoints (recipes/train_equal_loss_plain.yaml and _joint.yaml, for each seed), and measures
held-out loss and plain copying of each checkpoint. Copying is what recall over long text is built on (benchmarks/long_context.py), and it comes
late and suddenly, so one pretraining of each kind says little. With `--pairs`, the checkpoints of either kind that are of equal held-out loss
are written as runs to go on from, one pair for each seed: the latest such pair, whatever it copies. Held-out loss swings by 0.1 nats from one
checkpoint to the next, so that two single ones may be equal by chance: the losses of a pair must also be equal when smoothed, as the median of
a checkpoint and its two neighbours among those that were measured. The first and the last of a run, which lack one, are in no pair.
"""

import argparse
import dataclasses
import functools
import json
import statistics
import tempfile
from pathlib import Path

from common import add_workers, provenance, result_file, side_by_side, write
from joint_training import held_out_loss
from long_context import EQUAL, RECIPE
from transformers import AutoModelForCausalLM, AutoTokenizer

from engram import EngramModel, TableConfig
from engram.data.corpus import held_out_standard_library
from engram.data.packing import pack
from engram.evaluation import measure_copying
from engram.experiments import prepare_data, read_point, run_point

RECIPES = Path(__file__).parents[1] / "recipes"
LENGTH, HELD_OUT = 512, 64
SMOOTHED = 3  # checkpoints that a loss is smoothed over
KINDS = ("dense", "engram")


def tokenizer_of(run):
    return AutoTokenizer.from_pretrained(run / "data" / "tokenizer")


def opened(run, checkpoint):
    """The model that a checkpoint of `engram train` holds, its memory attached if it has one."""
    backbone = checkpoint / "backbone"
    if not backbone.is_dir():
        return AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    model = AutoModelForCausalLM.from_pretrained(backbone).eval()
    return EngramModel.from_pretrained(model, checkpoint, tokenizer_of(run), TableConfig(dtype="float32")).eval()


def checkpoints(run, first, every):
    """Checkpoints by step from ``first`` on, thinned out."""
    found = {int(folder.name.split("-")[1]): folder for folder in (run / "checkpoints").glob("checkpoint-*")}
    if not found:
        raise SystemExit(f"{run}: holds no checkpoints; expected a run of engram train with keep_checkpoints: true")
    return {step: found[step] for step in sorted(found) if step >= first and step % every == 0}


def recipe_of(run):
    return json.loads((run / "recipe.json").read_text())["recipe"]


@functools.cache
def held_out(run, length, blocks):
    """What ``benchmarks/long_context.py`` measures loss on."""
    return pack(held_out_standard_library(RECIPE), tokenizer_of(run), length, blocks, seed=0)


def measured(task, sizes):
    """One checkpoint as an entry."""
    kind, run, step, folder = task
    recipe, model = recipe_of(run), opened(run, folder)
    return {
        "model": kind,
        "seed": recipe["seed"],
        "step": step,
        "tokens": step * recipe["batch_size"] * recipe["data"]["seq_len"],
        "held_out_loss": held_out_loss(model, held_out(run, sizes["length"], sizes["held_out"])),
        "copying": measure_copying(model),
    }


def smoothed(run):
    """Checkpoints of one run that have a neighbour on either side, with the median loss of the three as ``smoothed_loss``."""
    run = sorted(run, key=lambda entry: entry["step"])
    return [
        {**here, "smoothed_loss": statistics.median(entry["held_out_loss"] for entry in (before, here, after))}
        for before, here, after in zip(run, run[1:], run[2:])
    ]


def are_equal(a, b):
    """Whether two checkpoints are of equal loss, their own and smoothed. Smoothed alone, the two that are written might still differ."""
    return all(abs(a[key] - b[key]) <= EQUAL for key in ("held_out_loss", "smoothed_loss"))


def equal_pairs(entries):
    """For each seed the latest two checkpoints whose losses are equal: of the model with a memory first, then of the one without."""
    pairs = []
    for seed in sorted({entry["seed"] for entry in entries}):
        dense, engram = (smoothed(e for e in entries if e["model"] == kind and e["seed"] == seed) for kind in KINDS)
        equal = [(a, b) for a in dense for b in engram if are_equal(a, b)]
        if not equal:
            print(f"seed {seed}: no two checkpoints are within {EQUAL} nats, by their own loss and smoothed over {SMOOTHED}")
            continue
        pair = max(equal, key=lambda pair: (pair[1]["step"], pair[0]["step"]))
        pairs.append({"seed": seed, **dict(zip(KINDS, pair))})
    return pairs


def write_pairs(pairs, runs, folder):
    """Write each pair as two run folders that `benchmarks/long_context.py` goes on from."""
    for pair in pairs:
        for kind in KINDS:
            run = runs[kind, pair["seed"]]
            model = opened(run, run / "checkpoints" / f"checkpoint-{pair[kind]['step']}")
            out = folder / f"{kind}_{pair['seed']}"
            tokenizer_of(run).save_pretrained(out / "model")
            if isinstance(model, EngramModel):
                model.save_pretrained(out / "memory")
                model = model.unload()
            model.save_pretrained(out / "model")
            print(f"written: {out}")


def tiny_runs(folder, **changes):
    """Two runs of seconds, for `--quick`."""
    path = RECIPES / "train_tiny.yaml"
    recipe = dataclasses.replace(read_point(path), **changes)
    runs = {"dense": folder / "plain", "engram": folder / "joint"}
    for kind, run in runs.items():
        point = recipe if kind == "engram" else dataclasses.replace(recipe, engram=None)
        run_point(point, prepare_data(point.data, path.parent, run / "data"), run)
    return {kind: [run] for kind, run in runs.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two tiny runs: only to see that it runs; needs --out")
    parser.add_argument("--plain", type=Path, nargs="+", help="runs of engram train without a memory, one for each seed")
    parser.add_argument("--joint", type=Path, nargs="+", help="runs with a memory, of the same seeds")
    parser.add_argument("--every", type=int, default=50, help="measure checkpoints at multiples of so many steps")
    parser.add_argument("--first", type=int, default=0, help="leave out checkpoints before this step")
    parser.add_argument("--pairs", type=Path, help="folder to write the pairs of equal loss into")
    add_workers(parser, "checkpoints")
    parser.add_argument("--out")
    args = parser.parse_args()
    out = result_file(parser, args, "copying.json", "quick")
    if not args.quick and not (args.plain and args.joint):
        parser.error("expected --plain and --joint, or --quick")
    with tempfile.TemporaryDirectory() as folder:
        runs = (
            tiny_runs(Path(folder), keep_checkpoints=True, save_steps=8)
            if args.quick
            else dict(zip(KINDS, (args.plain, args.joint)))
        )
        sizes = {"length": 64, "held_out": 2} if args.quick else {"length": LENGTH, "held_out": HELD_OUT}
        every = 8 if args.quick else args.every
        tasks = [
            (kind, run, step, at)
            for kind in KINDS
            for run in runs[kind]
            for step, at in checkpoints(run, args.first, every).items()
        ]
        one = functools.partial(measured, sizes=sizes)
        entries = []
        for entry in side_by_side(one, tasks, args.workers):
            entries.append(entry)
            print(", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in entry.items()), flush=True)
        pairs = equal_pairs(entries)
        write(
            out,
            {
                **provenance(sorted({entry["seed"] for entry in entries})),
                "sizes": {**sizes, "equal": EQUAL, "smoothed": SMOOTHED},
                "entries": entries,
                "pairs": pairs,
            },
        )
        if args.pairs:
            write_pairs(pairs, {(kind, recipe_of(run)["seed"]): run for kind in KINDS for run in runs[kind]}, args.pairs)


if __name__ == "__main__":
    main()
