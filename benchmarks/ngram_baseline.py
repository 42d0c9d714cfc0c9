"""What counting n-grams of the training tokens is worth beside the models of recipes/sweep_allocation.yaml, alone and mixed with them.

A memory of hashed n-grams may win because it learns sooner what a table of counts says. So (a) an interpolated Kneser-Ney model is counted from
exactly the blocks that a run of each budget and seed reads: every predicted token as often as it is read (once, that is: every run sees less
than an epoch), contexts within block and document. It is measured as the sweep measures: the same held-out blocks, contexts within them, begin
tokens not predicted; numbers of tokens and bytes are checked against those of the sweep's result. And (b) trained models are mixed with the
counts of their own tokens, by one weight chosen on the validation half: is a model with a memory better than one without it *and* counts?

(a), a minute; the store is the folder `data` of a run of the sweep, or of `engram corpus recipes/corpus_python.yaml --vocab-size 2048`:

    python benchmarks/ngram_baseline.py --store runs/allocation/data

(b) wants models, which sweeps do not keep. `--train` runs the points that it needs again (recipes, learning rates and seeds of the results, so
the same runs; in float32 with `--float32`), keeps them, and goes on as with `--models`; what is finished is not run again, and what was
interrupted goes on:

    OMP_NUM_THREADS=1 python benchmarks/ngram_baseline.py --store runs/allocation/data --train runs/ngram --workers 2

`--models FOLDER` takes any runs FOLDER/*/ of `engram train`, or of sweeps with `--set keep_model=true`, on the text of the store.
"""

import argparse
import dataclasses
import functools
import json
import math
import re
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from common import RESULTS, add_workers, entries_of, provenance, result_file, side_by_side, write

from engram import EngramModel, TableConfig
from engram.evaluation import NgramCounts, mixture_weight
from engram.experiments import PointRecipe, prepare_data, read_sweep, run_point
from engram.experiments.data import load_data
from engram.experiments.recipe import build_fields
from engram.experiments.statistics import mean_interval
from engram.experiments.sweep_recipe import Choice, Point
from engram.models import load_model
from engram.models.mode import evaluation_mode

RECIPES = Path(__file__).parents[1] / "recipes"
ORDERS = (1, 2, 3, 4, 5)
MIXED = (3, 5)  # the longest n-gram that the sweep's memories look up, and one that they cannot
SWEEPS = ("sweep_allocation", "sweep_dense")
ARMS = ("experts", "memory", "dense", "dense_memory")
BATCH = 32  # as engram.experiments.held_out has it, so that losses come out alike
SAME = 1e-3  # nats: what a loss may differ from the one noted when the model was trained
QUICK = "sweep_tiny"


@dataclasses.dataclass
class Half:
    """One half of the held-out text: B blocks of T tokens, all but the first of each to predict."""

    blocks: object

    def __post_init__(self):
        numbers = range(len(self.blocks))
        self.ids = np.stack([self.blocks[n]["input_ids"].numpy() for n in numbers])  # [B, T]
        self.predicted = np.stack([self.blocks.kinds(n).numpy() for n in numbers])[:, 1:] >= 0  # [B, T - 1]
        self.bytes = sum(self.blocks.bytes_by_kind.values())

    def score(self, nats):
        """As ``engram.experiments.held_out.measure`` tells it; ``nats`` of the tokens 1, 2, ... of each block, ``[B, T - 1]``."""
        sums = self.blocks.sum_by_kind([torch.from_numpy(row) for row in nats], range(len(nats)))
        total, tokens = (sum(pair[n] for pair in sums.values()) for n in (0, 1))
        return {
            "loss": total / tokens,
            "tokens": tokens,
            "bytes": self.bytes,
            "by_kind": {kind: {"loss": loss / count, "tokens": count} for kind, (loss, count) in sums.items()},
            "bits_per_byte": total / math.log(2) / self.bytes,
        }

    def by_counts(self, counts):
        return -counts.log_probabilities(self.ids)[:, 1:]

    @torch.no_grad()
    def by_model(self, model, bf16):
        """In the precision that it was trained and measured in."""
        found = []
        with evaluation_mode(model), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            for ids in torch.from_numpy(self.ids).split(BATCH):
                logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
                found.append(torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none"))
        return torch.cat(found).double().numpy()


def halves(data):
    return {half: Half(blocks) for half, blocks in data.held_out.items()}


def counted(store, recipe, order):
    """The counts of what a run reads."""
    # Runs whose data, tokens and seed are alike read alike, whatever they train.
    reads = PointRecipe(data=recipe.data, tokens=recipe.tokens, batch_size=recipe.batch_size, seed=recipe.seed)
    return _counted(store, reads, order)


@functools.cache
def _counted(store, reads, order):
    data = load_data(reads.data, store)
    blocks = data.train(reads.steps * reads.batch_size, reads.seed)
    streams = (blocks[n]["input_ids"] for n in range(len(blocks)))
    return NgramCounts(streams, data.store.vocab_size, order, data.store.begin_id)


def mixed(first, second, weight):
    """Nats of tokens under ``weight`` of the first model and the rest of the second."""
    with np.errstate(divide="ignore"):  # a weight of nothing
        return -np.logaddexp(np.log(weight) - first, np.log1p(-weight) - second)


# (a) counts alone


def count_points(store, sweep, orders):
    """One entry for each budget, seed and order."""
    for budget, recipe in runs_of(sweep):
        data = load_data(recipe.data, store)
        parts = halves(data)
        for order in orders:
            begun = time.perf_counter()
            counts = counted(store, recipe, order)
            entry = {
                "budget": budget,
                "seed": recipe.seed,
                "order": order,
                "tokens": recipe.steps * recipe.batch_tokens,
                "predicted": counts.tokens,
                "epochs": round(data.train(recipe.steps * recipe.batch_size, recipe.seed).epochs, 3),
                "ngrams": counts.ngrams,
                **{half: part.score(part.by_counts(counts)) for half, part in parts.items()},
            }
            yield {**entry, "seconds": round(time.perf_counter() - begun, 2)}


def runs_of(sweep):
    """Budgets of a sweep with a run for each seed; whichever arm, they read the same."""
    budgets = {labels.get("budget", "all"): labels for labels in sweep.combinations()}
    return [(budget, sweep.recipe_of(labels, seed)) for budget, labels in budgets.items() for seed in sweep.seeds]


def check_against(result, points, fingerprint):
    """That counts were given, and are measured on, what the sweep's models were."""
    if result["data"]["fingerprint"] != fingerprint:
        raise SystemExit(
            "the store holds other text than that of the sweep's result; expected the folder 'data' of a run of it"
        )
    for point in points:
        for entry in result["points"]:
            if (entry["labels"]["budget"], entry["seed"]) == (point["budget"], point["seed"]):
                ours = [point["tokens"], *(point[half][key] for half in ("validation", "test") for key in ("tokens", "bytes"))]
                theirs = [entry["tokens"], *(size for half in ("validation", "test") for size in sizes(entry[half]))]
                if ours != theirs:
                    raise SystemExit(
                        f"{point['budget']}, seed {point['seed']}: {ours} tokens and bytes, the sweep has {theirs}"
                    )


def sizes(measured):
    """Tokens and bytes that a loss was measured on."""
    return measured["tokens"], round(measured["loss"] * measured["tokens"] / math.log(2) / measured["bits_per_byte"])


def summary(points, result):
    """By budget and order: means over seeds, and differences to the sweep's experts alone and its best arm with a memory, seed by seed."""
    found = []
    for budget, order in dict.fromkeys((point["budget"], point["order"]) for point in points):
        group = [point for point in points if (point["budget"], point["order"]) == (budget, order)]
        entry = {"budget": budget, "order": order, "seeds": [point["seed"] for point in group]}
        for half in ("validation", "test"):
            entry[half] = {key: mean_interval([point[half][key] for point in group]) for key in ("loss", "bits_per_byte")}
        if result is not None:
            best = result["summary"][budget]["best"]["label"]
            arms = {"experts alone": "1.00", "best with a memory": best}
            entry["less"] = {name: {"rho": rho, **less(group, result, budget, rho)} for name, rho in arms.items()}
        found.append(entry)
    return found


def less(group, result, budget, rho):
    """Loss of the counts less that of an arm of the sweep."""
    arm = {p["seed"]: p for p in result["points"] if p["labels"] == {"budget": budget, "rho": rho}}
    return {
        half: {
            key: mean_interval([point[half][key] - arm[point["seed"]][half][key] for point in group])
            for key in ("loss", "bits_per_byte")
        }
        for half in ("validation", "test")
    }


# (b) mixtures


def points_to_train(arms, budget, bf16):
    """Points of the sweeps with the learning rates that those chose, models kept: the same runs, but for their precision without ``bf16``."""
    results = {name: json.loads((RESULTS / f"{name}.json").read_text()) for name in SWEEPS}
    best = results["sweep_allocation"]["summary"][budget]["best"]["label"]
    wanted = {
        "experts": ("sweep_allocation", {"budget": budget, "rho": "1.00"}),
        "memory": ("sweep_allocation", {"budget": budget, "rho": best}),
        "dense": ("sweep_dense", {"arm": "dense, equal operations"}),
        "dense_memory": ("sweep_dense", {"arm": "dense with memory"}),
    }
    for arm in arms:
        name, labels = wanted[arm]
        sweep = read_sweep(RECIPES / f"{name}.yaml", {"keep_model": True})
        rates = {Choice(r["group"], tuple(r["at"].items())): r["learning_rate"] for r in results[name]["learning_rates"]}
        known = {entry["digest"] for entry in results[name]["points"]}
        points = [point for point in sweep.points(rates) if point.labels == labels]
        if lacking := [point.name for point in points if point.digest not in known]:
            raise SystemExit(f"results/{name}.json: was made with another recipe than {', '.join(lacking)}")
        yield from (dataclasses.replace(point, recipe=dataclasses.replace(point.recipe, bf16=bf16)) for point in points)


def train(task, store):
    """A point in a folder of its own; finished ones are read back."""
    folder, recipe = task
    begun = time.perf_counter()
    result = run_point(recipe, load_data(recipe.data, store), folder)
    return f"{folder.name}: test {result['held_out']['test']['loss']:.4f}, {time.perf_counter() - begun:.0f} s"


def train_all(folder, store, points, workers):
    tasks = [(folder / point.name, point.recipe) for point in points]
    for told in side_by_side(functools.partial(train, store=store), tasks, workers):
        print(told, flush=True)


def known_points():
    """Points of the sweeps' results by digest, with the names of their arms."""
    found = {}
    for name in SWEEPS:
        for entry in json.loads((RESULTS / f"{name}.json").read_text())["points"]:
            labels = entry["labels"]
            budget, rho = labels.get("budget"), labels.get("rho")
            found[entry["digest"]] = (f"{budget}, rho {rho}" if rho else labels["arm"], entry)
    return found


def open_run(run):
    """Recipe, model with its memory if it has one, and losses noted when it was trained."""
    noted = json.loads((run / "result.json").read_text())
    recipe = build_fields(PointRecipe, noted["recipe"], str(run))
    model, tokenizer = load_model(str(run / "model"))
    if (run / "memory").exists():
        model = EngramModel.from_pretrained(model, run / "memory", tokenizer, TableConfig(dtype="float32"))
    return recipe, model.eval(), noted


def mixtures_of(run, store):
    """One model alone, its counts alone, and both, on both halves: an entry for each order of counts."""
    recipe, model, noted = open_run(run)
    data = load_data(recipe.data, store)
    if noted["text"] != data.store.fingerprint:
        raise SystemExit(f"{run}: was trained on other text than that of {store}")
    parts = halves(data)
    alone = {half: part.by_model(model, recipe.bf16) for half, part in parts.items()}
    for half, part in parts.items():
        off = part.score(alone[half])["loss"] - noted["held_out"][half]["loss"]
        if abs(off) > SAME:
            raise SystemExit(
                f"{run}: loss on {half} is {off:+.4f} nats off what was noted; expected the model as it was trained"
            )
    unnamed = (re.sub(r"[-_,]?(seed[-_=]?)?\d+$", "", run.name), None)
    arm, entry = known_points().get(Point({}, recipe.seed, dataclasses.replace(recipe, bf16=True)).digest, unnamed)
    told = {
        "arm": arm,
        "seed": recipe.seed,
        "memory": isinstance(model, EngramModel),
        **{key: noted["counts"][key] for key in ("total", "active")},
        "tokens": noted["tokens"],
        "bf16": recipe.bf16,
        "training_seconds": noted["seconds"],
        "in_the_sweep": entry and {half: entry[half]["loss"] for half in parts},
    }
    for order in MIXED:
        yield {**told, "order": order, **mixture(parts, alone, counted(store, recipe, order))}


def mixture(parts, alone, counts):
    """Scores of a model, of counts, and of both, whose weight the validation half chooses."""
    by_counts = {half: part.by_counts(counts) for half, part in parts.items()}
    chosen = parts["validation"].predicted
    weight = mixture_weight(-alone["validation"][chosen], -by_counts["validation"][chosen])
    scores = {
        half: {
            "model": part.score(alone[half]),
            "counts": part.score(by_counts[half]),
            "mixture": part.score(mixed(alone[half], by_counts[half], weight)),
        }
        for half, part in parts.items()
    }
    return {"weight_of_model": weight, **scores}


DIFFERENCES = {
    "without - with": (("model", 0), ("model", 1)),
    "without + counts - with": (("mixture", 0), ("model", 1)),
    "with + counts - with": (("mixture", 1), ("model", 1)),
    "without + counts - with + counts": (("mixture", 0), ("mixture", 1)),
}
"""What is subtracted from what: scores of the model without a memory (0) and of that with one (1)."""


def differences(mixtures):
    """For every arm without a memory beside every one with, of equal tokens and order: differences on the test half, seed by seed."""
    arms = {}
    for entry in mixtures:
        arms.setdefault((entry["order"], entry["tokens"], entry["memory"], entry["arm"]), {})[entry["seed"]] = entry
    found = []
    for (order, tokens, memory, without), plain in arms.items():
        for (*setting, with_memory), joint in arms.items():
            seeds = sorted(plain.keys() & joint.keys())
            if not memory and setting == [order, tokens, True] and seeds:
                pairs = [(plain[seed]["test"], joint[seed]["test"]) for seed in seeds]
                entry = {"without": without, "with": with_memory, "order": order, "seeds": seeds}
                found.append(entry | {name: paired(pairs, *terms) for name, terms in DIFFERENCES.items()})
    return found


def paired(pairs, first, second):
    """``first`` less ``second``, each the name of a score and whose it is: 0 without a memory, 1 with one."""
    return {
        key: mean_interval([pair[first[1]][first[0]][key] - pair[second[1]][second[0]][key] for pair in pairs])
        for key in ("loss", "bits_per_byte")
    }


def tell(found):
    for entry in found["summary"]:
        test = entry["test"]
        told = f"{entry['budget']}, order {entry['order']}: {test['loss']['mean']:.4f} nats, {test['bits_per_byte']['mean']:.4f} bits per byte"
        for name, arm in entry.get("less", {}).items():
            told += f"; less {name} (rho {arm['rho']}) {interval(arm['test']['bits_per_byte'])}"
        print(told)
    for entry in found["mixtures"]:
        losses = ", ".join(f"{name} {score['bits_per_byte']:.4f}" for name, score in entry["test"].items())
        print(f"{entry['arm']}, seed {entry['seed']}, order {entry['order']}: {losses} (weight {entry['weight_of_model']:.3f})")
    for entry in found["differences"]:
        for name in DIFFERENCES:
            told = f"{entry['without']} / {entry['with']}, order {entry['order']}: {name}"
            print(f"{told} {interval(entry[name]['bits_per_byte'])} bits per byte")


def interval(entry):
    ends = "" if entry["low"] is None else f" [{entry['low']:+.4f}, {entry['high']:+.4f}]"
    return f"{entry['mean']:+.4f}{ends}"


def tiny_store(folder):
    """A store of seconds and four trained points, for `--quick`."""
    path = RECIPES / f"{QUICK}.yaml"
    sweep = read_sweep(path, {"keep_model": True})
    points = sweep.points({})
    prepare_data(points[0].recipe.data, path.parent, folder / "data")
    train_all(folder / "points", folder / "data", points, 1)
    return sweep, folder / "data", folder / "points"


def measure(args, sweep, store, models, result):
    points = []
    for point in count_points(store, sweep, ORDERS):
        points.append(point)
        print(f"{point['budget']}, seed {point['seed']}, order {point['order']}: test {point['test']['loss']:.4f}", flush=True)
    data = load_data(runs_of(sweep)[0][1].data, store)
    if result is not None:
        check_against(result, points, data.store.fingerprint)
    runs = sorted(file.parent for file in models.glob("*/result.json") if (file.parent / "model").exists()) if models else []
    if models and not runs:
        raise SystemExit(f"{models}: holds no finished runs with a model; expected runs of engram train, or --train")
    mixtures = [entry for run in runs for entry in mixtures_of(run, store)]
    found = {
        **provenance(sorted({point["seed"] for point in points})),
        "text": data.store.fingerprint,
        "held_out_text": {half: blocks.composition for half, blocks in data.held_out.items()},
        "smoothing": "modified Kneser-Ney, interpolated",
        "counted": "every predicted token of every block that a run reads, as often as it is read; contexts within the block and document",
        "points": points,
        "summary": summary(points, result),
        "mixtures": mixtures,
        "differences": differences(mixtures),
    }
    tell(found)
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny sweep: only to see that it runs; needs --out")
    parser.add_argument("--store", type=Path, help="folder of the sweep's token store")
    parser.add_argument("--models", type=Path, help="folder of finished runs that kept their models, to mix with counts")
    parser.add_argument("--train", type=Path, help="train such runs into this folder first")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="what --train trains")
    parser.add_argument(
        "--budget", choices=("small", "large"), default="small", help="of experts and memory that --train trains"
    )
    parser.add_argument(
        "--float32", action="store_true", help="train in float32, where the CPU emulates the bfloat16 of the sweeps"
    )
    parser.add_argument("--train-only", action="store_true", help="stop when they are trained")
    parser.add_argument("--limit", type=int, help="train at most so many, and stop")
    add_workers(parser, "runs")
    parser.add_argument("--out")
    args = parser.parse_args()
    out = result_file(parser, args, "ngram_baseline.json", "quick")
    if args.quick:
        with tempfile.TemporaryDirectory() as folder:
            write(out, measure(args, *tiny_store(Path(folder)), None))
        return
    if args.store is None or (args.train and args.models):
        parser.error("expected --store, and --models or --train or neither; or --quick")
    if not (args.models or args.train) and entries_of(out, "mixtures"):
        parser.error(f"{out} holds mixtures, which would be lost: give --models or --train too, or another --out")
    if args.train:
        points = list(points_to_train(args.arms, args.budget, not args.float32))[: args.limit]
        train_all(args.train, args.store, points, args.workers)
        if args.train_only or args.limit is not None:
            return
    result = json.loads((RESULTS / "sweep_allocation.json").read_text())
    sweep = read_sweep(RECIPES / "sweep_allocation.yaml")
    write(out, measure(args, sweep, args.store, args.models or args.train, result))


if __name__ == "__main__":
    main()
